"""Prompts: every kind of source, what evaluation shows, and how often a prompt is drawn."""

from __future__ import annotations

import datetime
import json
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image as Picture

from sfgrpo import config, prompts
from sfgrpo.layout import Layout
from sfgrpo.prompts import Prompt

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"},
    {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "position": ["left of", 0]}],
        "prompt": "a cat left of a dog",
    },
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No source may reach for the network."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(folder: Path, **contents: str) -> str:
    """A folder of files; `train__txt="a"` is train.txt."""
    folder.mkdir(exist_ok=True)
    for name, text in contents.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return str(folder)


def lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def texts(found: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in found]


def test_a_file_of_geneval_keeps_all_its_keys(tmp_path: Path) -> None:
    source = write(tmp_path, g__jsonl=lines(GENEVAL)) + "/g.jsonl"
    assert prompts.load(source) == [
        Prompt(r["prompt"], {k: v for k, v in r.items() if k != "prompt"}) for r in GENEVAL
    ]


def test_files_as_editors_write_them(tmp_path: Path) -> None:
    source = tmp_path / "p.txt"
    source.write_bytes("\ufeffa cat\r\n\r\na dog".encode())
    assert texts(prompts.load(str(source))) == ["a cat", "a dog"]
    source.write_bytes(b"a cat\ra dog\r")  # of the first Macs, and of their spreadsheets
    assert texts(prompts.load(str(source))) == ["a cat", "a dog"]
    source = tmp_path / "p.jsonl"
    source.write_text('{"prompt": "one\u2028two"}\n', encoding="utf-8")
    assert texts(prompts.load(str(source))) == ["one\u2028two"]


def test_a_format_that_a_folder_leaves_out_is_told(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "mixed", a__txt="one\n", b__jsonl=lines(GENEVAL), dataset_infos__json="{}"
    )
    with pytest.warns(UserWarning, match=r"reads its \.jsonl alone, and leaves out a\.txt$"):
        prompts.load(folder)


def test_flow_grpos_folders(tmp_path: Path) -> None:
    ocr = write(tmp_path / "ocr", train__txt='a "A"\n\nb "B"\n', test__txt='c "C"\n')
    found = prompts.split(ocr)
    assert found.train == [Prompt('a "A"', {}), Prompt('b "B"', {})] == prompts.load(ocr)
    assert found.evaluation == [Prompt('c "C"', {})]
    geneval = write(
        tmp_path / "geneval",
        train_metadata__jsonl=lines(GENEVAL),
        test_metadata__jsonl=lines(GENEVAL[:1]),
    )
    before = files(tmp_path)
    found = prompts.split(geneval)
    assert found.train == prompts.load(geneval + "/train_metadata.jsonl")
    assert found.evaluation == found.train[:1]
    assert files(tmp_path) == before


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "jsonl", "save_to_disk"])
def test_folders_of_a_dataset(tmp_path: Path, kind: str) -> None:
    rows = {"caption": ["a cat", "a dog"], "text": ["CAT", None], "count": [1, 2]}
    whole = datasets.Dataset.from_dict(rows)
    folder = tmp_path / "data"
    if kind == "save_to_disk":
        whole.save_to_disk(folder)
    else:
        folder.mkdir()
        suffix = {"parquet": whole.to_parquet, "csv": whole.to_csv}.get(kind, whole.to_json)
        suffix(str(folder / f"data.{kind}"))
    before = files(folder)
    expected = [Prompt("a cat", {"text": "CAT", "count": 1}), Prompt("a dog", {"count": 2})]
    assert prompts.load(str(folder)) == expected
    found = prompts.split(str(folder))
    assert found.train is found.evaluation
    assert files(folder) == before


def test_a_saved_dict_of_splits(tmp_path: Path) -> None:
    names = ("train", "test")
    parts: Any = {name: datasets.Dataset.from_dict({"prompt": [name]}) for name in names}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    found = prompts.split(str(tmp_path / "two"))
    assert (texts(found.train), texts(found.evaluation)) == (["train"], ["test"])
    parts["validation"] = datasets.Dataset.from_dict({"prompt": ["validation"]})
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "three")
    assert texts(prompts.split(str(tmp_path / "three")).evaluation) == ["validation"]
    # As the source of evaluation alone, whatever the training prompts are.
    found = prompts.split("signs", prompts_from=str(tmp_path / "two"))
    assert (found.train, texts(found.evaluation)) == (prompts.load("signs"), ["test"])
    single = tmp_path / "single"
    parts["train"].save_to_disk(single)
    assert texts(prompts.split("signs", prompts_from=str(single)).evaluation) == ["train"]


