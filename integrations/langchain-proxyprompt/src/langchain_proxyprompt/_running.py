"""Runs of the user's own chain with some of its examples, and what the model was really sent."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextvars import Context
from typing import Any, TypeVar, cast
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseLanguageModel
from langchain_core.messages import BaseMessage
from langchain_core.outputs import LLMResult
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda

from proxyprompt.backends.base import Message, Rendered, Role, Usage
from proxyprompt.errors import BackendError, InputError, ProxyPromptError

from ._finding import walk
from ._mask import MASK_KEY, Mask

__all__ = [
    "ChainRunner",
    "LoopJob",
    "Outcome",
    "RunFailedError",
    "describe",
    "failure",
    "model_parameters",
    "to_rendered",
    "tracing",
    "usage_of",
]

T = TypeVar("T")
_ROLES: Mapping[str, Role] = {"human": "user", "ai": "assistant", "system": "system"}


def to_rendered(messages: Sequence[BaseMessage]) -> tuple[Message, ...]:
    """Messages as ProxyPrompt's turns.

    Raises
    ------
    InputError
        If one holds more than text.
    """
    turns = []
    for message in messages:
        role = _ROLES.get(message.type)
        calls = getattr(message, "tool_calls", None)
        if role is None or calls or not isinstance(message.content, str):
            raise InputError(
                f"chain: it sends a {message.type} message that is more than text; only text can be measured.",
                hint="Pass a part of the chain whose prompt is text.",
            )
        if role == "system" and message.additional_kwargs.get("__openai_role__") == "developer":
            role = "developer"
        turns.append(Message(role, message.content, message.name))
    return tuple(turns)


class _Stopped(BaseException):
    def __init__(self, rendered: Rendered) -> None:
        super().__init__("stopped before the model was asked")
        self.rendered = rendered


class _Watcher(BaseCallbackHandler):
    """Sees what goes to the model, before it is sent, and what comes back."""

    raise_error = True
    run_inline = True

    def __init__(self, mask: Mask, expected: Rendered | None) -> None:
        self._mask, self._expected = mask, expected
        self._lock = threading.Lock()
        self.answers: list[tuple[Any, Usage, str | None]] = []
        self.starts = 0
        self.cached = False
        self._asked: dict[UUID, str | None] = {}
        self._failed: set[str | None] = set()
        self.stand_ins: set[str] = set()

    def on_chat_model_start(
        self, serialized: Any, messages: list[list[BaseMessage]], *, run_id: UUID, **kwargs: Any
    ) -> None:
        """Compare before anything is sent."""
        self._check(to_rendered(messages[0]), run_id, kwargs)

    def on_llm_start(self, serialized: Any, prompts: list[str], *, run_id: UUID, **kwargs: Any) -> None:
        """The same for a model that takes text."""
        self._check(prompts[0], run_id, kwargs)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Remember which model failed: another one may answer in its place."""
        with self._lock:
            self._failed.add(self._asked.get(run_id))

    def _check(self, rendered: Rendered, run_id: UUID, kwargs: Mapping[str, Any]) -> None:
        if not self._mask.uses:
            raise _Refused(
                "chain: a model is asked before the few-shot prompt is rendered.",
                "Pass the part of the chain that begins after that model.",
            )
        with self._lock:
            self.starts += 1
            self._asked[run_id] = (kwargs.get("metadata") or {}).get("ls_model_name")
        if self._expected is None:
            raise _Stopped(rendered)
        if rendered != self._expected:
            raise _Refused(
                "chain: it sent another prompt than it rendered a moment ago for the same query and examples.",
                "A step before the model is random or changes with time; make it deterministic, or pass the rest.",
            )

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        """Keep the answer, its cost and its model."""
        generation = response.generations[0][0]
        message = getattr(generation, "message", None)
        meta = getattr(message, "response_metadata", None) or {}
        model = meta.get("model_name") or meta.get("model") or (response.llm_output or {}).get("model_name")
        answer = generation.text if message is None else message
        with self._lock:
            # LangChain's cache repeats the usage of the call that filled it, and adds a cost of 0.
            self.cached |= (getattr(message, "usage_metadata", None) or {}).get("total_cost") == 0
            asked = self._asked.get(run_id)
            if asked is not None and self._failed - {None, asked}:
                self.stand_ins.add(asked)
            self.answers.append(
                (answer, usage_of(message, response), model if isinstance(model, str) else None)
            )


class _Refused(BaseException):
    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def usage_of(message: Any, response: LLMResult) -> Usage:
    counted = getattr(message, "usage_metadata", None)
    if isinstance(counted, Mapping):
        inputs = counted.get("input_token_details") or {}
        reasoning = (counted.get("output_token_details") or {}).get("reasoning") or 0
        return Usage(
            int(counted.get("input_tokens") or 0),
            int(counted.get("output_tokens") or 0),
            int(inputs.get("cache_read") or 0),
            int(inputs.get("cache_creation") or 0),
            int(reasoning),
        )
    usage = (response.llm_output or {}).get("token_usage") or {}
    return Usage(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))


