"""Calls to an OpenAI-compatible server: the client, its one event loop, retries, and errors without credentials.

The SDK's own retries are off, for the user's client too: each attempt may be billed, so each has to be counted.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from proxyprompt._require import require
from proxyprompt.errors import BackendError, InputError, RetryableBackendError

from ._openai_address import (
    PeerCheck,
    check_address,
    check_lookup,
    credentials,
    one_line,
    public_url,
    redact,
    secrets_of,
)
from ._openai_faults import classify, error_code, error_name, error_words, read_allowance, retry_after
from ._openai_loop import Loop
from ._openai_mixups import Answered
from ._openai_pace import Pace
from ._openai_wire import PATHS, read_body
from .base import Usage

_FIRST_PAUSE = 0.5
_FIRST_PAUSE_OF_LOAD = 2.0
"""After 429 and 529: five pauses that double from here outlast a window of a minute, in which most limits are counted."""

_LONGEST_PAUSE = 60.0
_WHOLE_ANSWER = 2.0
"""The client's time limit starts anew with every byte; in so many of them the whole answer must be there."""

_GIVE_UP_AFTER = 5
"""Calls in a row that fail for load or connection after all their tries: the server is down, not the request odd."""

_DEFAULT_URL = "https://api.openai.com/v1"
_HINTS = {
    401: "Check OPENAI_API_KEY (or the client's key) and base_url.",
    403: "Check that this key may use this model.",
    404: "Check the model's name, base_url (it usually ends in /v1) and api ('chat' or 'completions').",
    429: "Check the account's plan and limits.",
}
_LOAD = ("HTTP 429 ", "HTTP 529 ")
_jitter = random.Random()

T = TypeVar("T")


class CallFailedError(Exception):
    """One call failed for good; becomes ``result.error``."""


class UnsentError(Exception):
    """The run was stopped before this call left; nothing was billed."""


