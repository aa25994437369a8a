"""The one place where backends meet the ledger: ask a batch, buy only what is not recorded yet.

Each block that a backend yields is written down before the backend is asked for the next one, so whatever kills the
process, everything answered so far is kept and the same batch asked again buys only the rest. It is handed on when it is
on the disk; until then only calls leave whose mark is on the disk already.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

from ._call_amounts import CallAmounts
from ._journal import LedgerJournal, MemoryJournal, identity_hash
from ._purchase import GENERATE, SCORE, A, Announcer, Kind, Purchase, Q
from .backends.base import (
    Backend,
    BatchStatus,
    GenerateRequest,
    GenerateResult,
    Generator,
    Journal,
    OnTokens,
    Scorer,
    ScoreRequest,
    ScoreResult,
    Usage,
    keeps_journal,
    masks_units,
)
from .errors import BackendError, InputError, LedgerCorruptError
from .ledger import CallRole, Claim, Ledger, Limits, RequestKeys
from .prices import Price

__all__ = ["Meter", "MeterStats", "Progress", "StageStats"]

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the number of requests answered so far and the number asked for."""


@dataclass(frozen=True, slots=True)
class StageStats:
    """What was asked and what it took; ``requested = deduplicated + reused + bought + failed``.

    ``deduplicated`` counts repetitions within a batch, ``reused`` answers found in the ledger, ``seconds``
    the time spent waiting for the backend. ``found`` counts those reused answers that this meter had not had before: what
    would have been bought with an empty ledger.
    """

    requested: int = 0
    deduplicated: int = 0
    reused: int = 0
    bought: int = 0
    failed: int = 0
    prompt_tokens_bought: int = 0
    completion_tokens_bought: int = 0
    cached_tokens_bought: int = 0
    prompt_tokens_reused: int = 0
    completion_tokens_reused: int = 0
    found: int = 0
    prompt_tokens_found: int = 0
    completion_tokens_found: int = 0
    cached_tokens_found: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class MeterStats(StageStats):
    """The sum over all stages, and each stage by name."""

    by_stage: Mapping[str, StageStats] = field(default_factory=dict)


