"""Where weights are, what is read of a file of them, and what doctor is told of absent ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sfgrpo import rewards
from sfgrpo.rewards import _weights
from sfgrpo.rewards._weights import Missing, Place

STATE = {"a": torch.arange(3.0), "b.c": torch.ones(2, 2)}


class Opens:
    """Unpickled, it makes a file: what a stranger's weights could do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["safetensors", "plain", "wrapped"])
def test_a_file_of_weights_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("it.safetensors" if kind == "safetensors" else "it.pt")
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE if kind == "plain" else {"epoch": 3, "state_dict": STATE}, path)
    found = _weights.read("it", str(path))
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], STATE[name]) for name in STATE)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    path, trace = tmp_path / "it.pth", tmp_path / "trace"
    torch.save({"state_dict": STATE, "hook": Opens(trace)}, path)
    with pytest.raises(ValueError, match=r"reward 'it': '.*it\.pth' is no pickle of tensors alone"):
        _weights.read("it", str(path))
    assert not trace.exists()


def test_what_is_no_file_of_weights_is_named(tmp_path: Path) -> None:
    for name in ("it.safetensors", "it.pt"):
        (tmp_path / name).write_text("nothing of the kind")
        with pytest.raises(ValueError, match=f"reward 'it': '.*{name}'"):
            _weights.read("it", str(tmp_path / name))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="is no state dict"):
        _weights.read("it", str(tmp_path / "list.pt"))
    with pytest.raises(OSError, match=r"no file '/nowhere\.pt', nor is it 'owner/name/file'"):
        _weights.read("it", "/nowhere.pt")


def test_a_reward_whose_weights_are_not_here_is_named_in_one_line(tmp_path: Path) -> None:
    for name in ("clipscore", "clipscore/second"):
        with pytest.raises(
            OSError, match=f"^reward '{name}': model '.*gone' does not exist: .+$"
        ) as said:
            rewards.build(name, model=str(tmp_path / "gone"))
        assert "\n" not in str(said.value)


def test_a_state_that_does_not_fit_names_the_entry() -> None:
    network = torch.nn.Linear(2, 3)
    state = network.state_dict()
    _weights.fit("it", "there", network, state)
    for wrong in ({"weight": state["weight"]}, {**state, "bias": torch.ones(4)}):
        with pytest.raises(ValueError, match=r"'there' does not fit: 'bias' should be .* \(3,\)"):
            _weights.fit("it", "there", network, wrong)
    with pytest.raises(ValueError, match="'more' should be of shape None, is"):
        _weights.fit("it", "there", network, {**state, "more": torch.ones(1)})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", ("owner/name", "")),
        ("owner/name/a.pt", ("owner/name", "a.pt")),
        ("owner/name/folder/a.pt", ("owner/name", "folder/a.pt")),
        ("folder/a.pt", (None, "")),
        ("/owner/name", (None, "")),
        ("./owner/name", (None, "")),
        ("~/owner", (None, "")),
        ("owner", (None, "")),
    ],
)
def test_what_a_source_names(source: str, expected: tuple[str | None, str]) -> None:
    assert _weights.split(source) == expected


def test_absent_weights_are_found_without_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "tokenizer_config.json").write_text("{}")
    options = {"model": str(tmp_path / "settings"), "processor": str(tmp_path / "settings")}
    found = _weights.missing("pickscore", options)
    assert found == [Missing("model", options["model"], "has no safetensors", False)]
    found = _weights.missing("pickscore", {"processor": str(tmp_path / "nothing")})
    assert found == [
        Missing("model", "yuvalkirstain/PickScore_v1", "is not in the hub's cache here", True),
        Missing("processor", str(tmp_path / "nothing"), "does not exist", False),
    ]
    snapshot = tmp_path / "models--yuvalkirstain--PickScore_v1" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    assert _weights.missing("pickscore", {"processor": str(tmp_path / "settings")}) == []
    assert _weights.missing("colour", {}) == []


def test_a_place_is_checked() -> None:
    assert Place.of("it", device="cpu", dtype="bf16", batch=3).dtype == torch.bfloat16
    assert [*Place.of("it", device="auto", dtype="fp32", batch=3).batches(7)] == [
        slice(0, 3), slice(3, 6), slice(6, 9),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"reward 'it': device must be 'auto', .* got 'gpu'"):
        Place.of("it", device="gpu", dtype="fp32", batch=1)


def test_every_reward_says_what_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the types of its options alone; those that are None stand for another's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    given = {"vlm_local": {"model": "owner/name"}, "clipscore": {"processor": "owner/name"}}
    found = {
        name: [it.option for it in _weights.missing(name, given.get(name, {}))]
        for name in ("aesthetic", "clipscore", "geneval", "hpsv2", "hpsv3", "imagereward", "jpeg",
                     "pickscore", "similarity", "videoalign", "vlm_local")
    }  # fmt: skip
    assert found == {
        "aesthetic": ["model", "head"],
        "clipscore": ["model", "processor"],
        "geneval": ["detector", "clip"],
        "hpsv2": ["model", "processor"],
        "hpsv3": ["model", "base"],
        "imagereward": ["model", "tokenizer"],
        "jpeg": [],
        "pickscore": ["model", "processor"],
        "similarity": ["model"],
        "videoalign": ["model", "settings", "base"],
        "vlm_local": ["model"],
    }
