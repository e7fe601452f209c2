"""Options of a recipe that have not the type their function is annotated to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from sfgrpo.names import REWARD
from sfgrpo.option_types import misfit


def mine(
    flag: bool, count: int, share: float | None, url: str | Sequence[str], way: Literal["a", "b"],
    more: Mapping[str, Any], any_: Any, file: Path, sloppy: int = None, *rest: int,  # type: ignore # noqa: RUF013
) -> None: ...  # fmt: skip


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"flag": "False"}, "option 'flag' must be true or false, got text: 'False'"),
        ({"flag": False, "count": "95"}, "option 'count' must be a whole number, got text: '95'"),
        ({"count": True}, "option 'count' must be a whole number, got true or false: True"),
        ({"share": "1e-3"}, "option 'share' must be a number or null, got text: '1e-3'"),
        ({"url": 5}, "option 'url' must be text or a list, got a whole number: 5"),
        ({"way": 1}, "option 'way' must be text, got a whole number: 1"),
        ({"more": [1]}, "option 'more' must be a mapping, got a list: [1]"),
        ({"flag": True, "count": 3, "share": 1, "url": ("a",), "way": "c", "more": {}}, None),
        ({"share": None, "url": "a", "any_": "x", "file": 3, "sloppy": None, "other": 1}, None),
    ],
)
def test_types_that_a_recipe_knows(options: dict[str, Any], wrong: str | None) -> None:
    assert misfit(mine, options) == wrong


def test_annotations_that_cannot_be_read_are_left_alone() -> None:
    def vague(x: NotImported) -> None: ...  # type: ignore # noqa: F821

    assert misfit(vague, {"x": 1}) is None
    assert misfit(type("Own", (), {"__init__": mine}), {"count": "3"}) is not None


def test_an_option_is_refused_by_its_key() -> None:
    with pytest.raises(ValueError, match=r"^reward 'text': option 'anywhere' .*reward_options$"):
        REWARD.bind("text", {"anywhere": "no"})
