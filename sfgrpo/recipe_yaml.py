"""YAML as a recipe means it: text stays text, a number is a number, and nothing is lost.

PyYAML reads YAML 1.1, where `yes` is a truth value, `1:30` is 90, `0123` is 83, and `3e-4`, without
a dot, is text. Here plain scalars follow YAML 1.2's core schema, so that what is in quotes stays
text; a key that stands twice in one mapping is an error instead of the last one winning; and no
document grows beyond what it could have written out.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

from sfgrpo.names import in_one_line

NODES = 10_000
"""How many values a document may have, aliases written out."""
INT, FLOAT, BOOL, NULL = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null"))


class RecipeYAMLError(ValueError):
    """Text that cannot be read; the message says why and in which line."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema; no key twice."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise RecipeYAMLError(f"line {line}: a key must be text, got {key!r}")
            if key in seen:
                raise RecipeYAMLError(f"line {line}: '{key}' stands in line {seen[key]} already")
            seen[key] = line
        return super().construct_mapping(node, deep=deep)


def _number(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = node.value.lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_implicit_resolver(
    BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(NULL, re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
# A leading zero is refused: YAML 1.1 reads 0123 as 83, YAML 1.2 as 123.
_Loader.add_implicit_resolver(INT, re.compile(r"^[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    FLOAT,
    re.compile(
        r"^[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)
_Loader.add_constructor(FLOAT, _number)
_Loader.add_constructor(INT, lambda loader, node: int(node.value))


def read(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        RecipeYAMLError: it is no YAML, has a key twice, or would expand to more than `NODES`
            values.
    """
    try:
        return _constructed(_Loader(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}: " if mark else ""
        raise RecipeYAMLError(f"{place}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeYAMLError(in_one_line(error)) from None
    except RecursionError:
        raise RecipeYAMLError("it is nested too deeply") from None
    except RecipeYAMLError:
        raise
    except (TypeError, ValueError, AttributeError) as error:  # of a tag that its value does not fit
        raise RecipeYAMLError(str(error)) from None


def _constructed(loader: _Loader) -> Any:
    node = loader.get_single_node()
    if node is None:
        return None
    _count(node, {}, ())
    return loader.construct_document(node)


def _count(node: yaml.Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Values of a node with its aliases written out."""
    line = node.start_mark.line + 1
    if id(node) in above:
        raise RecipeYAMLError(f"line {line}: a value that contains itself")
    if id(node) not in known:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        within = (*above, id(node))
        known[id(node)] = 1 + sum(_count(part, known, within) for part in inner)
    if known[id(node)] > NODES:
        raise RecipeYAMLError(f"line {line}: more than {NODES} values with its aliases written out")
    return known[id(node)]
