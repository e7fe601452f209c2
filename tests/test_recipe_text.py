"""Recipes as people write them: what is text stays text, and every error names its key."""

from __future__ import annotations

import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from sfgrpo import config, recipe_yaml
from sfgrpo.config import Recipe, RecipeError
from sfgrpo.recipe_text import annotation_of, override, read_file

VALUES = (
    "", "null", "~", "true", "false", "yes", "no", "on", "0", "1", "-1", "2", "3", "007", "1_000",
    "0x1F", "1.5", "-2.5", "1e3", "1e-4", "3e400", ".inf", "-.inf", ".nan", "nan", "inf", "1:30",
    "12:30:45", "2024-01-15", "'7'", '"7"', "'a'", "9" * 30, "-" + "9" * 30, "[", "]", "{", "}",
    "[]", "{}", "[1]", "[1, 2]", "[1, 2, 3]", "[a]", "[[1]]", "[null]", "{a: 1}", "{a: {b: 1}}",
    "{1: 2}", "{a: 1, a: 2}", "[0.9, 0.999]", "[true, 1]", "@x", "%", "%YAML 1.1", "*a", "&a 1",
    "&a [*a]", "&a {b: *a}", "!x 1", "!!int x", "!!binary x", "!!python/name:os.system",
    "!!set {a}", "!!timestamp 1", "# x", "a # b", "a: b", "a: b: c", ": ", "- 1", "- - 1", "|",
    "> x", "--- 1", "...", "--- 1\n--- 2", "\t", "\n", "\0", "\x07", "\ud800", "\ufeff1", "é",
    "日本", "😀", "`x`", "$HOME", "~/x", "~nobody/x", "/", "ocr", "ddim", "ode", "uniform",
    "mod:fn", "mod:", ":fn", "a:b:c", "x" * 5000, "[" * 200, "{a: " * 200, "? x", "<<: 1", "a\nb",
    "'", '"',
    "\\", "1 2", "0.0", "-0", "+3",
)  # fmt: skip
"""What a hundred wrong and right keys have been given."""


def keys(section: type[BaseModel] = Recipe, place: tuple[str, ...] = ()) -> Iterator[str]:
    """Every key of a recipe, sections among them."""
    for name, field in section.model_fields.items():
        yield ".".join((*place, name))
        options = typing.get_args(field.annotation) or (field.annotation,)
        for option in options:
            if isinstance(option, type) and issubclass(option, BaseModel):
                yield from keys(option, (*place, name))


def refused(key: str, value: str) -> str | None:
    """What is said of a value; None if it is taken."""
    data: dict[str, Any] = {}
    try:
        override(data, key, value, Recipe)
        config.validated(data)
    except RecipeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("key", list(keys()))
def test_any_value_is_taken_or_refused_in_lines_that_name_the_key(key: str) -> None:
    section = key.partition(".")[0]
    for value in VALUES:
        refusal = refused(key, value)
        if refusal is None:
            continue
        first, *rest = refusal.splitlines()
        told = rest if first == "the recipe cannot be run:" else [first]
        assert told
        assert all(section in line for line in told), (key, value, refusal)
        assert len(refusal) < 2000, (key, value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("'007'", "007"), ('"nan"', "nan"), ("'1e3'", "1e3"), ("yes", "yes"), ("off", "off"),
        ("1:30", "1:30"), ("0123", "0123"), ("2024-01-15", "2024-01-15"), ("1_000", "1_000"),
        ("3e-4", 3e-4), ("1E3", 1e3), (".5", 0.5), ("-7", -7), ("0", 0), ("true", True),
        ("~", None), ("", None), ("null", None),
    ],
)  # fmt: skip
def test_scalars(text: str, expected: Any) -> None:
    found = recipe_yaml.read(text)
    assert found == expected
    assert type(found) is type(expected)


def test_on_the_command_line_text_is_text() -> None:
    for key in ("sample.negative_prompt", "model.attention"):
        for value in ("ugly #nsfw", "1984", "@x", "[a", "a: b", "*", "yes", "null"):
            data: dict[str, Any] = {}
            override(data, key, value, Recipe)
            assert (
                config.validated(data).model_dump()[key.partition(".")[0]][key.split(".")[1]]
                == value
            )
    assert config.load("embedded", [("eval.prompts_from", "null")]).eval.prompts_from is None


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    found = config.load(
        "embedded",
        [("run.output_dir", "~/a"), ("model.path", "~/m"), ("prompts", "~/p.txt"),
         ("model.prompt_cache", "~/c"), ("eval.prompts_from", "~/e.txt")],
    )  # fmt: skip
    assert found.run.output_dir == Path("/somebody/a")
    assert (found.model.path, found.prompts) == ("/somebody/m", "/somebody/p.txt")
    assert found.model.prompt_cache == Path("/somebody/c")
    assert found.eval.prompts_from == "/somebody/e.txt"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"run: {seed: 1}\nmodel: {}\nrun: {seed: 2}\n", "line 3: 'run' stands in line 1 already"),
        (b"run:\n  seed: 1\n  seed: 2\n", "line 3: 'seed' stands in line 2 already"),
        (b"1: 2\n", "line 1: a key must be text, got 1"),
        (b"run: {output_dir: \xff}\n", "not UTF-8 text: byte 0xff at position 18"),
        (b"run: [1\n", "not valid YAML: line 2"),
        (b"- 1\n", "must be a mapping of sections, got list"),
        (b"run: &a\n  x: *a\n", "a value that contains itself"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        read_file(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_aliases_are_read_and_do_not_explode() -> None:
    assert recipe_yaml.read("a: &x [1, 2]\nb: *x\n") == {"a": [1, 2], "b": [1, 2]}
    lines = ["a0: &a0 [0, 0, 0, 0, 0, 0, 0, 0]"]
    lines += [f"a{k + 1}: &a{k + 1} [{', '.join([f'*a{k}'] * 8)}]" for k in range(12)]
    start = time.process_time()
    with pytest.raises(recipe_yaml.RecipeYAMLError, match="more than 10000 values"):
        recipe_yaml.read("\n".join(lines))
    assert time.process_time() - start < 5  # it took minutes; this takes milliseconds


def test_the_type_of_a_key() -> None:
    assert annotation_of(["run", "seed"], Recipe) is int
    assert annotation_of(["lora", "rank"], Recipe) is not None
    assert annotation_of(["run", "sed"], Recipe) is None