class RunFailedError(Exception):
    """A run of the chain that gave no answer: missing, never a score of zero.

    Attributes
    ----------
    usage : Usage
        Of the calls that were answered before it failed.
    uncertain : int
        Calls that were sent and may have been billed.
    refused : bool
        Whether the model refused the request itself (status 400 or 422, or a parameter it does not know).
    """

    def __init__(self, message: str, usage: Usage, uncertain: int, refused: bool) -> None:
        super().__init__(message)
        self.usage, self.uncertain, self.refused = usage, uncertain, refused


def failure(error: Exception, usage: Usage, unanswered: int) -> Exception:
    """Whether the run is missing, or all of them are bound to fail; the text of an error may hold prompts and keys."""
    status = getattr(error, "status_code", None)
    what = type(error).__name__ + (f" (status {status})" if isinstance(status, int) else "")
    if status in (401, 403, 404) or getattr(error, "code", None) == "insufficient_quota":
        return BackendError(
            f"The chain's model refuses every request: {what}.",
            hint="Check its key, name and quota; see the cause.",
        )
    if isinstance(error, RuntimeError) and "event loop" in str(error).lower():
        return BackendError(
            "The chain's model belongs to an event loop that is closed; no call on another one can succeed.",
            hint="Asynchronous clients serve one loop: make the model inside the asyncio.run that uses it.",
        )
    refused = status in (400, 422) or isinstance(error, TypeError | ValueError)
    return RunFailedError(
        f"it failed with {what}", usage, 0 if refused else min(max(unanswered, 0), 1), refused
    )


class Outcome:
    """What a run of the chain gave.

    Attributes
    ----------
    output : object
        The chain's output.
    message : object
        The model's last answer: a message, or a text.
    usage : Usage
        Sum over all the calls that the chain made.
    model : str or None
    """

    def __init__(self, output: Any, answers: Sequence[tuple[Any, Usage, str | None]]) -> None:
        self.output = output
        self.message = answers[-1][0] if answers else None
        self.usage = Usage()
        for _, usage, _ in answers:
            self.usage = self.usage + usage
        self.model = answers[-1][2] if answers else None


class ChainRunner:
    """Runs a chain with a mask, in the thread that asks or on one event loop.

    Parameters
    ----------
    chain : Runnable
        With its few-shot template replaced by one that reads the mask.
    config : mapping, optional
        The user's own runnable config, merged into every call's.
    loop : asyncio.AbstractEventLoop or LoopJob, optional
        Then every run is a coroutine on it: an HTTP client made for one loop cannot serve another.
    trace : bool
        Whether the runs go to LangSmith, if that is on.
    """

    def __init__(
        self,
        chain: Runnable[Any, Any],
        *,
        config: Mapping[str, Any] | None = None,
        loop: asyncio.AbstractEventLoop | LoopJob | None = None,
        trace: bool = False,
    ) -> None:
        self._chain, self._trace = chain, trace
        self._job = LoopJob(loop) if isinstance(loop, asyncio.AbstractEventLoop) else loop
        self._config = dict(config or {})
        self._models: set[str] = set()
        self._lock = threading.Lock()

    def render(self, kept: tuple[str, ...], inputs: Any) -> Rendered:
        """What the chain would send: it runs until just before its model is asked."""
        mask = Mask(kept)
        watcher = _Watcher(mask, None)
        try:
            self._run(inputs, mask, watcher, "render")
        except _Stopped as stopped:
            return stopped.rendered
        except _Refused as refused:
            raise InputError(str(refused), hint=refused.hint) from None
        raise InputError(
            "chain: it ended without asking a model.",
            hint="Pass a chain that ends in a model, or goes on after one.",
        )

    def run(self, kept: tuple[str, ...], inputs: Any, expected: Rendered) -> Outcome:
        """Run the chain; what it sends must be ``expected``.

        Raises
        ------
        InputError
            If it would send something else; nothing is sent.
        MaskLostError, BackendError
            If the run did not read its mask, or several models answered.
        """
        mask = Mask(kept)
        watcher = _Watcher(mask, expected)
        try:
            output = self._run(inputs, mask, watcher, "run")
        except _Refused as refused:
            raise InputError(str(refused), hint=refused.hint) from None
        except ProxyPromptError:
            raise
        except Exception as error:
            paid = Outcome(None, watcher.answers).usage
            raise failure(error, paid, watcher.starts - len(watcher.answers)) from error
        if not mask.uses or not watcher.starts:
            raise BackendError(
                "The chain answered without asking its model about these examples (a cache, or another branch).",
                hint="Switch caches off, or pass the part of the chain that always asks.",
            )
        if watcher.cached:
            raise BackendError(
                "LangChain's cache answered in the model's place; one answer repeated is no measurement.",
                hint="Give that model cache=False: it is inside a function, where it cannot be switched off from here.",
            )
        if watcher.stand_ins:
            raise BackendError(
                f"A fallback, {', '.join(sorted(watcher.stand_ins))}, answered for a model that failed. They cannot be"
                " measured as one.",
                hint="Take fallbacks out of the chain while it is measured.",
            )
        outcome = Outcome(output, watcher.answers)
        self._same_model(outcome, watcher.answers)
        return outcome

    def _same_model(self, outcome: Outcome, answers: Sequence[tuple[Any, Usage, str | None]]) -> None:
        with self._lock:
            self._models |= {model for _, _, model in answers if model}
            names = sorted(self._models)
        if len(names) > 1:
            raise BackendError(
                f"Answers came from {len(names)} models: {', '.join(names)}. They cannot be measured as one.",
                hint="Take fallbacks and aliases out of the chain while it is measured, or pin the model's version.",
            )

    def _run(self, inputs: Any, mask: Mask, watcher: _Watcher, what: str) -> Any:
        config = self._call_config(mask, watcher, what)
        # In an empty context: nothing of a run around this one, its callbacks or configuration, is inherited.
        if self._job is not None:
            return Context().run(self._job.run, lambda: self._arun(inputs, config))

        def invoke() -> Any:
            with tracing(self._trace):
                return self._chain.invoke(inputs, config)

        return Context().run(invoke)

    async def _arun(self, inputs: Any, config: RunnableConfig) -> Any:
        with tracing(self._trace):
            return await self._chain.ainvoke(inputs, config)

    def _call_config(self, mask: Mask, watcher: _Watcher, what: str) -> RunnableConfig:
        own = self._config
        callbacks = own.get("callbacks") or []
        if not isinstance(callbacks, list):
            callbacks = callbacks.handlers
        merged: dict[str, Any] = {
            **own,
            "callbacks": [*callbacks, watcher] if what == "run" else [watcher],
            "configurable": {**own.get("configurable", {}), MASK_KEY: mask},
            "run_name": f"proxyprompt:{what}",
            "tags": [*own.get("tags", []), "proxyprompt"],
            "metadata": {**own.get("metadata", {}), "proxyprompt_shown": len(mask.kept)},
        }
        return cast(RunnableConfig, merged)


