"""Calls to an OpenAI-compatible server: the client, retries, and errors without credentials in them."""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import Any

from proxyprompt._require import require
from proxyprompt.errors import BackendError, InputError

from ._openai_wire import (
    Answer,
    Endpoint,
    classify,
    one_line,
    prompt_fields,
    public_url,
    read_answer,
    redact,
    retry_after,
)
from .base import Rendered

_TRIES = 3
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 20.0
_DEFAULT_URL = "https://api.openai.com/v1"
_HINTS = {
    401: "Check OPENAI_API_KEY (or the client's key) and base_url.",
    403: "Check that this key may use this model.",
    404: "Check the model's name, base_url (it usually ends in /v1) and api ('chat' or 'completions').",
    429: "Check the account's plan and limits.",
}


class CallFailedError(Exception):
    """One call failed for good; becomes ``result.error``."""


class NoLogprobsError(CallFailedError):
    """The server refuses to give log-probabilities."""


class Connection:
    """One model at one server. ``public_url`` is the address without credentials or query."""

    def __init__(
        self, model: str, client: Any, base_url: str | None, timeout: float, top_logprobs: int
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
        self._model = model
        self._given = client
        self._timeout = timeout
        self._top_logprobs = top_logprobs
        self._limit_name = "max_tokens"
        self._lock = threading.Lock()
        self._sdk: Any = None
        self._client: Any = None

    def open(self) -> None:
        """Make the client, once; not on construction, so that a run from recorded answers needs no key."""
        with self._lock:
            if self._client is not None:
                return
            self._sdk = require("openai", "openai")
            # A server of one's own often needs no key, but the SDK insists on some text.
            key = os.environ.get("OPENAI_API_KEY") or ("" if self._url == _DEFAULT_URL else "none")
            if self._given is None and not key:
                raise BackendError(
                    "OPENAI_API_KEY is not set.",
                    hint="Set it in the environment, or pass client= or base_url=.",
                )
            if self._given is not None:
                self._client = self._given
                return
            self._client = self._sdk.OpenAI(
                api_key=key, base_url=self._url, timeout=self._timeout, max_retries=0
            )
            # The SDK closes its sockets when collected, but not when it is part of a cycle.
            weakref.finalize(self, self._client.close)

    def send(self, prompt: Rendered, endpoint: Endpoint, limit: int, **extra: Any) -> Answer:
        """One answer of at most ``limit`` tokens; what is worth trying again is tried three times in all.

        Raises
        ------
        CallFailedError
            If this call got no answer.
        BackendError
            If no call can get one.
        UnreadableAnswerError
            If the answer cannot be read.
        """
        resource = self._client.chat.completions if endpoint == "chat" else self._client.completions
        fields = {"model": self._model, "temperature": 0, **prompt_fields(prompt, endpoint), **extra}
        tries = 0
        while True:
            tries += 1
            limit_name = self._limit_name if endpoint == "chat" else "max_tokens"
            try:
                raw = resource.with_raw_response.create(**fields, **{limit_name: limit})
            except self._sdk.APIStatusError as error:
                pause = self._after_status(error, tries, limit_name)
            except self._sdk.APIConnectionError as error:
                pause = self._after_connection(error, tries)
            except self._sdk.OpenAIError as error:
                raise CallFailedError(f"{type(error).__name__}: {self.clean(str(error))}") from None
            else:
                return read_answer(raw.http_response.content, endpoint)
            time.sleep(pause)

    def clean(self, text: str) -> str:
        """``text`` as one short line without the key."""
        return one_line(self._redacted(text))

    def _redacted(self, text: str) -> str:
        key = getattr(self._client, "api_key", None)
        return redact(text, [key] if isinstance(key, str) else [])

    def _after_status(self, error: Any, tries: int, limit_name: str) -> float:
        """Seconds to wait before the next try; raises if there is none."""
        told = error.body.get("message") if isinstance(error.body, dict) else None
        told = told if isinstance(told, str) and told else error.message
        status, message = error.status_code, self.clean(told)
        fault = classify(status, error.code, error.param, told)
        if fault == "max-tokens-name" and limit_name == "max_tokens":
            self._limit_name = "max_completion_tokens"
            return 0.0
        if fault in ("fatal", "too-many-logprobs"):
            hint = _HINTS.get(status, "")
            if fault == "too-many-logprobs":
                hint = f"The server may allow fewer than top_logprobs={self._top_logprobs}; lower it."
            fatal = BackendError(f"{self._model!r} at {self.public_url}: HTTP {status}: {message}", hint=hint)
            # Some servers repeat the key in their message; chained, it would be printed with the traceback.
            raise fatal from (error if self._redacted(str(error)) == str(error) else None)
        if fault == "no-logprobs":
            raise NoLogprobsError(message) from None
        pause = retry_after(error.response.headers)
        if fault != "retry" or tries >= _TRIES:
            raise CallFailedError(f"HTTP {status} after {_times(tries)}: {message}") from None
        if pause is not None and pause > _LONGEST_PAUSE:
            raise CallFailedError(f"HTTP {status}, asked to wait {pause:g} s: {message}") from None
        return _FIRST_PAUSE * 2 ** (tries - 1) if pause is None else pause

    def _after_connection(self, error: Any, tries: int) -> float:
        """Seconds to wait before the next try; raises unless the request certainly never arrived."""
        cause = type(error.__cause__).__name__
        if tries < _TRIES and cause in ("ConnectError", "ConnectTimeout"):
            return _FIRST_PAUSE * 2.0 ** (tries - 1)
        if isinstance(error, self._sdk.APITimeoutError):
            raise CallFailedError(f"no answer within the time limit, after {_times(tries)}") from None
        raise CallFailedError(
            f"no connection to {self.public_url} ({cause}), after {_times(tries)}"
        ) from None


def _check_client(client: Any) -> None:
    if isinstance(client, require("openai", "openai").AsyncOpenAI):
        raise InputError(
            f"client is a {type(client).__name__}; a synchronous one is needed.",
            hint="Pass openai.OpenAI(...).",
        )
    if not hasattr(client, "chat") or not hasattr(client, "base_url"):
        raise InputError(f"client is a {type(client).__name__}; an openai.OpenAI client is needed.")


def _times(tries: int) -> str:
    return "1 try" if tries == 1 else f"{tries} tries"