class Meter:
    """Asks one backend, through the ledger.

    Parameters
    ----------
    backend : Scorer or Generator
    ledger : Ledger or None
        Without one nothing is kept and every batch is asked anew.
    role : {"target", "proxy"}
        Requests to a target are stored with their text (if the ledger keeps texts), requests to a proxy as hashes only.
    run : str
        Name under which the calls are counted.
    limits : Limits, optional
        Bound the calls of this run; need a ledger. Calls and tokens bound a target only, money any role.
    on_tokens : callable, optional
        Handed to the backend; called with the number of tokens computed since the last call.
    price : Price, optional
        What the model charges; needed with a limit on money. A backend with ``batch = True`` pays its batch rates.
    patience : float
        Seconds to wait for another process that is asking the same thing and makes no progress, before it is asked
        here too.

    Notes
    -----
    A batch that is expected to pass a limit is refused before anything is sent. Then each call is checked again as it
    leaves, at the most it may take: the model's own tokenizer or one token per byte for the prompt, ``max_tokens`` for
    the answer. So a limit is never passed, and nearly all of it can be used.

    What another process, or another meter, is asking at the moment is not bought again: this one waits for the answer.
    """

    def __init__(
        self,
        backend: Backend,
        ledger: Ledger | None,
        *,
        role: CallRole,
        run: str,
        limits: Limits | None = None,
        on_tokens: OnTokens | None = None,
        price: Price | None = None,
        patience: float = 900.0,
    ) -> None:
        if role not in ("target", "proxy"):
            raise InputError(f"role={role!r} must be 'target' or 'proxy'.")
        counted = limits is not None and (limits.max_calls, limits.max_tokens) != (None, None)
        if limits is not None and (ledger is None or (counted and role != "target")):
            raise InputError(
                f"limits={limits!r} need role='target' and a ledger, which does the counting.",
                hint="Open one with Ledger(path), or leave the limits out.",
            )
        self.backend = backend
        self.ledger = ledger
        self.role = role
        self.run = run
        self._limits = limits
        self._on_tokens = on_tokens
        self._amounts = CallAmounts(backend, limits, price)
        self._patience = patience
        self._lock = threading.Lock()
        self._counts: dict[str, dict[str, Any]] = {}
        self._had: set[str] = set()
        if limits is not None and limits.max_money is not None:
            assert ledger is not None  # checked above
            # Earlier calls of this run may have been made while no price was known.
            cost = self._amounts.cost
            ledger.price_earlier(run, role, backend.name, limits.currency, lambda usage: cost(usage) or 0)

    @property
    def limits(self) -> Limits | None:
        """What bounds the calls of this run."""
        return self._limits

    @property
    def price(self) -> Price | None:
        """What the model charges, if that is known."""
        return self._amounts.price

    @property
    def in_batch(self) -> bool:
        """Whether calls are billed as batches."""
        return self._amounts.in_batch

    def recorded(
        self, requests: Sequence[ScoreRequest] | Sequence[GenerateRequest], *, repeat: int = 0
    ) -> list[bool]:
        """Which requests the ledger answers; asks nothing."""
        if self.ledger is None or not requests:
            return [False] * len(requests)
        kind = GENERATE.name if isinstance(requests[0], GenerateRequest) else SCORE.name
        maker = RequestKeys(self.backend.identity, kind, {}, repeat)
        keys = [maker.key(request) for request in requests]
        known = self.ledger.lookup(dict.fromkeys(keys))
        return [key in known for key in keys]

    @property
    def stats(self) -> MeterStats:
        """What this meter has asked so far, overall and ``by_stage``."""
        with self._lock:
            stages = {stage: StageStats(**counts) for stage, counts in self._counts.items()}
        names = [item.name for item in fields(StageStats)]
        overall = {name: sum(getattr(one, name) for one in stages.values()) for name in names}
        return MeterStats(**overall, by_stage=stages)

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        stage: str,
        progress: Progress | None = None,
        repeat: int = 0,
    ) -> list[ScoreResult]:
        """Give the log-probabilities of every request's candidates.

        Parameters
        ----------
        requests : sequence of ScoreRequest
        stage : str
            What the calls are for.
        progress : callable, optional
            Called as ``progress(done, total)``, in requests.
        repeat : int
            0, or 1, 2, ... to ask the same thing again, for example to measure the noise floor.

        Returns
        -------
        list of ScoreResult
            In the order of ``requests``. Results with ``error`` set are not stored: they are asked again
            next time.

        Raises
        ------
        BudgetExceededError
            If the requests that are not recorded pass a limit; nothing is sent.
        BackendError
            If the backend breaks its contract; answers before that are kept.
        LedgerError
            If an answer cannot be stored; nothing more is asked then.
        """
        if any(request.mask is not None for request in requests) and not masks_units(self.backend):
            raise InputError(
                f"The backend {self.backend.name!r} cannot hide units of a prompt.",
                hint="Leave mask out of the requests and render the units away.",
            )
        if not isinstance(self.backend, Scorer):
            raise InputError(f"The backend {self.backend.name!r} gives text only.", hint="Use generate().")
        return self._ask(SCORE, self.backend.score, list(requests), stage, progress, repeat)

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        stage: str,
        progress: Progress | None = None,
        repeat: int = 0,
    ) -> list[GenerateResult]:
        """Give a text for every request; see :meth:`score`."""
        if not isinstance(self.backend, Generator):
            raise InputError(f"The backend {self.backend.name!r} gives no text.", hint="Use score().")
        if self.ledger is not None and self.ledger.store == "hash":
            raise InputError(
                f"The ledger {self.ledger.path} keeps numbers only (store = 'hash'), and a generated text is none.",
                hint="Use a ledger with store = 'encrypted' or 'full' for tasks with generated text.",
            )
        return self._ask(GENERATE, self.backend.generate, list(requests), stage, progress, repeat)

    def _ask(
        self,
        kind: Kind[Q, A],
        call: Callable[..., Iterator[Sequence[tuple[int, A]]]],
        requests: list[Q],
        stage: str,
        progress: Progress | None,
        repeat: int,
    ) -> list[A]:
        maker = RequestKeys(self.backend.identity, kind.name, {}, repeat)
        keys = [maker.key(request) for request in requests]
        copies = Counter(keys)
        results = self._recorded(kind, copies, stage)
        done = sum(copies[key] for key in results)
        self._count(stage, requested=len(keys), deduplicated=len(keys) - len(copies), reused=len(results))
        if progress is not None:
            progress(done, len(keys))
        # Proxies' prompts are rendered again at no cost; those of a target show what was paid for.
        document = maker.document if self.role == "target" else None

        def advance(new: Mapping[str, A]) -> None:
            nonlocal done
            results.update(new)
            with self._lock:
                self._had.update(new)
            done += sum(copies[key] for key in new)
            if progress is not None:
                progress(done, len(keys))

        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in results}
        if missing and keeps_journal(self.backend):
            self._journal(list(missing), take_over=True)
        patience = _Patience(self._patience)
        while missing:
            names, wanted = list(missing), list(missing.values())
            claim = self._claim(names, wanted, stage, force=patience.over)
            if claim.attempts:
                mine = list(claim.attempts)
                bought = [names[n] for n in mine]
                purchase = Purchase(
                    kind,
                    self.backend.name,
                    [wanted[n] for n in mine],
                    bought,
                    list(claim.attempts.values()),
                    self.ledger,
                    document,
                    self._amounts.terms(),
                )

                def accept(block: list[tuple[int, A, bool]], names: list[str] = bought) -> None:
                    self._count_bought(stage, block)
                    advance({names[index]: result for index, result, _ in block})

                send = (
                    functools.partial(call, journal=self._journal(bought))
                    if keeps_journal(self.backend)
                    else call
                )
                self._buy(purchase, send, stage, accept)
            elif not claim.held:
                break
            held = [names[n] for n in claim.held]
            if held:
                if not claim.attempts:
                    patience.wait()
                found = self._recorded(kind, held, stage)
                if found:
                    patience.renew()
                    self._count(stage, reused=len(found))
                    advance(found)
            missing = {key: missing[key] for key in held if key not in results}
        return [results[key] for key in keys]

    def _buy(
        self,
        purchase: Purchase[Q, A],
        call: Callable[..., Iterator[Sequence[tuple[int, A]]]],
        stage: str,
        accept: Callable[[list[tuple[int, A, bool]]], None],
    ) -> None:
        blocks: Iterator[Sequence[tuple[int, A]]] | None = None
        block: Sequence[tuple[int, A]] | None = None
        written: deque[tuple[list[tuple[int, A, bool]], int]] = deque()  # and not known to be on the disk
        try:
            blocks = iter(call(purchase.requests, on_send=Announcer(purchase), on_tokens=self._on_tokens))
            while True:
                started = time.perf_counter()
                try:
                    block = next(blocks, None)
                finally:
                    self._count(stage, seconds=time.perf_counter() - started)
                if block is None:
                    break
                written.append(purchase.take(block))
                block = None
                for index, result, _ in written[-1][0]:
                    self._amounts.learn(purchase.requests[index], result.usage)
                while written and purchase.on_disk(written[0][1]):
                    accept(written.popleft()[0])
            purchase.finish()
            _hand_on(purchase, written, accept)
        except KeyboardInterrupt:
            if block is not None:
                # Interrupted with a paid answer in hand; if it was stored already, it counts as given twice.
                with suppress(BackendError):
                    purchase.take(block)
            raise
        except Exception:
            _hand_on(purchase, written, accept)  # as far as it came
            raise
        finally:
            try:
                close = getattr(blocks, "close", None)
                if close is not None:
                    close()
            finally:
                purchase.abandon()

    def _recorded(self, kind: Kind[Q, A], keys: Iterable[str], stage: str) -> dict[str, A]:
        if self.ledger is None:
            return {}
        results: dict[str, A] = {}
        prompt = completion = 0
        new: list[Usage] = []
        for key, row in self.ledger.lookup(keys).items():
            try:
                results[key] = kind.decode(row.body, row.usage, row.model_returned)
            except (ValueError, KeyError, TypeError) as error:
                raise LedgerCorruptError(
                    f"The stored answer {key} in {self.ledger.path} is intact but not understood: {error!r}.",
                    hint="It was written by another version; use that one, or another ledger file.",
                ) from error
            prompt += row.usage.prompt_tokens
            completion += row.usage.completion_tokens
            if key not in self._had:
                new.append(row.usage)
        self._count(
            stage,
            prompt_tokens_reused=prompt,
            completion_tokens_reused=completion,
            found=len(new),
            prompt_tokens_found=sum(u.prompt_tokens for u in new),
            completion_tokens_found=sum(u.completion_tokens for u in new),
            cached_tokens_found=sum(u.cached_tokens for u in new),
        )
        with self._lock:
            self._had.update(results)
        return results

    def cancel_batches(self) -> list[str]:
        """Ask the provider to stop what is under way of this model; what it has answered is collected by the next run.

        Returns
        -------
        list of str
            Ids of the batches that were still at work; empty for a backend that sends none.
        """
        if not keeps_journal(self.backend):
            return []
        stopped: list[str] = self.backend.cancel(self._journal([]))  # type: ignore[attr-defined]
        return stopped

    def batches(self) -> list[BatchStatus]:
        """Where the batches of this model stand that are written down and not wholly collected, oldest first.

        Asks the provider, and costs nothing. Empty for a backend that sends none.
        """
        if not keeps_journal(self.backend):
            return []
        found: list[BatchStatus] = self.backend.batches(self._journal([]))  # type: ignore[attr-defined]
        return found

    def _journal(self, keys: list[str], *, take_over: bool = False) -> Journal:
        """The backend's journal; what an earlier process left under way is taken over, not paid for twice."""
        if self.ledger is None:
            return MemoryJournal(keys)
        journal = LedgerJournal(
            self.ledger, f"{self.backend.name}@{identity_hash(self.backend.identity)}", keys
        )
        if take_over:
            journal.take_over(self.backend.under_way(journal))  # type: ignore[attr-defined]
        return journal

    def _claim(
        self, keys: list[str], requests: Sequence[ScoreRequest | GenerateRequest], stage: str, *, force: bool
    ) -> Claim:
        if self.ledger is None:
            return Claim(dict.fromkeys(range(len(keys)), 0), ())
        tokens, money = self._amounts.planned(requests)
        terms: dict[str, Any] = {
            "run": self.run, "stage": stage, "role": self.role, "model": self.backend.name, "limits": self._limits,
            "tokens": tokens, "money": money, "currency": self._amounts.currency,
        }  # fmt: skip
        if force:
            return Claim(dict(enumerate(self.ledger.reserve(keys, **terms))), ())
        return self.ledger.claim(keys, **terms)

    def _count_bought(self, stage: str, block: list[tuple[int, A, bool]]) -> None:
        self._count(
            stage,
            bought=sum(good for _, _, good in block),
            failed=sum(not good for _, _, good in block),
            prompt_tokens_bought=sum(result.usage.prompt_tokens for _, result, _ in block),
            completion_tokens_bought=sum(result.usage.completion_tokens for _, result, _ in block),
            cached_tokens_bought=sum(result.usage.cached_tokens for _, result, _ in block),
        )

    def _count(self, stage: str, **more: float) -> None:
        with self._lock:
            counts = self._counts.setdefault(stage, {})
            for name, amount in more.items():
                counts[name] = counts.get(name, 0) + amount


class _Patience:
    """Waits longer and longer for others, and says when it has been long enough."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.renew()

    def renew(self) -> None:
        """There was progress."""
        self._pause = 0.02
        self._deadline = time.monotonic() + self._seconds

    def wait(self) -> None:
        """One pause."""
        time.sleep(max(0.0, min(self._pause, self._deadline - time.monotonic())))
        self._pause = min(1.0, 1.5 * self._pause)

    @property
    def over(self) -> bool:
        """Whether nothing has moved for so long that waiting makes no sense."""
        return time.monotonic() >= self._deadline


def _hand_on(
    purchase: Purchase[Q, A],
    written: deque[tuple[list[tuple[int, A, bool]], int]],
    accept: Callable[[list[tuple[int, A, bool]]], None],
) -> None:
    """Wait for the disk and accept what was written."""
    while written:
        new, ticket = written.popleft()
        purchase.wait_for_disk(ticket)
        accept(new)
