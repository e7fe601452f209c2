"""Prompt files of every kind: the same rows give the same prompts; what is wrong names its line."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest

from sfgrpo import prompts
from sfgrpo.prompts import Prompt, files

ROWS: list[dict[str, Any]] = [
    {"Prompt": "a cat", "Code": "007", "day": "2024-01-15", "count": 1, "share": 0.5},
    {"Prompt": "None", "Code": "010", "day": "NA", "count": 2, "share": 3},
    {"Prompt": "nan", "Code": "", "day": "null", "count": 3, "share": 1e-05},
]
EXPECTED = [
    Prompt(row["Prompt"], {k: v for k, v in row.items() if k != "Prompt" and v != ""})
    for row in ROWS
]


def as_csv(separator: str) -> str:
    lines = [ROWS[0].keys(), *(row.values() for row in ROWS)]
    return "".join(separator.join(map(str, line)) + "\r\n" for line in lines)


def contents(suffix: str) -> bytes:
    """`ROWS` in a format, with the byte-order mark of Windows' editors."""
    kept = [{k: v for k, v in row.items() if v != ""} for row in ROWS]
    text = {
        ".csv": as_csv(","),
        ".tsv": as_csv("\t"),
        ".json": json.dumps(kept, indent=1),
        ".jsonl": "\n".join(map(json.dumps, kept)),
    }[suffix]
    return ("\ufeff" + text).encode()


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
def test_the_same_rows_are_the_same_prompts(tmp_path: Path, suffix: str) -> None:
    """Alone, packed and in a folder; no text becomes a number, a time or nothing."""
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / f"train{suffix}"
    path.write_bytes(contents(suffix))
    packed = tmp_path / f"packed{suffix.upper()}.gz"
    packed.write_bytes(gzip.compress(contents(suffix)))
    for source in (path, packed, folder):
        assert prompts.load(str(source)) == EXPECTED


def test_a_parquet_file_alone(tmp_path: Path) -> None:
    rows = {"Caption": ["a cat", None, " ", "a dog"], "text": ["CAT", "", "", None]}
    path = tmp_path / "p[1].parquet"  # `datasets` would take the name for a pattern
    datasets.Dataset.from_dict(rows).to_parquet(str(path))
    found = prompts.load(str(path))
    assert found == [Prompt("a cat", {"text": "CAT"}), Prompt("a dog", {})]
    assert found[1].where == f"{path}, row 4"