class UnsupportedError(CallFailedError):
    """The server does not take a field of the request, or does not have the endpoint; nothing was billed."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Patience:
    """How long to go on with one request.

    Parameters
    ----------
    tries : int
        Attempts in all.
    max_wait : float
        Seconds from the first attempt to the last.
    paid_retries : int
        Attempts after one that brought nothing back but may have been billed.
    """

    tries: int = 6
    max_wait: float = 900.0
    paid_retries: int = 1


@dataclass
class Call:
    """One request on its way: who has to know of further attempts, and what it has taken so far."""

    announce: Callable[[], None]
    stopped: threading.Event
    expected: int = 0
    usage: Usage = field(default_factory=Usage)
    uncertain: int = 0
    model: str | None = None
    fingerprint: str | None = None
    unsettled: int = 0
    roomy: bool = False
    """Whether the call was announced with room for reasoning, so that its body may ask for it."""

    @property
    def settled(self) -> bool:
        """Whether ``usage`` and ``uncertain`` tell all that may have been billed."""
        return not self.unsettled


class Connection:
    """One server. ``public_url`` is the address without credentials or query.

    Notes
    -----
    One event loop in one thread serves the connection for its whole life, as an asynchronous client must not see two.
    A synchronous client of the user is driven from threads instead of being rebuilt as an asynchronous one: its
    transport, certificates, proxies and tokens are then exactly those that the user set up.
    """

    def __init__(
        self,
        model: str,
        client: Any,
        base_url: str | None,
        *,
        timeout: float,
        concurrency: int,
        patience: Patience,
        pace: Pace,
        allow_http: bool,
    ) -> None:
        if client is not None:
            if base_url is not None:
                raise InputError(
                    "client and base_url were both given; the client has its own.", hint="Leave base_url out."
                )
            _check_client(client)
            self._url = str(client.base_url)
        else:
            self._url = base_url or os.environ.get("OPENAI_BASE_URL") or _DEFAULT_URL
        self.public_url = public_url(self._url)
        check_address(self._url, allow_http=allow_http)
        self._peers = PeerCheck(self._url, allow_http=allow_http)
        self.model = model
        self.pace = pace
        self._given = client
        self._timeout = timeout
        self._concurrency = concurrency
        self.patience = patience
        self._lock = threading.Lock()
        self._failed_in_a_row = 0
        self._sdk: Any = None
        self._client: Any = None
        self._response: Any = None
        self._loop: Loop | None = None
        self._answered = Answered()
        self._owned: list[Any] = []
        self._pid = 0

    # -- opening and closing

    def open(self) -> None:
        """Make the client, once; not on construction, so that a run from recorded answers needs no key."""
        with self._lock:
            if self._client is not None and self._pid == os.getpid():
                return
            self._sdk = require("openai", "openai")
            # A server of one's own often needs no key, but the SDK insists on some text.
            key = os.environ.get("OPENAI_API_KEY") or ("" if self._url == _DEFAULT_URL else "none")
            if self._given is None and not key:
                raise BackendError(
                    "OPENAI_API_KEY is not set.",
                    hint="Set it in the environment, or pass client= or base_url=.",
                )
            check_lookup(self._url)
            self._response = _response_class(self._sdk)
            if self._given is None:
                self._owned = []
                self._client = self._new_client(key)
            else:
                self._client = self._given.with_options(max_retries=0)
            # After a fork the parent's loop does not run here, and its sockets are the parent's.
            self._loop = Loop(self._concurrency)
            self._pid = os.getpid()
            weakref.finalize(self, self._loop.close, self._owned)

    def _new_client(self, key: str) -> Any:
        client = self._sdk.AsyncOpenAI(
            api_key=key,
            base_url=self._url,
            timeout=self._timeout,
            max_retries=0,
            http_client=self._sdk.DefaultAsyncHttpxClient(
                follow_redirects=False, event_hooks={"request": [self._peers.hook]}
            ),
        )
        self._owned.append(client)
        return client

    @property
    def has_decisions(self) -> bool:
        """Whether the SDK knows the decisions endpoint."""
        return hasattr(self._client, "decisions")

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the connection's loop."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop.loop)

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run something that blocks without holding up the loop."""
        assert self._loop is not None
        return await self._loop.loop.run_in_executor(self._loop.threads, function, *arguments)

    # -- sending

    async def post(self, kind: str, body: Mapping[str, Any], call: Call) -> dict[str, Any]:
        """One answer, after as many attempts as patience allows.

        Parameters
        ----------
        kind : {"chat", "completions", "decisions"}
        body : mapping
        call : Call
            The first attempt has been announced; further ones that may be billed are announced here.

        Raises
        ------
        UnsupportedError
            If the server does not take a field of the body, or has no such endpoint.
        CallFailedError
            If this call got no answer.
        BackendError
            If no call can get one.
        UnreadableAnswerError
            If the answer cannot be read.

        Notes
        -----
        ``call.unsettled`` is one higher afterwards, unless every attempt is known to have cost nothing or is counted in
        ``call.uncertain``: the caller settles it with the usage of the answer.
        """
        if call.stopped.is_set() and call.usage == Usage() and not call.uncertain:
            raise UnsentError  # what has cost something already is finished
        call.unsettled += 1
        deadline = time.monotonic() + self.patience.max_wait
        tries = lost = 0
        while True:
            tries += 1
            sent_at = time.monotonic()
            try:
                response = await self._attempt(PATHS[kind], body)
            except self._sdk.APIStatusError as error:
                try:
                    pause, billed, reason = self._after_status(error, body, kind, sent_at)
                except (BackendError, CallFailedError):
                    call.unsettled -= 1  # a refusal costs nothing
                    raise
            except self._sdk.APIConnectionError as error:
                if isinstance(error.__cause__, BackendError):
                    call.unsettled -= 1  # see below
                pause, billed, reason = self._after_connection(error)
            except TimeoutError:
                pause, billed, reason = None, True, "no answer within the time limit"
            except BackendError:
                call.unsettled -= 1  # of the peer check: nothing was sent
                raise
            except UnicodeEncodeError:
                call.unsettled -= 1  # nothing was sent
                raise CallFailedError(
                    "the prompt holds half a surrogate pair, which cannot be sent"
                ) from None
            except RuntimeError as error:
                raise self._foreign_loop(error) from error
            except self._sdk.OpenAIError as error:
                raise CallFailedError(f"{type(error).__name__}: {self.clean(str(error))}") from None
            else:
                self._failed_in_a_row = 0
                self.pace.succeeded(read_allowance(response.headers))
                answer = read_body(response.content)
                if not self._answered.is_foreign(answer.get("id"), body, answer):
                    return answer
                pause, billed, reason = self._after_mix_up()
            if billed:
                lost += 1
                call.uncertain += 1
            spent = tries >= self.patience.tries or (billed and lost > self.patience.paid_retries)
            call.unsettled -= 1
            if spent or call.stopped.is_set():
                raise self._gave_up(f"{reason} after {_times(tries)}")
            asked = pause
            if pause is None:
                pause = _backoff(tries, _FIRST_PAUSE_OF_LOAD if reason.startswith(_LOAD) else _FIRST_PAUSE)
            if time.monotonic() + pause > deadline:
                wish = "" if asked is None else f", asked to wait {asked:g} s"
                raise self._gave_up(
                    f"{reason} after {_times(tries)}{wish}; max_wait={self.patience.max_wait:g} s"
                )
            await self._rest(pause, call)
            if billed:
                await self.in_thread(call.announce)
            call.unsettled += 1
            self.pace.take(call.expected)

    def manage(self, work: Callable[[Any], Any], done: Callable[[], bool] | None = None) -> Any:
        """Do something with the client that costs nothing by itself (files, batches), from the caller's thread.

        Parameters
        ----------
        work : callable
            From the client to a result, or to an awaitable of it.
        done : callable, optional
            Asked after an attempt that brought no answer whether it was carried out all the same.

        Raises
        ------
        BackendError
            If it is refused.
        RetryableBackendError
            If nothing came back in ``max_tries`` attempts.
        """
        tries = 0
        while True:
            tries += 1
            try:
                return self.submit(self._managed(work)).result()
            except self._sdk.APIStatusError as error:
                told, code, param = _said(error)
                verdict = classify(error.status_code, code, param, told)
                reason = f"HTTP {error.status_code}: {self.clean(told)}"
                if verdict.fault not in ("retry", "maybe-billed"):
                    raise BackendError(
                        f"{self.model!r} at {self.public_url}: {reason}",
                        hint=_HINTS.get(error.status_code, ""),
                    ) from None
                pause = retry_after(error.response.headers) or None
            except self._sdk.APIConnectionError as error:
                pause, _, reason = self._after_connection(error)
            if done is not None and done():
                return None
            if tries >= self.patience.tries or (pause or 0) > self.patience.max_wait:
                raise RetryableBackendError(
                    f"{self.model!r} at {self.public_url}: {reason} after {_times(tries)}.",
                    hint="What is under way is written down; run again when the server is back.",
                )
            time.sleep(_backoff(tries, _FIRST_PAUSE) if pause is None else pause)

    async def _managed(self, work: Callable[[Any], Any]) -> Any:
        if isinstance(self._client, self._sdk.AsyncOpenAI):
            return await work(self._client)
        return await self.in_thread(work, self._client)

    async def _attempt(self, path: str, body: Mapping[str, Any]) -> Any:
        # An authorization header must not follow a redirection to somewhere else.
        options: dict[str, Any] = {"follow_redirects": False, "max_retries": 0}
        arguments = {"body": dict(body), "cast_to": self._response, "options": options}
        async with asyncio.timeout(self._time_limit()):
            if isinstance(self._client, self._sdk.AsyncOpenAI):
                return await self._client.post(path, **arguments)
            return await self.in_thread(lambda: self._client.post(path, **arguments))

    def _time_limit(self) -> float | None:
        """Seconds for a whole answer; ``None`` for a client of the user's that has no limit."""
        if self._given is None:
            return _WHOLE_ANSWER * self._timeout
        limit = getattr(self._client, "timeout", None)
        seconds = getattr(limit, "read", limit)
        return _WHOLE_ANSWER * seconds if isinstance(seconds, int | float) else None

    async def _rest(self, pause: float, call: Call) -> None:
        """Wait, and wait on while everything is held back; a stopped run wakes up at once."""
        await _sleep(pause, call.stopped)
        while not call.stopped.is_set() and (held := self.pace.delay()) > 0:
            await _sleep(held, call.stopped)
        if call.stopped.is_set():
            raise CallFailedError("not tried again: the run was stopped")

    def _after_status(
        self, error: Any, body: Mapping[str, Any], kind: str, sent_at: float
    ) -> tuple[float | None, bool, str]:
        """Pause before the next attempt, whether this one may be billed, and why it failed; or raises."""
        told, code, param = _said(error)
        status, message = error.status_code, self.clean(told)
        verdict = classify(status, code, param, told, OPTIONAL & set(body))
        reason = f"HTTP {status}: {message}"
        if kind == "decisions" and status in (400, 403, 404, 405, 422, 501):
            raise UnsupportedError("decisions", reason) from None
        if verdict.fault == "unsupported":
            raise UnsupportedError(verdict.field or "", reason) from None
        if verdict.fault in ("fatal", "too-many-logprobs"):
            hint = _HINTS.get(status, "")
            if 300 <= status < 400:
                hint = "Redirections are not followed, because the key would be sent along; correct base_url."
            if verdict.fault == "too-many-logprobs":
                hint = f"The server may allow fewer than top_logprobs={_asked_logprobs(body)}; lower it."
            fatal = BackendError(f"{self.model!r} at {self.public_url}: {reason}", hint=hint)
            # Some servers repeat the key in their message; chained, it would be printed with the traceback.
            raise fatal from (error if self._redacted(str(error)) == str(error) else None)
        if verdict.fault == "failed":
            raise CallFailedError(reason) from None
        # A pause of 0 is none: a date may lie in the past for a clock that goes wrong, and all tries would go at once.
        headers = error.response.headers
        pause = retry_after(headers) or read_allowance(headers).until_refilled or None
        self.pace.overloaded(sent_at, pause)
        return pause, verdict.fault == "maybe-billed", f"HTTP {status} ({message})"

    def _after_connection(self, error: Any) -> tuple[float | None, bool, str]:
        if isinstance(error.__cause__, BackendError):
            raise error.__cause__ from None  # some versions of the SDK wrap what the peer check raises
        cause = type(error.__cause__).__name__
        if isinstance(error.__cause__, RuntimeError):
            raise self._foreign_loop(error.__cause__) from None
        if cause in ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "ProxyError"):
            return None, False, f"no connection to {self.public_url} ({cause})"
        if isinstance(error, self._sdk.APITimeoutError):
            return None, True, "no answer within the time limit"
        return None, True, f"the connection to {self.public_url} broke ({cause})"

    def _after_mix_up(self) -> tuple[float | None, bool, str]:
        """New connections: the answer that was waited for may still come on the old one."""
        if self._given is not None:
            raise BackendError(
                f"{self.model!r} at {self.public_url}: an answer to another request was delivered again.",
                hint="Something between here and the model repeats responses. Run again with a fresh client.",
            )
        self._client = self._new_client(self._client.api_key)
        return 0.0, True, "an answer to another request was delivered again"

    def _gave_up(self, reason: str) -> Exception:
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= _GIVE_UP_AFTER:
            self._failed_in_a_row = 0  # whoever asks again gets the same patience
            return RetryableBackendError(
                f"{self.model!r} at {self.public_url}: {_GIVE_UP_AFTER} requests in a row got no answer; "
                f"the last: {reason}.",
                hint="What was answered is kept; run again when the server is back.",
            )
        return CallFailedError(reason)

    def _foreign_loop(self, error: RuntimeError) -> Exception:
        return BackendError(
            f"The client failed with {self.clean(str(error))!r}.",
            hint="An asynchronous client that was used on another event loop cannot be used on the backend's; "
            "hand over a fresh one.",
        )

    # -- errors without credentials

    def clean(self, text: str) -> str:
        """``text`` as one short line without the key."""
        return one_line(self._redacted(text))

    def _redacted(self, text: str) -> str:
        return redact(text, [*secrets_of(self._client), *credentials(self._url)])


