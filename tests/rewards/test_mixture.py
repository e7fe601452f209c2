"""What a mixture does for its rewards and against them: copies, checks, numbers, no gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sfgrpo import prompts, rewards
from sfgrpo.prompts import Prompt
from sfgrpo.score import measure


def mixture(*functions: Callable[..., Any]) -> rewards.Mixture:
    """Rewards "0", "1", ... of weight 1."""
    built: Any = {str(number): function for number, function in enumerate(functions)}
    return rewards.Mixture(built, dict.fromkeys(built, 1.0), frames=2)


def mean(images: Tensor, texts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    return images.flatten(1).mean(1)


def through_torch(images: Tensor, texts: list[str], metadata: list[Any]) -> Tensor:
    images.mul_(0)
    texts.clear()
    metadata[0].pop("text")
    metadata[0]["box"].append(3)
    return torch.zeros(len(images))


def through_numpy(images: Tensor, texts: list[str], metadata: list[Any]) -> Tensor:
    images.numpy()[:] = 0
    return torch.zeros(len(images))


@pytest.mark.parametrize("ruin", [through_torch, through_numpy])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 5, 3, 4, 4), (2, 7)])
def test_what_one_reward_overwrites_the_others_do_not_see(
    ruin: Callable[..., Any], shape: tuple[int, ...]
) -> None:
    samples, entry = torch.ones(shape), {"text": "A", "box": [1, 2]}
    texts = ["a", "b"]
    for whole in (False, True):
        vars(ruin)["takes_video"] = whole
        total, _ = mixture(ruin, mean)(samples, texts, [entry, {}])
        assert total.tolist() == [1, 1]
        assert samples.eq(1).all()
        assert (entry, texts) == ({"text": "A", "box": [1, 2]}, ["a", "b"])


def test_scores_are_kept_apart_from_what_a_reward_keeps() -> None:
    kept = torch.zeros(2)

    def counting(images: Tensor, texts: list[str], metadata: list[Any]) -> Tensor:
        return kept.add_(1)

    both = mixture(counting)
    first, _ = both(torch.ones(2, 3), ["", ""], [{}, {}])
    both(torch.ones(2, 3), ["", ""], [{}, {}])
    assert first.tolist() == [1, 1]


def test_no_graph_is_kept() -> None:
    network = torch.nn.Linear(12, 1)

    def score(images: Tensor, texts: list[str], metadata: list[Any]) -> Tensor:
        result = network(images.flatten(1))[:, 0]
        assert not result.requires_grad
        with torch.enable_grad():
            assert network(images.flatten(1)).requires_grad
        return result

    total, _ = mixture(score)(torch.ones(2, 3, 2, 2, requires_grad=True), ["", ""], [{}, {}])
    assert not total.requires_grad


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2], (1.0, 2.0), np.array([1, 2]), np.array([1, 2], np.float16),
        torch.tensor([1, 2], dtype=torch.bfloat16), [torch.tensor(1), torch.tensor(2.0)],
    ],
    ids=str,
)  # fmt: skip
def test_numbers_of_any_kind(answer: Any) -> None:
    total, parts = mixture(lambda *_: answer)(torch.ones(2, 3), ["", ""], [{}, {}])
    assert total.dtype == parts["0"].dtype == torch.float32
    assert total.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "reward '0' returned NoneType, expected a tensor, an array or a list of 2 numbers"),
        ("ab", "reward '0' returned str"),
        ((torch.zeros(2), {"accuracy": 1}), "reward '0' returned tuple"),  # as in Flow-GRPO
        ([[1], [1, 2]], "reward '0' returned list"),
        (
            torch.ones(2).to_sparse(),
            r"reward '0' .*its layout is torch.sparse_coo",
        ),
        (1.0, r"reward '0' returned shape \(\) for 2 samples"),
        (np.zeros((2, 1)), r"reward '0' returned shape \(2, 1\) for 2 samples"),
    ],
)
def test_what_is_no_list_of_numbers_is_named(answer: Any, message: str) -> None:
    with pytest.raises(rewards.RewardError, match=message):
        mixture(lambda *_: answer)(torch.ones(2, 3), ["", ""], [{}, {}])


ENTRY = {"text": "7", "foreground": "red", "background": "white"}


@pytest.mark.parametrize("name", ["jpeg", "colour", "line", "ocr", "text"])
@pytest.mark.parametrize("shape", [(2, 100, 7), (2, 4, 8, 8), (2, 9)])
def test_a_reward_of_images_says_so_of_others(name: str, shape: tuple[int, ...]) -> None:
    scores = rewards.load({name: 1})
    with pytest.raises(rewards.RewardError, match=rf"'{name}' .*scores images \[B, 3, H, W\], got"):
        scores(torch.ones(shape), ["7", "7"], [ENTRY, ENTRY])


def test_a_reward_that_exits_fails_the_run() -> None:
    with pytest.raises(rewards.RewardError, match=r"reward '0' called sys.exit\(0\)"):
        mixture(lambda *_: sys.exit(0))(torch.ones(1, 3), [""], [{}])


def counts(images: Tensor, texts: list[str], metadata: list[Any]) -> Tensor:
    return torch.tensor([float(entry["count"]) for entry in metadata])


COUNTS = f"{__file__}, line {counts.__code__.co_firstlineno + 1}: KeyError: 'count'"


@pytest.mark.parametrize("shape", [(3, 3, 4, 4), (3, 5, 3, 4, 4)])
def test_a_reward_that_fails_names_itself_and_the_prompt(shape: tuple[int, ...]) -> None:
    """One without a `check` does so in the middle of a run."""
    texts, metadata, where = ["a", "b", "c"], [{"count": 1}, {}, {}], ["x, line 1", "x, line 2", ""]

    def said(**options: Any) -> str:
        with pytest.raises(rewards.RewardError) as failed:
            mixture(mean, counts)(torch.ones(shape), texts, metadata, **options)
        assert isinstance(failed.value.__cause__, KeyError)
        return str(failed.value)

    assert said(where=where) == f"x, line 2: reward '1' failed on prompt 'b': {COUNTS}"
    assert said() == f"reward '1' failed on prompt 'b': {COUNTS}"
    row, asked = torch.tensor([1]), [Prompt("a", {}), Prompt("b", {}, "x, line 2")]
    with pytest.raises(rewards.RewardError, match=r"^x, line 2: reward '0' failed on prompt 'b'"):
        measure(mixture(counts), torch.ones(1, 3), row, asked)


def test_a_reward_that_fails_on_many_at_once_says_so() -> None:
    def small(images: Tensor, texts: list[str], metadata: list[Any]) -> Tensor:
        if len(images) > 1:
            raise MemoryError("too many")
        return mean(images, texts, metadata)

    told = "'0' failed on 2 samples at once and on none alone, the first of prompt 'a': .*too many"
    with pytest.raises(rewards.RewardError, match=told):
        mixture(small)(torch.ones(2, 3), ["a", "b"], [{}, {}])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 5, 3, 4, 4), (2, 7), (2,)])
def test_a_sample_that_is_not_finite_scores_nan(value: float, shape: tuple[int, ...]) -> None:
    samples = torch.ones(shape)
    samples[1].view(-1)[-1] = value
    seen = []

    def blind(images: Tensor, texts: list[str], metadata: list[Any]) -> Tensor:
        seen.append(images)
        return torch.ones(len(images))

    total, parts = mixture(blind)(samples, ["a", "b"], [{}, {}], finite=False)
    assert total.isnan().tolist() == parts["0"].isnan().tolist() == [False, True]
    assert all(images.isfinite().all() for images in seen)
    with pytest.raises(ValueError, match="'0' is nan for prompt 'b'"):
        mixture(blind)(samples, ["a", "b"], [{}, {}])


class Checked:
    """A reward that needs a number; knows how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Tensor, texts: list[str], metadata: list[Any]) -> Tensor:
        return torch.tensor([float(entry["count"]) for entry in metadata])

    def check(self, texts: list[str], metadata: list[Any]) -> None:
        self.calls += 1
        for text, entry in zip(texts, metadata, strict=True):
            if float(entry["count"]) < 0:
                raise ValueError(f"cannot count to {entry['count']}")
            if text == "leave":
                sys.exit(0)
            entry.clear()


