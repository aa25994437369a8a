"""How fast and in which order calls leave: arithmetic with a clock of the test's own."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyprompt.backends._openai_faults import Allowance
from proxyprompt.backends._openai_order import SHARED, Order
from proxyprompt.backends._openai_pace import Pace
from proxyprompt.backends.base import Message

NOTHING = Allowance()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_it_doubles_until_the_first_refusal(clock: Clock) -> None:
    pace = Pace(64, clock=clock)
    limits = []
    for _ in range(4):
        limits.append(pace.limit)
        for _ in range(pace.limit):
            pace.succeeded(NOTHING)
    assert limits == [4, 8, 16, 32]
    assert Pace(2).limit == 2


def test_clean_rounds_grow_and_overload_cuts_once_per_episode(clock: Clock) -> None:
    pace = Pace(10, clock=clock)
    for _ in range(100):
        pace.succeeded(NOTHING)
    assert pace.limit == 10
    sent = [clock.now] * 3
    clock.now += 1
    for at in sent:
        pace.overloaded(at, None)
    assert pace.limit == 7  # 70 %, once for all three
    for _ in range(7 + 8 - 1):
        pace.succeeded(NOTHING)
    assert pace.limit == 8
    pace.succeeded(NOTHING)
    assert pace.limit == 9
    for _ in range(20):
        clock.now += 1
        pace.overloaded(clock.now, None)
    assert pace.limit == 1
    for _ in range(1000):
        pace.succeeded(NOTHING)
    assert pace.limit == 10


def test_a_pause_holds_everything_back(clock: Clock) -> None:
    pace = Pace(10, clock=clock)
    pace.overloaded(clock.now, 5.0)
    assert pace.delay() == 5.0
    clock.now += 5
    assert pace.delay() == 0
    pace.overloaded(clock.now, 10_000.0)
    assert pace.delay() == 60.0


def test_what_the_server_says_is_left(clock: Clock) -> None:
    pace = Pace(50, clock=clock)
    for _ in range(2000):
        pace.succeeded(NOTHING)
    assert pace.limit == 50
    pace.succeeded(Allowance(requests=3, requests_reset=10.0))
    assert pace.limit == 3
    pace.take(1)
    assert pace.limit == 2
    clock.now += 10
    assert pace.limit == 50
    pace.succeeded(Allowance(requests=9, requests_reset=10.0, tokens=0, tokens_reset=7.0))
    assert pace.delay() == 7.0


@given(
    rpm=st.integers(1, 600),
    tpm=st.integers(1_000, 100_000),
    sizes=st.lists(st.integers(1, 5_000), min_size=1, max_size=200),
)
def test_no_minute_has_more_than_allowed(rpm: int, tpm: int, sizes: list[int]) -> None:
    clock = Clock()
    pace = Pace(64, rpm=rpm, tpm=tpm, clock=clock)
    sent: list[tuple[float, int]] = []
    for size in sizes:
        clock.now += pace.delay()
        assert pace.delay() <= 1e-6
        pace.take(size)
        sent.append((clock.now, size))
    for start, _ in sent:
        window = [(at, size) for at, size in sent if start <= at < start + 60 - 1e-6]
        assert len(window) <= rpm
        # The last of the window is paid for after it.
        assert sum(size for _, size in window[:-1]) <= tpm + 1e-6


def test_estimates_are_corrected(clock: Clock) -> None:
    pace = Pace(4, tpm=600, clock=clock)
    pace.take(100)
    assert pace.delay() == pytest.approx(10)
    pace.correct(-40)
    assert pace.delay() == pytest.approx(6)


# --- order --------------------------------------------------------------------------------------------


def drain(order: Order) -> list[int]:
    """All indices, each answered before the next is taken."""
    taken = []
    while (index := order.take()) is not None:
        taken.append(index)
        order.done(index)
    assert not order
    return taken


def test_short_prompts_keep_their_order() -> None:
    order = Order(["b", "a", "c", "a"])
    assert [order.take() for _ in range(4)] == [0, 1, 2, 3]
    assert order.cache_key(0) is None
    assert order.take() is None


def test_a_group_waits_for_its_first() -> None:
    one, two = "x" * SHARED, "y" * SHARED
    prompts = [one + "1", two + "1", one + "2", two + "2", one + "3", "short"]
    order = Order(prompts)
    assert [order.take(), order.take(), order.take(), order.take()] == [0, 1, 5, None]
    assert order
    order.done(1)
    assert [order.take(), order.take()] == [3, None]
    order.done(0)
    assert [order.take(), order.take()] == [2, 4]
    assert not order
    keys = [order.cache_key(index) for index in range(6)]
    assert keys[0] == keys[2] == keys[4] != keys[1] == keys[3]
    assert keys[5] is None
    assert all(len(key) <= 64 for key in keys if key)


def test_coalitions_that_share_less_are_groups_of_their_own() -> None:
    head = "x" * SHARED
    prompts = [head + middle * 4000 + query for middle in "ab" for query in "123"]
    mixed = random.Random(0).sample(range(6), 6)
    order = Order([prompts[k] for k in mixed])
    taken = [mixed[k] for k in drain(order)]
    assert {k // 3 for k in taken[:3]} in ({0}, {1})
    assert {k // 3 for k in taken[3:]} in ({0}, {1})


def test_chat_turns_are_grouped_too() -> None:
    shots = (Message("system", "s" * SHARED), Message("user", "q"), Message("assistant", "a"))
    order = Order([(*shots, Message("user", str(k))) for k in range(3)])
    assert [order.take(), order.take()] == [0, None]


@given(st.lists(st.text("ab", max_size=6), max_size=30))
def test_everything_is_handed_out_once(prompts: list[str]) -> None:
    assert sorted(drain(Order(prompts, least=2))) == list(range(len(prompts)))