OPTIONAL = frozenset({"logprobs", "temperature", "max_tokens", "n", "prompt_cache_key"})
"""Fields that another attempt could do without, or by another name."""


async def _sleep(seconds: float, stopped: threading.Event) -> None:
    """Sleep in steps, so that a stopped run does not wait a quarter of an hour for its last calls."""
    end = time.monotonic() + seconds
    while not stopped.is_set() and (left := end - time.monotonic()) > 0:
        await asyncio.sleep(min(left, 0.25))


def _response_class(sdk: Any) -> Any:
    """The response class of the HTTP library that the SDK uses: ``httpx`` in version 2, ``httpx2`` in version 3."""
    bases = [
        c for c in sdk.DefaultHttpxClient.__mro__ if c.__module__.partition(".")[0] in ("httpx", "httpx2")
    ]
    return importlib.import_module(bases[0].__module__.partition(".")[0]).Response


def _asked_logprobs(body: Mapping[str, Any]) -> Any:
    return body.get("top_logprobs", body.get("logprobs"))


def _said(error: Any) -> tuple[str, str | None, str | None]:
    """Message, code and parameter of an error of the SDK."""
    code = error_code(error.code, error.type)
    return error_words(error.body, error.message), code, error_name(error.param)


def _check_client(client: Any) -> None:
    sdk = require("openai", "openai")
    if not isinstance(client, sdk.OpenAI | sdk.AsyncOpenAI):
        raise InputError(
            f"client is a {type(client).__name__}; an openai client is needed.",
            hint="Pass openai.OpenAI(...), openai.AsyncOpenAI(...) or their Azure forms.",
        )


def _backoff(tries: int, first: float) -> float:
    """Pause after so many tries, doubled each time, with jitter so that many callers do not come back together."""
    return min(first * 2.0 ** (tries - 1), _LONGEST_PAUSE) * _jitter.uniform(0.5, 1.0)


def _times(tries: int) -> str:
    return "1 try" if tries == 1 else f"{tries} tries"
