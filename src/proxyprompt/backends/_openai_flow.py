"""Many calls in flight, blocks out of an iterator: the seam between the caller's thread and the connection's loop."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import chain
from typing import Any, TypeVar

from proxyprompt.errors import BackendError

from ._openai_asking import failed
from ._openai_batch import Batches
from ._openai_connection import Call, Connection, UnsentError
from ._openai_order import Order, flat
from ._openai_wire import Endpoint
from .base import (
    GenerateRequest,
    GenerateResult,
    OnSend,
    OnTokens,
    ScoreRequest,
    ScoreResult,
    announce_soon,
    announce_unsent,
    may_leave,
)

_Request = TypeVar("_Request", ScoreRequest, GenerateRequest)
_Result = TypeVar("_Result", ScoreResult, GenerateResult)

_DRAIN = 30.0
"""Seconds that calls in flight are waited for after an interruption: they are paid."""

_FIRST_TRIES = 3
"""Requests that are asked at once before a batch is sent to a server that has not answered yet."""


def _reserve(width: int) -> int:
    """Calls marked ahead of their turn, so that a free place is taken at once and not after the disk.

    What comes back while a mark waits for the disk, which takes one flush to two: at 100 ms an answer and 6 ms a flush
    an eighth of the calls in flight at most, and more where answers come in bursts, as they do at first.
    """
    return max(1, width // 4)


class Flow:
    """Sends what a batch holds, as fast as the server bears, and hands out what comes back.

    Parameters
    ----------
    connection : Connection
    note : callable
        Told of the results of each block; an error that it gives ends the batch after the block.
    roomy : callable
        Whether a call that is announced now is announced with room for reasoning.
    """

    def __init__(
        self,
        connection: Connection,
        note: Callable[[Iterator[ScoreResult | GenerateResult]], BackendError | None],
        roomy: Callable[[ScoreRequest | GenerateRequest], bool] = lambda request: False,
    ) -> None:
        self._connection = connection
        self._pace = connection.pace
        self._note = note
        self._lock = threading.Lock()
        self._flying = 0  # over all batches that callers' threads have under way
        self._roomy = roomy
        self.at_once = False
        """Whether a request is asked at once now, at the full price, although the rest goes in batches."""

    def blocks(
        self,
        requests: Sequence[_Request],
        work: Callable[[_Request, Call, str | None], Coroutine[Any, Any, _Result]],
        known: Callable[[_Request], bool],
        on_send: OnSend | None,
        on_tokens: OnTokens | None,
    ) -> Iterator[Sequence[tuple[int, _Result]]]:
        """Keep calls in flight, yield what has finished; nothing new is sent while the caller writes a block down."""
        if not requests:
            return
        self._connection.open()
        order = _Turns(Order([request.prompt for request in requests]), lambda k: self._roomy(requests[k]))
        flying: dict[Future[_Result], tuple[int, Call]] = {}
        unsent: list[int] = []
        stopped = threading.Event()
        stop: BaseException | None = None
        drain_until = math.inf
        try:
            while (order and stop is None) or flying:
                try:
                    if stop is None:
                        self._top_up(requests, order, flying, known, work, on_send, stopped, unsent)
                    done = self._finished(flying, stop is None and bool(order), drain_until)
                except (Exception, KeyboardInterrupt) as error:
                    if stop is not None:
                        raise
                    # What is in flight is paid: deliver it, then raise.
                    stop, drain_until = error, time.monotonic() + _DRAIN
                    stopped.set()
                    continue
                block: list[tuple[int, _Result]] = []
                for future in done:
                    index, call = flying.pop(future)
                    order.done(index)
                    try:
                        block.append((index, future.result()))
                    except UnsentError:
                        unsent.append(index)
                    except Exception as error:
                        stop = stop or error
                        stopped.set()
                        if call.settled:
                            # Refused, and so not spent; otherwise it is left to count as spent.
                            reason = self._connection.clean(getattr(error, "message", str(error)))
                            block.append((index, failed(requests[index], reason, call)))
                if block:
                    stop = stop or self._note(result for _, result in block)
                    if on_tokens is not None:
                        on_tokens(sum(r.usage.prompt_tokens + r.usage.completion_tokens for _, r in block))
                    if stop is None:
                        self._look_ahead(requests, order, len(flying), known, on_send)
                    yield sorted(block, key=lambda pair: pair[0])
                if not done and time.monotonic() >= drain_until:
                    break
            if stop is not None:
                raise stop
        finally:
            stopped.set()
            for future in flying:
                future.cancel()
            announce_unsent(on_send, unsent)

    def batched(
        self,
        requests: Sequence[_Request],
        work: Callable[[_Request, Call, str | None], Coroutine[Any, Any, _Result]],
        known: Callable[[_Request], bool],
        on_send: OnSend | None,
        on_tokens: OnTokens | None,
        make: Callable[[OnSend], Batches[_Request, _Result]],
        endpoint: Callable[[_Request], Endpoint],
    ) -> Iterator[Sequence[tuple[int, _Result]]]:
        """Collect what is under way, ask one request at once to know the server, send the rest as batches."""
        if not requests:
            return
        self._connection.open()
        announce = on_send if on_send is not None else nobody
        batches = make(announce)
        covered = batches.resume()
        left = [index for index in range(len(requests)) if index not in covered]
        tries: Counter[Endpoint] = Counter()
        for index in list(left):
            place = endpoint(requests[index])
            if known(requests[index]) or tries[place] >= _FIRST_TRIES:
                continue
            tries[place] += 1
            left.remove(index)
            tell = _renamed(announce, index)
            self.at_once = True
            try:
                for block in self.blocks([requests[index]], work, known, tell, on_tokens):
                    yield [(index, result) for _, result in block]
            finally:
                self.at_once = False
        if strange := [index for index in left if not known(requests[index])]:
            raise BackendError(
                f"{self._connection.model!r} at {self._connection.public_url} gave no usable answer to "
                f"{_FIRST_TRIES} requests; the batch of {len(strange)} was not sent."
            )
        for results in chain(batches.send(left), batches.collect()):
            stop = self._note(result for _, result in results)
            if on_tokens is not None:
                on_tokens(sum(r.usage.prompt_tokens + r.usage.completion_tokens for _, r in results))
            yield sorted(results, key=lambda pair: pair[0])
            if stop is not None:
                raise stop

    def _top_up(
        self,
        requests: Sequence[_Request],
        order: _Turns,
        flying: dict[Future[_Result], tuple[int, Call]],
        known: Callable[[_Request], bool],
        work: Callable[[_Request, Call, str | None], Coroutine[Any, Any, _Result]],
        on_send: OnSend | None,
        stopped: threading.Event,
        unsent: list[int],
    ) -> None:
        """Send as many more requests as may leave now: first what the disk need not be waited for, then the rest.

        ``unsent``: announced, and then did not leave.
        """
        leaving: list[tuple[int, int]] = []
        while (index := order.peek()) is not None and self._pace.delay() <= 0:
            width = self._pace.limit if known(requests[index]) else 1
            with self._lock:
                # Its own results that the caller has not taken count too: they are not durable yet.
                if max(self._flying, len(flying) + len(leaving)) >= width:
                    break
                self._flying += 1
            order.settle(1)
            order.take()
            expected = len(flat(requests[index].prompt)) // 3 + 1
            self._pace.take(expected)
            leaving.append((index, expected))
        if not leaving:
            return
        announce = on_send if on_send is not None else nobody
        at_once = [one for one in leaving if may_leave(on_send, one[0])]
        rest = [one for one in leaving if one not in at_once]
        staying = len(leaving)
        try:
            for group in filter(None, (at_once, rest)):
                if group is rest:
                    self._look_ahead(requests, order, len(flying) + len(rest), known, on_send)
                announce([index for index, _ in group])
                unsent.extend(index for index, _ in group)
                for index, expected in group:
                    unsent.remove(index)
                    call = Call(_announcer(announce, index), stopped, expected, roomy=order.roomy[index])
                    future = self._connection.submit(work(requests[index], call, order.cache_key(index)))
                    future.add_done_callback(lambda _: self._landed(1))
                    flying[future] = (index, call)
                    staying -= 1
        finally:
            self._landed(staying)

    def _look_ahead(
        self,
        requests: Sequence[_Request],
        order: _Turns,
        taken: int,
        known: Callable[[_Request], bool],
        on_send: OnSend | None,
    ) -> None:
        """Say what leaves next: what fills the free places, and a reserve."""
        index = order.peek()
        if index is None or not known(requests[index]):
            return
        width = self._pace.limit
        announce_soon(on_send, order.settle(max(0, width - taken) + _reserve(width)))

    def _landed(self, count: int) -> None:
        with self._lock:
            self._flying -= count

    def _finished(
        self, flying: Mapping[Future[_Result], tuple[int, Call]], more: bool, drain_until: float
    ) -> set[Future[_Result]]:
        """Wait until a call has finished, or until another one may leave."""
        patience = self._pace.delay() if more else math.inf
        patience = min(patience or math.inf, drain_until - time.monotonic())
        if not flying:
            # Held back by the pace, or by what other threads have in flight.
            time.sleep(max(0.0, min(patience, 0.05)))
            return set()
        limit = None if patience == math.inf else max(0.0, patience)
        return wait(flying, timeout=limit, return_when=FIRST_COMPLETED).done


class _Turns:
    """An :class:`Order` whose next few turns are settled before they are taken.

    From when a turn is settled its money may be set aside; ``roomy`` is for how much, whatever is found out meanwhile.
    """

    def __init__(self, order: Order, roomy: Callable[[int], bool]) -> None:
        self._order = order
        self._is_roomy = roomy
        self.roomy: dict[int, bool] = {}
        self._settled: deque[int] = deque()
        self.done, self.cache_key = order.done, order.cache_key

    def __bool__(self) -> bool:
        return bool(self._settled or self._order)

    def peek(self) -> int | None:
        return self._settled[0] if self._settled else self._order.peek()

    def take(self) -> int | None:
        return self._settled.popleft() if self._settled else self._order.take()

    def settle(self, n: int) -> list[int]:
        """The next ``n``, which stay the next ones whatever else becomes free to go."""
        while len(self._settled) < n and (index := self._order.take()) is not None:
            self._settled.append(index)
            self.roomy[index] = self._is_roomy(index)
        return list(self._settled)


def nobody(indices: Sequence[int]) -> None:
    """No one to tell."""


def _renamed(announce: OnSend, index: int) -> OnSend:
    """``announce`` for the only request of an inner batch, which has another number outside."""
    return lambda indices: announce([index] * len(indices))


def _announcer(announce: OnSend, index: int) -> Callable[[], None]:
    return lambda: announce([index])
