"""A client of the official ``openai`` SDK that sends the smaller prompt where the application still writes the whole one.

Every call of the SDK, whatever it is called, ends in the client's public ``request`` method. So the client is given a
subclass of its own class that edits there: ``create``, ``parse``, ``stream``, raw and streaming responses, resources
that were looked up before, and clients made by ``with_options`` or ``copy`` (the SDK makes them of the same class) are
all covered, and nothing of the SDK is replaced.
"""

from __future__ import annotations

import copy
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from ._pruned_requests import Instruction, RequestEdit, RequestPruner
from ._require import require
from .artifact import Artifact
from .errors import InputError, PromptMismatchError, PromptMismatchWarning

if TYPE_CHECKING:
    import openai

    C = TypeVar("C", bound="openai.OpenAI | openai.AsyncOpenAI")
else:
    C = TypeVar("C")

__all__ = ["PruneCounter", "RequestEdit", "wrap_openai"]

OnMismatch: TypeAlias = Literal["pass", "warn", "raise"]
_POLICIES = ("pass", "warn", "raise")


class PruneCounter:
    """Counts what :func:`wrap_openai` did; pass it as ``on_request``. Safe to share among threads and clients.

    Attributes
    ----------
    requests, pruned, already_pruned, mismatched : int
        Requests that could hold a prompt, and what happened to them. A request counts when it is edited, before it
        is sent; retries of the SDK do not count again.
    saved_characters : int
    saved_tokens_estimate : float or None
        Prompt tokens saved, by the mean that the artifact measured on the target; ``None`` as soon as a pruned
        request came from an artifact without token counts.

    Examples
    --------
    >>> counter = PruneCounter()
    >>> counter(RequestEdit("pruned", ("a",), saved_characters=60, saved_tokens=14.0))
    >>> counter.pruned, counter.saved_tokens_estimate
    (1, 14.0)
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests = self.pruned = self.already_pruned = self.mismatched = self.saved_characters = 0
        self.saved_tokens_estimate: float | None = 0.0

    def __call__(self, edit: RequestEdit) -> None:
        """Count one request."""
        with self._lock:
            self.requests += 1
            self.pruned += edit.status == "pruned"
            self.already_pruned += edit.status == "already_pruned"
            self.mismatched += edit.status == "mismatch"
            self.saved_characters += edit.saved_characters
            if edit.status == "pruned":
                known = self.saved_tokens_estimate is not None and edit.saved_tokens is not None
                self.saved_tokens_estimate = (
                    (self.saved_tokens_estimate or 0.0) + (edit.saved_tokens or 0.0) if known else None
                )

    def __repr__(self) -> str:
        return (
            f"PruneCounter(requests={self.requests}, pruned={self.pruned}, already_pruned={self.already_pruned},"
            f" mismatched={self.mismatched}, saved_tokens_estimate={self.saved_tokens_estimate})"
        )


def wrap_openai(
    client: C,
    artifact: Artifact | str | os.PathLike[str],
    *,
    on_mismatch: OnMismatch = "pass",
    instruction: Instruction = "same",
    on_request: Callable[[RequestEdit], None] | None = None,
) -> C:
    """Make a client leave out the demonstrations that an artifact removed, whenever it is asked to send them.

    Parameters
    ----------
    client : openai.OpenAI or openai.AsyncOpenAI
        Version 2 or 3 of the SDK; Azure clients and other subclasses too. It is changed in place, and clients
        made from it later (``with_options``, ``copy``) behave alike.
    artifact : Artifact or path
        What a run wrote. It must be certified where it removes anything.
    on_mismatch : {"pass", "warn", "raise"}
        What happens to a request that does not hold the artifact's whole original prompt: it is sent as it is, in
        silence or with a :class:`~proxyprompt.errors.PromptMismatchWarning`, or it is not sent and a
        :class:`~proxyprompt.errors.PromptMismatchError` says what differs.
    instruction : {"same", "any"}
        ``"any"`` accepts another system or developer turn than the artifact's, such as one with a date in it. The
        certificate does not cover that.
    on_request : callable, optional
        Called with a :class:`RequestEdit` for every request that could hold the prompt; see :class:`PruneCounter`.

    Returns
    -------
    client
        The same object. Wrapping it again with the same artifact changes the options only; with another artifact, it
        knows both prompts, and a mismatch is a request that fits neither (by the options given last).

    Raises
    ------
    InputError, ArtifactError, MissingDependencyError

    Notes
    -----
    ``/chat/completions``, ``/responses`` and ``/completions`` are edited, everything else is left alone (batch files, the
    Assistants API and the Realtime API too). A request is edited only if, after the instruction, it begins with
    *all* demonstrations of the artifact in its original order, each turn equal in role, name and text. The removed
    ones are left out, and the kept ones are put into the certified order where that differs; the turns are the
    application's own objects, and its lists are not changed. What follows the demonstrations is forwarded as it is.
    A prompt in completion style is recognised by its exact text, as the prompt of ``/completions`` or as the only user
    message. A request that holds the smaller prompt already is no mismatch.

    Examples
    --------
    >>> import openai
    >>> from proxyprompt import Demonstration, FewShotPrompt
    >>> prompt = FewShotPrompt((Demonstration("a", {"input": "x"}, "y"),), style="chat")
    >>> stored = {"original_prompt": prompt.to_dict(), "kept": [], "removed": ["a"], "summary": {}}
    >>> artifact = Artifact({**stored, "certificate": {"decision": "certified"}})
    >>> with openai.OpenAI(api_key="none") as client:
    ...     wrap_openai(client, artifact, on_mismatch="warn") is client
    True
    """
    make = _request_maker(client)
    if on_mismatch not in _POLICIES:
        raise InputError(f"on_mismatch: got {on_mismatch!r}; allowed: {', '.join(map(repr, _POLICIES))}.")
    if on_request is not None and not callable(on_request):
        raise InputError(f"on_request: got {on_request!r}; a callable is needed.")
    loaded = artifact if isinstance(artifact, Artifact) else Artifact.load(artifact)
    rule = _Rule(RequestPruner(loaded, instruction), on_request)
    before: _Editor | None = getattr(client, "_proxyprompt_editor", None)
    rules = [r for r in before.rules if r.pruner.artifact != loaded] if before else []
    base = before.base if before else type(client)
    editor = _Editor((*rules, rule), on_mismatch, base)
    names = {
        "_proxyprompt_editor": editor,
        "request": make(base, editor),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    try:
        # One base only: with a second one the instance's layout would differ, and Python refuses.
        client.__class__ = type(base.__name__, (base,), names)
    except TypeError as error:
        raise InputError(f"client: a {base.__name__} cannot be wrapped ({error}).") from error
    return client


@dataclass(frozen=True)
class _Rule:
    pruner: RequestPruner
    on_request: Callable[[RequestEdit], None] | None


@dataclass(frozen=True)
class _Editor:
    """What the class of a wrapped client knows. ``base`` is the class that it had before."""

    rules: tuple[_Rule, ...]
    on_mismatch: OnMismatch
    base: type

    def options(self, options: Any) -> Any:
        """The SDK's request options with the smaller prompt; a copy where anything changes."""
        edits = []
        for rule in self.rules:
            found = rule.pruner.edit(options.url, options.json_data, options.extra_json)
            if found is None:
                return options
            body, edit = found
            if edit.status != "mismatch":
                self._tell(rule, edit)
                if edit.status == "pruned":
                    options = copy.copy(options)
                    options.json_data = body
                return options
            edits.append(edit)
        for rule, edit in zip(self.rules, edits, strict=True):
            self._tell(rule, edit)
        self._mismatch([edit.reason for edit in edits])
        return options

    @staticmethod
    def _tell(rule: _Rule, edit: RequestEdit) -> None:
        if rule.on_request is not None:
            rule.on_request(edit)

    def _mismatch(self, reasons: list[str]) -> None:
        text = f"The request does not hold the artifact's prompt: {'; '.join(reasons)}."
        if self.on_mismatch == "raise":
            raise PromptMismatchError(
                f"{text} Nothing was sent.",
                hint="Send the prompt that the artifact was made from, or use a client that is not wrapped.",
            )
        if self.on_mismatch == "warn":
            warnings.warn(
                f"{text} It was sent as it is.", PromptMismatchWarning, stacklevel=_outside_the_sdk()
            )


