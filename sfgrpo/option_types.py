"""Whether the values that a recipe gives as options are what functions are annotated to take.

A recipe knows truth values, numbers, text, lists and mappings; only what these can be told by is
looked at, and an annotation that says more (a class, Any) lets everything through. Unchecked, the
text "False" would be true, and the text "95" a traceback from inside of the function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

_NAMES = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text",
    NoneType: "null", list: "a list", dict: "a mapping",
}  # fmt: skip
_CONTAINERS = {Sequence: list, list: list, tuple: list, Mapping: dict, dict: dict}


def misfit(function: Callable[..., Any], options: Mapping[str, Any]) -> str | None:
    """What is wrong with the first option that has not its annotation's type; None if nothing."""
    try:
        parameters = inspect.signature(function, eval_str=True).parameters
    except Exception:  # annotations are the user's code, and may name what is not imported
        return None
    for name, value in options.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.annotation is inspect.Parameter.empty:
            continue
        kinds, given = _kinds(parameter.annotation), list if type(value) is tuple else type(value)
        same_as_default = type(value) is type(parameter.default) and value == parameter.default
        if not kinds or given not in _NAMES or same_as_default:
            continue
        if given not in kinds and not (given is int and float in kinds):
            expected = " or ".join(_NAMES[kind] for kind in kinds)
            return f"option '{name}' must be {expected}, got {_NAMES[given]}: {value!r:.60}"
    return None


def _kinds(annotation: Any) -> list[type]:
    """The types of a recipe that an annotation names; none if it names any other, too."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        several = [_kinds(part) for part in get_args(annotation)]
        return list(dict.fromkeys(k for some in several for k in some)) if all(several) else []
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin is Literal:
        return list(dict.fromkeys(map(type, get_args(annotation))))
    if annotation is None:
        return [NoneType]
    if annotation in _NAMES:
        return [annotation]
    found = _CONTAINERS.get(origin or annotation)
    return [found] if found else []
