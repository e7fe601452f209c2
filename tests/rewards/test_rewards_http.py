"""The reward `http` against servers of this process: sound, failing, dead, restarted."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from sfgrpo import rewards
from sfgrpo.prompts import Prompt
from sfgrpo.remote import token
from sfgrpo.remote.wire import Limits
from sfgrpo.rewards import Calls, Mixture, RewardError
from sfgrpo.rewards.base import Unscored
from sfgrpo.serving import app
from sfgrpo.serving.device import Device
from tests.support.served import QUICK, free_port, served

IMAGES = torch.rand(23, 3, 4, 4, generator=torch.Generator().manual_seed(0))
TEXTS = [f"p{number // 4}" for number in range(23)]
METADATA = [{"text": text, "boxes": [[1, 2.5]]} for text in TEXTS]
EXPECTED = IMAGES.flatten(1).mean(1)


def mean(images: Tensor, prompts: list[str], metadata: list[Any]) -> Tensor:
    assert all(entry["text"] == text for text, entry in zip(prompts, metadata, strict=True))
    return images.flatten(1).mean(1)


def serving(reward: Any, *, name: str = "mean", secret: str | None = None, **limits: int) -> Any:
    return app.build(Device(name, reward, limits=Limits(**limits), queue=64), secret)


def asked(reward: Any) -> Tensor:
    return reward(IMAGES, TEXTS, METADATA)


def failing(share: float) -> Callable[..., Any]:
    """Scores as `mean`, of which a share is one that no client can use."""
    drawn = random.Random(0)

    def score(images: Tensor, prompts: list[str], metadata: list[Any]) -> Any:
        if drawn.random() >= share:
            return mean(images, prompts, metadata)
        if drawn.random() < 0.5:
            raise OSError("out of memory")
        return torch.zeros(len(images) + 1)

    return score


def test_scores_are_those_of_the_reward_in_process_and_in_order() -> None:
    slow = iter([0.1, 0.0, 0.05, 0.0, 0.0, 0.1] * 4)

    def late(*given: Any) -> Tensor:
        time.sleep(next(slow))
        return mean(*given)

    with served(serving(late)) as one, served(serving(late)) as two:
        reward: Any = rewards.build("http", url=[one, f"{two}/"], batch=2, **QUICK)
        for _ in range(2):
            assert torch.equal(asked(reward), EXPECTED)
        assert len(reward(IMAGES[:0], [], [])) == 0
        assert reward.retried == 0


def test_bits_of_every_kind_of_sample_arrive() -> None:
    seen = []

    def look(samples: Tensor, *_: Any) -> Tensor:
        seen.append(samples)
        return torch.zeros(len(samples))

    vars(look)["takes_video"] = True
    with served(serving(look)) as url:
        reward: Any = rewards.build("http", url=url, **QUICK)
        assert reward.takes_video
        for sample in (
            torch.rand(2, 5, 3, 4, 4),
            torch.randn(2, 7, 3),
            torch.rand(2, 3, 4, 4).half(),
        ):
            reward(sample, ["a", "b"], [{}, {}])
            assert torch.equal(seen.pop(), sample)


def test_a_third_of_the_answers_may_fail() -> None:
    with served(serving(failing(0.3))) as url:
        reward: Any = rewards.build("http", url=url, batch=1, in_flight=2, **QUICK)
        for _ in range(3):
            assert torch.equal(asked(reward), EXPECTED)
        assert reward.retried > 10


def test_a_server_that_is_restarted_loses_nothing() -> None:
    port, scores = free_port(), list[Tensor]()
    with served(serving(mean), port) as url:
        reward = rewards.build("http", url=url, batch=4, retries=10_000, backoff=0.01)
    asking = threading.Thread(target=lambda: scores.append(asked(reward)))
    asking.start()
    time.sleep(0.1)
    assert not scores
    with served(serving(mean), port):
        asking.join()
    assert torch.equal(scores[0], EXPECTED)


def test_another_reward_behind_the_same_address_is_refused() -> None:
    port = free_port()
    with served(serving(mean), port) as url:
        reward: Any = rewards.build("http", url=url, **QUICK)
    with served(serving(mean, name="other"), port):
        with pytest.raises(Unscored, match=f"{url}: scores of reward 'other'; when .*'mean'"):
            asked(reward)
        assert reward.retried == 0


def test_a_dead_server_is_left_out() -> None:
    with ExitStack() as stack:
        one = stack.enter_context(served(serving(mean)))
        with served(serving(mean)) as two:
            reward: Any = rewards.build("http", url=[two, one], batch=2, **QUICK)
        assert torch.equal(asked(reward), EXPECTED)
        assert reward.retried > 0
        with pytest.warns(UserWarning, match=f"goes on without {two}: ConnectError"):
            rewards.build("http", url=[one, two], **QUICK)


def test_what_was_scored_is_kept_where_the_rest_fails() -> None:
    def picky(images: Tensor, prompts: list[str], metadata: list[Any]) -> Tensor:
        if "p1" in prompts:
            raise OSError("not this one")
        return mean(images, prompts, metadata)

    with served(serving(picky)) as url:
        options = {"url": url, "batch": 6, **QUICK, "retries": 1}
        message = (
            f"{url} for prompt 'p1' and 1 more: status 500: reward 'mean' failed on prompt 'p1'"
        )
        with pytest.raises(Unscored, match=message) as failed:
            asked(rewards.build("http", **options))
        scores = failed.value.scores
        assert scores.isnan().nonzero().flatten().tolist() == [4, 5, 6, 7]
        assert torch.equal(scores[8:], EXPECTED[8:])
        reward = {"http/picky": rewards.build("http", **options)}
        mixed = Mixture(reward, {"http/picky": 1.0}, calls=Calls(policy="drop_group"))
        total, _ = mixed(IMAGES, TEXTS, METADATA, finite=False)
        assert torch.equal(total.nan_to_num(), scores.nan_to_num())
        assert [failure.text for failure in mixed.calls.failures] == ["p1"]
        assert mixed.calls.failures[0].message.startswith(f"reward 'http/picky': {url} for prompt")
        with pytest.raises(RewardError, match=r"^x, line 5: reward 'http/picky': http://127"):
            Mixture(reward, {"http/picky": 1.0})(
                IMAGES, TEXTS, METADATA, where=[f"x, line {row + 1}" for row in range(23)]
            )


def test_batches_are_no_larger_than_the_server_takes() -> None:
    with served(serving(mean, samples=2)) as url:
        reward: Any = rewards.build("http", url=url, batch=20, **QUICK)
        reward.check(TEXTS, METADATA)
        assert torch.equal(asked(reward), EXPECTED)


def test_several_rewards_have_labels() -> None:
    def half(*given: Any) -> Tensor:
        return mean(*given) / 2

    with served(serving(mean)) as one, served(serving(half, name="half")) as two:
        options = {"http/one": {"url": one}, "http/two": {"url": two}}
        mixed = rewards.load({"http/one": 1.0, "http/two": 2.0}, options)
        total, parts = mixed(IMAGES, TEXTS, METADATA)
        torch.testing.assert_close(total, 2 * EXPECTED)
        assert set(parts) == {"http/one", "http/two"}
        with pytest.raises(ValueError, match="serve different rewards: half, mean"):
            rewards.build("http", url=[one, two])


@pytest.mark.parametrize("name", ["http/", "http/a/b", "htp/a", "http/a b"])
def test_labels_are_words(name: str) -> None:
    with pytest.raises(ValueError, match="unknown reward"):
        rewards.build(name)


def test_the_served_reward_checks_prompts_before_the_run() -> None:
    class Checks:
        def __call__(self, *given: Any) -> Tensor:
            return mean(*given)

        def check(self, prompts: list[str], metadata: list[Any]) -> None:
            for text in prompts:
                if text == "bad":
                    raise ValueError("cannot read it")

    with served(serving(Checks())) as url:
        mixed = rewards.load({"http": 1.0}, {"http": {"url": url, **QUICK}})
        good = [Prompt(f"p{number}", {}, f"x, line {number}") for number in range(300)]
        mixed.check(good)
        with pytest.raises(ValueError, match=f"^x, line 301: .*{url}: status 422: cannot read it"):
            mixed.check([*good, Prompt("bad", {}, "x, line 301")])
        with pytest.raises(ValueError, match=r"^x, line 301: .*metadata of prompt 'c' is no JSON"):
            mixed.check([*good, Prompt("c", {"x": {1}}, "x, line 301")])


def test_a_token_is_needed_and_named_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    secret, other = "0123456789abcdef", "fedcba9876543210"
    with served(serving(mean, secret=secret)) as url:
        monkeypatch.setenv("MINE", secret)
        reward: Any = rewards.build("http", url=url, token_env="MINE", **QUICK)
        assert torch.equal(asked(reward), EXPECTED)
        monkeypatch.setenv(token.VARIABLE, other)
        reward = rewards.build("http", url=url, **QUICK)
        mixed = Mixture({"http": reward}, {"http": 1.0})
        with pytest.raises(
            ConnectionError, match=r"^reward 'http': http.*status 401: this server asks for a"
        ) as refused:
            mixed.check([Prompt("a", {}, "x, line 1")])
        with pytest.raises(Unscored, match="status 401") as failed:
            asked(reward)
        assert not {secret, other} & {*str(refused.value).split(), *str(failed.value).split()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"url": "http://127.0.0.1:9"},
            "reward 'http': no server answers: http://127.0.0.1:9: Conn",
        ),
        ({"url": "127.0.0.1"}, "reward 'http': url '127.0.0.1' must be like"),
        ({"url": []}, "reward 'http': url: needs at least one server"),
        ({"url": "http://x", "images": "gif"}, "images must be one of .* got 'gif'"),
        ({"url": "http://x", "batch": 0}, "batch must be at least 1"),
        ({"url": "http://x", "timeout": -1}, "reward 'http': timeout must be seconds above 0"),
        ({}, "missing a required argument: 'url'"),
    ],
)
def test_what_is_wrong_is_said_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rewards.build("http", **options)


def test_another_server_is_not_taken_for_one() -> None:
    async def other(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b'{"status": "ok"}'})

    with (
        served(other) as url,
        pytest.raises(ValueError, match="no server of `sfgrpo serve-reward`"),
    ):
        rewards.build("http", url=url)