def _outside_the_sdk() -> int:
    """How many frames up the caller of the SDK is, so that the warning shows the application's line."""
    import sys

    level, frame = 1, sys._getframe(1)
    inside = ("openai", "proxyprompt")
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).split(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    return level


def _sync_request(base: Any, editor: _Editor) -> Callable[..., Any]:
    def request(self: Any, cast_to: Any, options: Any, **more: Any) -> Any:
        """The SDK's own method, for options with the smaller prompt."""
        return base.request(self, cast_to, editor.options(options), **more)

    return request


def _async_request(base: Any, editor: _Editor) -> Callable[..., Any]:
    async def request(self: Any, cast_to: Any, options: Any, **more: Any) -> Any:
        """The SDK's own method, for options with the smaller prompt."""
        return await base.request(self, cast_to, editor.options(options), **more)

    return request


def _request_maker(client: Any) -> Callable[[Any, _Editor], Callable[..., Any]]:
    sdk = require("openai", "openai")
    if isinstance(client, sdk.AsyncOpenAI):
        return _async_request
    if isinstance(client, sdk.OpenAI):
        return _sync_request
    raise InputError(
        f"client is a {type(client).__name__}; an openai.OpenAI or openai.AsyncOpenAI is needed.",
        hint="Wrap the SDK's client before you hand it to other libraries.",
    )