def test_where_a_prompt_stands(tmp_path: Path) -> None:
    """The line on which it begins, as an editor counts."""

    def where(name: str, text: str) -> list[str]:
        (tmp_path / name).write_text(text)
        found = prompts.load(str(tmp_path / name))
        return [prompt.where.removeprefix(f"{tmp_path}/") for prompt in found]

    assert where("p.txt", "a\n\nb\n") == ["p.txt, line 1", "p.txt, line 3"]
    assert where("p.jsonl", '\n{"prompt": "a"}\n') == ["p.jsonl, line 2"]
    assert where("p.json", '["a", "b"]') == ["p.json, item 1", "p.json, item 2"]
    text = 'n,prompt\n1,"two\nlines"\n\n2,b\n'
    assert where("p.csv", text) == ["p.csv, line 2", "p.csv, line 5"]
    assert prompts.load("signs")[4].where == "signs, line 5"
    assert Prompt("a", {}, "here") == Prompt("a", {}, "there")


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        (["Prompt", "Category"], "Prompt"),  # PartiPrompts
        (["Prompts", "Category"], "Prompts"),  # DrawBench
        (["text", "CAPTION"], "CAPTION"),
        (["Prompt", "prompt"], "prompt"),
        (["prompts", "texts"], "prompts"),
    ],
)
def test_the_column_of_the_prompt(tmp_path: Path, columns: list[str], chosen: str) -> None:
    row = {name: f"the {name}" for name in columns}
    for name, text in (
        ("p.jsonl", json.dumps(row)),
        ("p.csv", ",".join(row) + "\n" + ",".join(row.values())),
    ):
        (tmp_path / name).write_text(text)
        (found,) = prompts.load(str(tmp_path / name))
        assert found.text == f"the {chosen}"
        assert found.metadata == {k: v for k, v in row.items() if k != chosen}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"Prompt": "a", "PROMPT": "b"}', "which is the prompt, Prompt, PROMPT"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ["b"]}', "line 2: 'prompt' must be text, got"),
        ("p.jsonl", '{"prompt": "a \\ud83d b"}', r"line 1: \\ud83d in 'a \\ud83d b' is half"),
        ("p.jsonl", '{"prompt": "a", "m": {"k": ["\\udc00"]}}', r"line 1: \\udc00 in .* is half"),
        ("p.jsonl", '{"prompt": "a", "m": ' + "[" * 99 + "]" * 99 + "}", "line 1: .*more than 64"),
        ("p.jsonl", "[" * 99999, r"line 1: not valid JSON \(nested too deeply"),
        ("p.json", "[" * 99999, r"p.json: not valid JSON \(nested too deeply"),
        ("p.jsonl", '{"prompt": "a", "n": ' + "9" * 5000 + "}", "line 1: not valid JSON"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}',
            r'line 2: the key "prompt" stands twice in one object',
        ),
        ("p.jsonl", '{"prompt": "a", "m": [{"k": 1, "j": 0, "k": 1}]}', 'line 1: the key "k" st'),
        (
            "p.json",
            '[\n{"prompt": "a"},\n{"prompt": "b", "m": {"k": 1, "k": 2}}]',
            'p.json, item 2: the key "k" stands twice',
        ),
        ("p.json", '{"prompt": "a",\n"prompt": "b"}', 'p.json: the key "prompt" stands twice'),
        ("p.json", '[{"prompt": "a"}, "b"]', "item 2: expected an object"),
        ("p.csv", "prompt,n\na cat, a dog,1\n", "line 2: 3 cells for 2 columns; .*double quotes"),
        ("p.csv", "prompt,n,n\na,1,2\n", "line 1: there are several columns n$"),
        ("p.csv", 'prompt\na\n"b\nc\n', "line 3: not valid CSV"),
        ("p.csv", "prompt\n" + "a" * 200_000, "line 2: not valid CSV"),
        ("p.csv", "prompt;n\na;1\n", "needs a column prompt, caption or text, it has prompt;n"),
        ("p.csv", "prompt\n", "holds no prompt"),
        ("p.json", "[]", "holds no prompt"),
        ("p.parquet", "PAR1", "cannot be read"),
        ("p.txt.gz", "a cat", "cannot be read"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        prompts.load(str(path))
    told = str(refused.value)
    assert str(path) in told
    assert "\n" not in told
    assert len(told) < 300 + len(str(path))


def test_a_thousand_long_names_are_not_all_listed(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps({f"a long prompt, number {i} " * 4: {"x": 1} for i in range(1000)}))
    for source in (path, tmp_path):
        with pytest.raises(ValueError, match="and 988 more") as refused:
            prompts.load(str(source))
        assert len(str(refused.value)) < 1000


def test_a_fingerprint_is_that_of_texts_and_metadata_in_order() -> None:
    a, b = Prompt("a", {"x": 1, "y": [2]}), Prompt("b", {})

    def of(train: list[Prompt], evaluation: list[Prompt]) -> str:
        return prompts.fingerprint(prompts.Split(train=train, evaluation=evaluation))

    same = of([a, b], [b])
    assert of([Prompt("a", {"y": [2], "x": 1}, "elsewhere"), b], [b]) == same
    others = [
        of([b, a], [b]), of([a], [b]), of([a, b], [a]), of([a, b, b], []), of([a, b], [a, b]),
        of([Prompt("a", {"x": 2, "y": [2]}), b], [b]), of([Prompt("A", a.metadata), b], [b]),
        of([Prompt("a", {"x": "1", "y": [2]}), b], [b]),
    ]  # fmt: skip
    assert len({same, *others}) == 1 + len(others)
    assert len(same) == 64
    embedded = prompts.split("embedded")
    assert embedded.all is embedded.train
    assert len(prompts.Split(train=[a], evaluation=[b]).all) == 2


PIECES = [
    "prompt", "Prompts", "caption", "text", "a cat", '"', "'", ",", "\t", "\n", "\r\n", "{", "}",
    "[", "]", ":", " ", "null", "nan", "-1e999", "007", "\\ud800", "\\u2028", "\\", "\ufeff", "\0",
    "é", "\u2028", "🐈", "", '{"prompt": "a"}', '["a"]', "[" * 200, "9" * 5000, "\x1c", "\x85",
]  # fmt: skip


def _refusal(path: Path) -> str | None:
    """What is said of a file that holds no prompts; None if it does."""
    try:
        found = prompts.load(str(path))
    except ValueError as error:
        return str(error)
    assert all(p.text.strip() == p.text != "" and str(path) in p.where for p in found)
    prompts.fingerprint(prompts.Split(train=found, evaluation=found))
    return None


@pytest.mark.parametrize("suffix", files.READERS)
def test_no_file_is_answered_with_more_than_one_line(tmp_path: Path, suffix: str) -> None:
    """Pieces of files in any order, and whole files with bytes changed: prompts or a ValueError
    that names the file, and of a JSON line the line."""
    chance, path = random.Random(suffix), tmp_path / f"fuzz{suffix}"
    table = tmp_path / "whole.parquet"
    datasets.Dataset.from_dict({"prompt": ["a cat", "a dog"], "n": [1, 2]}).to_parquet(str(table))
    whole = {".parquet": table.read_bytes(), ".txt": b"a cat\na dog", ".ndjson": contents(".jsonl")}
    refused = 0
    for _ in range(120):
        if chance.random() < 0.6 and suffix != ".parquet":
            data = "".join(chance.choices(PIECES, k=chance.randrange(1, 12))).encode()
        else:
            data = bytearray(whole.get(suffix) or contents(suffix))
            for _ in range(chance.randrange(1, 4)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            del data[chance.randrange(len(data)) :][chance.randrange(2) * len(data) :]
        path.write_bytes(data)
        told = _refusal(path)
        if told is None:
            continue
        refused += 1
        assert str(path) in told
        assert "\n" not in told
        assert len(told) < 600
        if suffix == ".jsonl" and "JSON" in told:
            assert ", line " in told
    assert refused