def test_metadata_are_what_json_can_say(tmp_path: Path) -> None:
    picture = tmp_path / "broken.png"
    picture.write_bytes(b"not a picture")
    rows = {
        "text": [" a cat ", "   ", "a dog"],
        "image": [str(picture)] * 3,
        "when": [datetime.datetime(2025, 1, 1)] * 3,
        "raw": [b"x"] * 3,
        "label": [0, 1, 0],
        "box": [[0.5, 1.0]] * 3,
        "who": [{"name": "Ada", "age": None}] * 3,
        "good": [True] * 3,
    }
    whole = datasets.Dataset.from_dict(rows)
    whole = whole.cast_column("label", datasets.ClassLabel(names=["x", "y"]))
    whole = whole.cast_column("image", datasets.Image())
    whole.save_to_disk(tmp_path / "data")
    metadata = {"label": 0, "box": [0.5, 1.0], "who": {"name": "Ada"}, "good": True}
    # The image cannot be opened, and nobody tries.
    with pytest.raises(Picture.UnidentifiedImageError):
        _ = whole[0]["image"]
    found = prompts.load(str(tmp_path / "data"))
    assert found == [Prompt("a cat", metadata), Prompt("a dog", metadata)]


@pytest.mark.parametrize("name", ["json", "a 1", "train"])
def test_any_name_of_a_folder_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write(tmp_path / name, train__txt="a\n", test__txt="b\n")
    monkeypatch.chdir(tmp_path)
    found = prompts.split(name)
    assert (texts(found.train), texts(found.evaluation)) == (["a"], ["b"])


def test_no_code_of_a_dataset_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    folder = write(tmp_path / "data", data__py=f"open({str(mark)!r}, 'w')\n")
    with pytest.raises(ValueError, match="cannot be read"):
        prompts.load(folder)
    assert not mark.exists()


