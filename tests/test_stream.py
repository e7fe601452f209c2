"""Calls in a thread of their own: their order, how far they run behind, and their exceptions."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable

import pytest
import torch

from sfgrpo.stream import InOrder


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_answers_come_in_the_order_of_the_questions(ahead: int) -> None:
    made: list[int] = []

    def slower_first(k: int) -> Callable[[], int]:
        def call() -> int:
            time.sleep(0.01 * (3 - k % 3))
            made.append(k)
            return k * k

        return call

    with InOrder[int](ahead) as asked:
        for k in range(7):
            asked.ask(slower_first(k))
        assert asked.answers() == [k * k for k in range(7)]
    assert made == list(range(7))
    assert (asked.computed > 0.1) == (ahead > 0)


def test_no_more_wait_than_may() -> None:
    """With two of them unanswered a third question waits for the first answer."""
    going, began = threading.Event(), []

    def call() -> None:
        began.append(threading.current_thread().name)
        going.wait(5)

    with InOrder[None](2) as asked:
        asked.ask(call)
        asked.ask(call)
        third = threading.Thread(target=asked.ask, args=(call,))
        third.start()
        third.join(0.2)
        assert third.is_alive()
        assert len(began) == 1  # one after the other
        going.set()
        third.join(5)
        assert len(asked.answers()) == 3
    assert {name.split("_")[0] for name in began} == {"rewards"}


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_exception_is_the_main_threads(ahead: int) -> None:
    made: list[str] = []

    def fails() -> None:
        made.append("fails")
        raise ZeroDivisionError("prompt 'a red seven'")

    def ask_five(asked: InOrder[None]) -> None:
        for _ in range(5):
            asked.ask(fails)
        asked.answers()

    with InOrder[None](ahead) as asked:
        with pytest.raises(ZeroDivisionError, match="a red seven") as caught:
            ask_five(asked)
        assert "in fails" in "".join(traceback.format_exception(caught.value))
    assert len(made) <= 1 + ahead


def test_what_has_not_begun_when_the_main_thread_fails_is_not_made() -> None:
    made: list[int] = []

    def call() -> None:
        time.sleep(0.05)
        made.append(len(made))

    def stopped() -> None:
        with InOrder[None](9) as asked:
            for _ in range(9):
                asked.ask(call)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    done = list(made)
    time.sleep(0.12)
    assert made == done  # nothing runs on behind the context
    assert len(done) < 9


@pytest.mark.parametrize("ahead", [0, 1])
def test_gradients_are_not_recorded(ahead: int) -> None:
    x = torch.ones(1, requires_grad=True)
    with InOrder[torch.Tensor](ahead) as asked:
        asked.ask(lambda: 2 * x)
        assert not asked.answers()[0].requires_grad
    assert torch.is_grad_enabled()