def test_a_bad_prompt_is_named_before_the_run(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"

    def said(*lines: str) -> str:
        path.write_text("\n".join(lines))
        with pytest.raises(ValueError) as refused:  # noqa: PT011 the caller looks at it
            mixture(mean, Checked()).check(prompts.load(str(path)))
        return str(refused.value).replace(str(path), "FILE")

    good = '{"prompt": "a", "count": 1}'
    assert said(good, good, '{"prompt": "b"}') == "FILE, line 3: reward '1': KeyError count"
    bad = '{"prompt": "b", "count": -1}'
    assert said(good, "", bad) == "FILE, line 3: reward '1': cannot count to -1"
    reward, asked = Checked(), [Prompt("a", {"count": 1}), Prompt("b", {"count": 2})]
    mixture(reward).check(asked)
    assert reward.calls == 1
    assert asked[1].metadata == {"count": 2}  # a check may overwrite what it is given, too
    with pytest.raises(ValueError, match=r"^prompt 'b': reward '0': cannot"):
        mixture(reward).check([*asked, Prompt("b", {"count": -3})])
    with pytest.raises(ValueError, match=r"^prompt 'leave': reward '0' called sys.exit\(0\)"):
        mixture(reward).check([Prompt("leave", {"count": 1})])


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("ocr", {}, "x, line 2: reward 'ocr': no metadata 'text', the character to be read"),
        ("ocr", {"text": ["7"]}, r"x, line 2: reward 'ocr': .* got \['7'\]"),
        ("colour", {"foreground": "red"}, "x, line 2: reward 'colour': no metadata 'background'"),
        ("colour", {"foreground": "mauve", "background": "red"}, "2: .*unknown colour 'mauve'"),
        ("text", {}, "x, line 2: reward 'text': prompt 'b' has no metadata 'text'"),
        ("text", {"text": "Привет"}, "x, line 2: reward 'text': .* cannot read в е и п р т of"),
        ("text", {"text": "A שלום"}, "x, line 2: reward 'text': .* cannot read ו ל ם ש of"),
    ],
)  # fmt: skip
def test_the_package_s_rewards_check(name: str, metadata: dict, message: str) -> None:
    mixed = rewards.load({name: 1.0})
    good = Prompt("a", {"text": "7", "foreground": "red", "background": "black"}, "x, line 1")
    mixed.check([good])
    with pytest.raises(ValueError, match=message):
        mixed.check([good, Prompt("b", metadata, "x, line 2")])


def test_the_text_reward_checks_the_package_s_own_prompts() -> None:
    rewards.load({"text": 1.0}).check(prompts.load("signs"))


@pytest.fixture
def strange_defaults() -> Iterator[None]:
    """Every tensor that is made without a device would have no values."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_defaults_of_torch_change_nothing(request: pytest.FixtureRequest) -> None:
    mixed = rewards.load({"colour": 0.5, "ocr": 0.5})
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    asked = prompts.load("embedded")[:3]

    def scores() -> Tensor:
        return mixed(images, [p.text for p in asked], [p.metadata for p in asked])[0]

    def numbers() -> list[Any]:
        drawn = [prompts.draw(4, 301, seed=1, iteration=k) for k in range(3)]
        return [*drawn, prompts.spread(7, 1001)]

    expected, usual = scores(), numbers()
    request.getfixturevalue("strange_defaults")
    actual = scores()
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)
    assert numbers() == usual
    torch.set_default_dtype(torch.bfloat16)
    assert numbers() == usual