def test_folders_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"folder '.*empty' cannot be read"):
        prompts.load(str(tmp_path / "empty"))
    pattern = write(tmp_path / "a [1]", train__txt="a")
    with pytest.raises(ValueError, match=r"its path has one of .* rename it"):
        prompts.load(pattern)
    other = write(tmp_path / "other", train__csv="promt,n\na,1\n")
    with pytest.raises(
        ValueError, match=r"train.csv: needs a column prompt, caption or text.*promt"
    ):
        prompts.load(other)
    number = write(tmp_path / "number", train__csv="prompt,n\n3,1\n")
    with pytest.raises(ValueError, match=r"train.csv, line 2: 'prompt' must be text, got 3"):
        prompts.load(number)
    test = write(tmp_path / "test", test__txt="a\n")
    with pytest.raises(ValueError, match="needs a split 'train', it has test"):
        prompts.load(test)
    blank = write(tmp_path / "blank", train__txt="\n \n")
    with pytest.raises(ValueError, match="holds no prompt"):
        prompts.load(blank)
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(ValueError, match=r"datasets 3.6.0 may run code.*pip install"):
        prompts.load(test)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'datasets>=5'"):
        prompts.load(test)
    assert texts(prompts.load(test + "/test.txt")) == ["a"]  # files need no library


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "p.xlsx").write_text("prompt\na")
    with pytest.raises(ValueError, match=r"is none of .txt, .jsonl, .*folder"):
        prompts.load(str(tmp_path / "p.xlsx"))
    (tmp_path / "p.txt").write_bytes(b"a cat\n\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"p.txt' is not UTF-8 text, line 2"):
        prompts.load(str(tmp_path / "p.txt"))
    with pytest.raises(ValueError, match=r"does not exist.*known sets are embedded, signs"):
        prompts.load("sings")


def test_without_more_evaluation_shows_the_training_prompts() -> None:
    found = prompts.split("embedded")
    assert found.train is found.evaluation
    assert found.train == prompts.load("embedded")


def test_held_out_prompts_depend_on_their_text_alone(tmp_path: Path) -> None:
    words = [f"a {n}" for n in range(400)]

    def split(some: list[str], share: float) -> tuple[list[str], list[str]]:
        source = write(tmp_path, p__txt="\n".join(some)) + "/p.txt"
        found = prompts.split(source, held_out=share)
        return texts(found.train), texts(found.evaluation)

    train, shown = split(words, 0.25)
    assert sorted(train + shown) == sorted(words)
    assert not set(train) & set(shown)
    assert 70 < len(shown) < 130  # 100 expected, with a deviation of 9
    # Order stays; copies go together; more lines, another order or a larger share move nothing out.
    assert shown == [w for w in words if w in set(shown)]
    twice, shown_twice = split(words * 2, 0.25)
    assert (twice, shown_twice) == (train * 2, shown * 2)
    grown, shown_grown = split([*reversed(words), *(f"new {n}" for n in range(100))], 0.25)
    assert set(shown) <= set(shown_grown)
    assert set(train) <= set(grown)
    assert set(shown) < set(split(words, 0.5)[1])
    with pytest.raises(ValueError, match="leaves none for evaluation"):
        split(["a 0"], 1e-9)
    with pytest.raises(ValueError, match="leaves none for training"):
        split(["a 0"], 1 - 1e-9)


def test_what_evaluation_shows_is_said_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", train__txt="a\n", test__txt="b\n")
    with pytest.raises(ValueError, match="exclude each other"):
        prompts.split("signs", prompts_from="embedded", held_out=0.1)
    with pytest.raises(ValueError, match="has a split for evaluation"):
        prompts.split(folder, held_out=0.1)
    with pytest.raises(ValueError, match="0 <= held_out < 1, got 1"):
        prompts.split("signs", held_out=1)
    asked = [("eval.prompts_from", "signs"), ("eval.held_out", "0.1")]
    with pytest.raises(config.RecipeError, match="eval: prompts_from and held_out exclude"):
        config.load("embedded", asked)
    assert texts(prompts.split(folder, prompts_from="embedded").train) == ["a"]
    assert config.load("embedded", asked[1:]).eval.held_out == 0.1


def test_signs_ask_for_their_text() -> None:
    found = prompts.load("signs")
    assert len(found) == len(set(texts(found))) == len({p.metadata["text"] for p in found}) == 302
    assert all(f'"{p.metadata["text"]}"' in p.text for p in found)
    assert all(p.metadata.keys() == {"text"} for p in found)


@pytest.mark.parametrize(("count", "available"), [(4, 10), (5, 5), (7, 3), (1, 4)])
def test_every_pass_draws_every_prompt_once(count: int, available: int) -> None:
    iterations = 3 * available
    drawn = [
        i for k in range(iterations) for i in prompts.draw(count, available, seed=7, iteration=k)
    ]
    assert len(drawn) == iterations * count
    for start in range(0, len(drawn), available):
        assert sorted(drawn[start : start + available]) == list(range(available))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_prompt_is_repeated_group_size_times_over_all_ranks(world: int) -> None:
    """Flow-GRPO's repeat-k sampling, whatever the ranks: here groups of 6 span ranks of 8."""
    recipe = config.load(
        "embedded",
        [("sample.prompts_per_iteration", "4"), ("sample.group_size", "6")],
    )
    sigmas = torch.linspace(1, 0, recipe.sample.num_steps + 1)
    for iteration in range(3):
        drawn = prompts.draw(4, 12, seed=recipe.run.seed, iteration=iteration)
        asked, noise = [], []
        for rank in range(world):
            layout = Layout(recipe, sigmas, rank=rank, world=world, device=torch.device("cpu"))
            plan = layout.plan(iteration)
            asked += [drawn[p] for p in plan.prompt_G[plan.group_of_M].tolist()]
            noise += plan.sample_M.tolist()
        assert Counter(asked) == dict.fromkeys(drawn, 6)
        assert asked == [prompt for prompt in drawn for _ in range(6)]
        assert noise == list(range(24 * iteration, 24 * (iteration + 1)))
