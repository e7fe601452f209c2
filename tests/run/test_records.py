"""A run's folder: nobody else's files are touched, and no run goes on from another's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sfgrpo import config, files
from sfgrpo.run import checkpoints, records
from sfgrpo.run.checkpoints import CheckpointError, Checkpoints, State
from sfgrpo.run.records import RunError
from sfgrpo.sections import Deepspeed

EMBEDDED = config.load("embedded")
OTHER = config.load("embedded", [("run.seed", "7")])
LONGER = config.load("embedded", [("run.iterations", "90"), ("checkpoint.keep", "9")])


def log(folder: Path, *iterations: int) -> None:
    lines = "".join(json.dumps({"iteration": k}) + "\n" for k in iterations)
    (folder / "metrics.jsonl").write_text(lines)


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["metrics.jsonl", "images", "checkpoints", "tensorboard"])
def test_a_folder_that_holds_no_run_is_left_alone(tmp_path: Path, name: str, fresh: bool) -> None:
    place = tmp_path / name
    if "." in name:
        place.write_text("mine")
    else:
        (place / "inner").mkdir(parents=True)
    before = tree(tmp_path)
    with pytest.raises(RunError, match=f"holds {name} but no recipe.yaml"):
        records.prepare(tmp_path, EMBEDDED, fresh=fresh)
    assert tree(tmp_path) == before


def test_fresh_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    records.prepare(run, EMBEDDED, fresh=False)
    (run / "checkpoints").symlink_to(disk, target_is_directory=True)
    for name in (
        "000010",
        "best",
        "writing-000020",
        "damaged-000010-2",
        "000010_good",
        "20",
        "mine",
    ):
        (disk / name).mkdir(parents=True)
    for name in ("images/000010.png", "images/prompts.txt", "images/cat.png", "notes.txt"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("")
    log(run, 1)
    records.prepare(run, OTHER, fresh=True)
    assert {path.name for path in disk.iterdir()} == {"000010_good", "20", "mine"}
    assert tree(run) == {"checkpoints", "images", "images/cat.png", "notes.txt", "recipe.yaml"}
    assert yaml.safe_load((run / "recipe.yaml").read_text())["run"]["seed"] == 7


def test_a_run_that_finished_no_iteration_gives_way(tmp_path: Path) -> None:
    records.prepare(tmp_path, EMBEDDED, fresh=False)
    records.prepare(tmp_path, OTHER, fresh=False)
    log(tmp_path, 1)
    with pytest.raises(RunError, match=r"another recipe \(run.seed: 7 there, 0 here\)"):
        records.prepare(tmp_path, EMBEDDED, fresh=False)


def test_a_key_of_a_later_version_orphans_no_run(tmp_path: Path) -> None:
    records.prepare(tmp_path, EMBEDDED, fresh=False)
    log(tmp_path, 1)
    described = tmp_path / "recipe.yaml"
    old = yaml.safe_load(described.read_text())
    del old["credit"]["options"], old["reward_frames"]
    described.write_text(yaml.safe_dump(old))
    records.prepare(tmp_path, LONGER, fresh=False)
    old["gone"] = 1
    described.write_text(yaml.safe_dump(old))
    with pytest.raises(RunError, match=r"gone: 1 there, None here"):
        records.prepare(tmp_path, EMBEDDED, fresh=False)
    for text, message in (("[", "cannot be read"), ("- 1", "is no recipe: it holds list")):
        described.write_text(text)
        with pytest.raises(RunError, match=message):
            records.prepare(tmp_path, EMBEDDED, fresh=False)


def test_the_identity_of_a_recipe_is_what_decides_the_run() -> None:
    assert records.identity(EMBEDDED) == records.identity(LONGER) != records.identity(OTHER)


def test_a_run_may_go_on_at_another_stage() -> None:
    """Also one of a version that told them apart, by this hash."""
    made = [config.Recipe(deepspeed=Deepspeed(zero_stage=stage)) for stage in (0, 2, 3)]
    same, former = {records.identity(recipe) for recipe in made}, b'[["deepspeed.zero_stage", 2]]'
    assert len(same) == 1
    for recipe in made:
        assert {*same, hashlib.sha256(former).hexdigest()} <= records.identities(recipe)
    assert not records.identities(OTHER) & records.identities(EMBEDDED)


def test_a_run_may_go_on_with_other_servers(tmp_path: Path) -> None:
    def made(**options: Any) -> config.Recipe:
        named = {"http/a": {"url": "http://a:1", **options}, "colour": {"scale": 0.2}}
        pairs = [("reward", "{http/a: 1, colour: 1}"), ("reward_options", json.dumps(named))]
        return config.load("embedded", pairs)

    records.prepare(tmp_path, made(), fresh=False)
    log(tmp_path, 1)
    elsewhere = made(url=["http://b:1", "http://c:1"], retries=2, token_file="t", in_flight=9)
    records.prepare(tmp_path, elsewhere, fresh=False)
    assert records.identity(elsewhere) == records.identity(made())
    otherwise = made(images="png")
    assert records.identity(otherwise) != records.identity(made())
    with pytest.raises(RunError, match=r"reward_options.http/a.images: None there, 'png' here"):
        records.prepare(tmp_path, otherwise, fresh=False)


def test_logs_without_their_checkpoints_are_not_started_over(tmp_path: Path) -> None:
    log(tmp_path, *range(1, 11))
    records.check_logs(tmp_path, None, every=10)  # killed before the first was written
    log(tmp_path, *range(1, 12))
    with pytest.raises(RunError, match="logs of 11 iterations but no checkpoint"):
        records.check_logs(tmp_path, None, every=10)
    records.check_logs(tmp_path, 10, every=10)
    log(tmp_path, 1, 2, 5, 6, 11)
    with pytest.warns(UserWarning, match=r"lacks 6 of the 10 iterations .*\(3, 4, 7, 8, 9, ...\)"):
        records.check_logs(tmp_path, 10, every=10)


def test_only_ours_is_a_checkpoint(tmp_path: Path) -> None:
    for name in ("000010", "000020_good", "0000030", "20", "999999", "1000000", "2024-01-15"):
        (tmp_path / name).mkdir()
    (tmp_path / "000040").write_text("a file")
    (tmp_path / "000050").symlink_to(tmp_path / "000010", target_is_directory=True)
    for name in ("writing-000060", "removing-best", "writing-notes", "removing-old"):
        (tmp_path / name).mkdir()
    kept = Checkpoints(tmp_path, 2)
    assert [path.name for path in kept.saved()] == ["000010", "999999", "1000000"]
    kept.clean()
    there = {path.name for path in tmp_path.iterdir()}
    assert {"writing-notes", "removing-old", "000020_good", "000050"} <= there
    assert not {"writing-000060", "removing-best"} & there
    kept.save(State(iteration=1_000_001), lambda folder: None, lambda: None)
    assert [path.name for path in kept.saved()] == ["1000000", "1000001"]
    assert (tmp_path / "000020_good").is_dir()


def test_what_is_half_written_is_told_by_its_exact_name(tmp_path: Path) -> None:
    for name in ("writing-0123abcd-x.png", "writing-mine.txt"):
        (tmp_path / name).write_text("")
    files.clean(tmp_path)
    assert tree(tmp_path) == {"writing-mine.txt"}


def test_a_checkpoint_of_another_recipe_or_other_prompts_is_refused() -> None:
    state = State(recipe="a", prompts="p", served={"http": "r"})
    same: dict[str, Any] = {"zero_stage": 0, "recipe": {"a", "b"}, "prompts": "p"}
    same["served"] = {"http": "r"}
    assert checkpoints.refusal(state, **same) is None
    assert checkpoints.refusal(State(), **same) is None
    others: list[tuple[dict[str, Any], str]] = [
        ({"recipe": {"b"}}, "another recipe"),
        ({"prompts": "q"}, "prompts have"),
        ({"served": {"http": "s"}}, "reward 'http' served 'r' when it was written, and serves 's'"),
    ]
    for given, message in others:
        assert message in str(checkpoints.refusal(state, **(same | given)))


def test_a_state_of_a_later_version_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"iteration": 3, "moon": 1}')
    with pytest.raises(CheckpointError, match="has the key 'moon'"):
        checkpoints.load_state(tmp_path)
    (tmp_path / "state.json").write_text("[")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.load_state(tmp_path)
