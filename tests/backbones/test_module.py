"""What a network of one's own gets wrong is said before a run, and not by a traceback within it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfgrpo.backbones import ModuleBackbone
from sfgrpo.prompts import Prompt
from tests.support.reaching import ACTIONS, JOINTS, Policy


def wrapped(network: type[Policy] = Policy, **given: Any) -> ModuleBackbone:
    """A backbone of `network`, whose prompts are numbers in brackets unless `given` says else."""

    def goals(prompts: Sequence[str]) -> Tensor:
        return torch.tensor([json.loads(prompt) for prompt in prompts])

    return ModuleBackbone(network(), **{"shape": (ACTIONS, JOINTS), "encode": goals, **given})


class Flat(Policy):
    def forward(self, x: Tensor, t: Tensor, goal: Tensor) -> Tensor:
        return super().forward(x, t, goal).flatten(1)


GOALS = [Prompt("[1, 0]", {}, "goals.txt, line 1"), Prompt("[0, 1]", {}, "goals.txt, line 2")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"encode": lambda prompts: torch.zeros(2 * len(prompts), 2)},
            r"goals.txt, line 1: model.backbone: encode returned a tensor \[2, 2\], expected \[1,",
        ),
        ({"encode": lambda prompts: list(prompts)}, "encode returned a list, expected a tensor"),
        (
            {"encode": lambda prompts: {}["goal"]},
            "line 1: model.backbone: encode failed: .*test_module.py, line .*: KeyError: 'g",
        ),
        (
            {"shape": (5, JOINTS)},
            r"the network failed on x \[2, 5, 2\], t \[2\] and a condition \[2, 2\]: .*reaching.py",
        ),
        ({"network": Flat}, r"the network returned a tensor \[2, 8\], expected \[2, 4, 2\]"),
        ({"decode": lambda x: x[:1]}, r"decode returned a tensor \[1, 4, 2\], expected \[2, ...\]"),
        ({"modality": "image"}, r"decode returned a tensor \[2, 4, 2\], expected \[2, 3, _, _\]"),
    ],
)
def test_what_does_not_fit_is_said_before_a_run(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapped(**given).check(GOALS)


def test_a_schedule_of_other_steps_is_refused() -> None:
    wrong = wrapped(sigmas=lambda steps: torch.linspace(1, 0, steps))
    with pytest.raises(ValueError, match=r"sigmas returned a tensor \[4\], expected \[5\]"):
        wrong.sigmas(4, (ACTIONS, JOINTS))


def test_a_prompt_that_cannot_be_encoded_is_named() -> None:
    """Also one that is wrong beside others alone, behind the first batch."""
    many = [Prompt("[0, 1]", {}, f"goals.txt, line {n}") for n in range(1, 101)]
    for text, message in (
        (
            "[0, 1",
            "goals.txt, line 90: model.backbone: encode failed: .*test_module.py.*: JSONDecode",
        ),
        (
            "[3]",
            r"line 90: .* a condition of shape \(1,\) of it, and of shape \(2,\) of goals.txt, l",
        ),
    ):
        many[89] = Prompt(text, {}, "goals.txt, line 90")
        with pytest.raises(ValueError, match=message):
            wrapped().check(many)


def test_the_look_at_prompts_changes_nothing() -> None:
    class Counts(Policy):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(ACTIONS)

        def forward(self, x: Tensor, t: Tensor, goal: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(self.norm(x)), t, goal)

    backbone = wrapped(Counts)
    norm = backbone.transformer.get_submodule("norm").eval()
    before, drawn = copy.deepcopy(backbone.transformer.state_dict()), torch.get_rng_state()
    backbone.check(GOALS)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert backbone.transformer.training
    assert not norm.training
    for name, value in backbone.transformer.state_dict().items():
        assert torch.equal(value, before[name]), name