class _Escaped(Exception):
    def __init__(self, inner: BaseException) -> None:
        super().__init__(str(inner))
        self.inner = inner


class LoopJob:
    """Runs of one job on one event loop, asked for from other threads; they end together.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._flying: set[Future[Any]] = set()
        self._over = False

    def stop(self) -> None:
        """Cancel what is under way, and refuse what would follow."""
        with self._lock:
            self._over = True
            flying = list(self._flying)
        for future in flying:
            future.cancel()

    def run(self, make: Callable[[], Awaitable[T]]) -> T:
        """Await on the loop; the calling thread waits.

        Raises
        ------
        BackendError
            If the job was stopped.
        """

        async def guarded() -> T:
            try:
                return await make()
            except (_Stopped, _Refused) as end:
                raise _Escaped(end) from None

        with self._lock:
            if self._over:
                raise BackendError(_CANCELLED)
            future = asyncio.run_coroutine_threadsafe(guarded(), self._loop)
            self._flying.add(future)
        try:
            return future.result()
        except _Escaped as escaped:
            raise escaped.inner from None
        except CancelledError:
            raise BackendError(_CANCELLED) from None
        finally:
            with self._lock:
                self._flying.discard(future)


_CANCELLED = "The job was cancelled; what was answered is in the ledger."


def tracing(on: bool) -> contextlib.AbstractContextManager[Any]:
    if on:
        return contextlib.nullcontext()
    from langsmith import tracing_context

    return tracing_context(enabled=False)


def describe(chain: Any) -> str:
    """A hash of the chain's structure: its classes in order, the code of its functions, its models' parameters."""
    digest = hashlib.sha256()
    for path, part, _ in walk(chain):
        digest.update(f"{path}|{type(part).__module__}.{type(part).__qualname__}".encode())
        if isinstance(part, RunnableLambda):
            code = getattr(getattr(part, "func", None) or getattr(part, "afunc", None), "__code__", None)
            if code is not None:
                digest.update(
                    code.co_code + repr([c for c in code.co_consts if not hasattr(c, "co_code")]).encode()
                )
        elif isinstance(part, BaseLanguageModel):
            digest.update(repr(sorted(model_parameters(part).items())).encode())
        elif isinstance(part, str | int | float | bool):
            digest.update(repr(part).encode())
    return digest.hexdigest()


_SECRET = ("key", "secret", "password", "authorization", "credential", "headers")


def model_parameters(model: Any) -> dict[str, Any]:
    """What a model says identifies it, without anything that may be a secret."""
    said = getattr(model, "_identifying_params", None)
    given = dict(said) if isinstance(said, Mapping) else {}
    return {
        name: value
        for name, value in given.items()
        if isinstance(value, str | int | float | bool | list | None)
        and not any(mark in name.lower() for mark in _SECRET)
    }
