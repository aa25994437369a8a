"""Name a request by everything that decides its answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, TypeAlias

from .backends.base import GenerateRequest, Message, ScoreRequest
from .errors import InputError

__all__ = ["Kind", "RequestKeys", "raw_key", "request_key"]

Kind: TypeAlias = Literal["score", "generate"]

KEY_SCHEMA = 1
"""Part of every key. A change of the canonical form must raise it, which hides all older answers."""

_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _plain(value: Any, name: str) -> Any:
    # json.dumps would turn the keys 1 and "1" into the same text, hence the refusal of other keys.
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(
                    f"{name} has the key {key!r}; keys must be text.", hint="Convert the keys with str()."
                )
        return {key: _plain(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    return value


def _json(value: Any, name: str) -> str:
    try:
        return _ENCODER.encode(value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} cannot be part of a request key: {error}. It must hold JSON values, no NaN or infinity.",
            hint="Convert it to text, numbers, lists and mappings with text keys.",
        ) from error


_TYPES: Mapping[Kind, type[ScoreRequest | GenerateRequest]] = {
    "score": ScoreRequest,
    "generate": GenerateRequest,
}


class RequestKeys:
    """Makes the keys of many requests to one model.

    Parameters
    ----------
    identity : mapping
        Everything that decides the answers besides the request, as the backend states it.
    kind : {"score", "generate"}
    parameters : mapping
        Anything else that is sent along.
    repeat : int
        0, or 1, 2, ... to ask the same thing again.
    """

    def __init__(
        self, identity: Mapping[str, Any], kind: Kind, parameters: Mapping[str, Any], repeat: int = 0
    ) -> None:
        if kind not in _TYPES:
            raise InputError(f"kind={kind!r} must be 'score' or 'generate'.")
        self._type = _TYPES[kind]
        if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 0:
            raise InputError(f"repeat={repeat!r} must be a whole number of at least 0.")
        # Taken from the class, so that a field added to a request later enters the key by itself.
        self._names = [item.name for item in fields(self._type) if item.name != "prompt"]
        head = {
            "identity": _plain(identity, "identity"),
            "kind": kind,
            "parameters": _plain(parameters, "parameters"),
            "repeat": repeat,
        }
        # Everything but the request is encoded once; "request" and "schema" sort after the names above,
        # so the joined text is the canonical JSON of the whole.
        self._head = _json(head, "identity or parameters")[:-1] + ',"request":'
        self._tail = f',"schema":{KEY_SCHEMA}}}'

    def document(self, request: ScoreRequest | GenerateRequest) -> str:
        """Canonical JSON of the request; the key is its hash."""
        if type(request) is not self._type:
            raise InputError(f"request={type(request).__name__} must be a {self._type.__name__}.")
        prompt = request.prompt
        body: dict[str, Any] = {name: getattr(request, name) for name in self._names}
        # Younger than the schema: absent, it leaves the keys of older answers as they are.
        mask = body.pop("mask", None)
        if mask is not None:
            body["mask"] = {"spans": mask.spans, "kept": mask.kept}
        if isinstance(prompt, str):
            body["prompt"] = {"text": prompt}
        elif isinstance(prompt, tuple) and all(isinstance(turn, Message) for turn in prompt):
            # A name is younger than the schema, too.
            body["prompt"] = {
                "chat": [[t.role, t.content, *([] if t.name is None else [t.name])] for t in prompt]
            }
        else:
            raise InputError(f"request.prompt={prompt!r:.80} must be text or a tuple of Message.")
        return self._head + _json(body, "request") + self._tail

    def key(self, request: ScoreRequest | GenerateRequest) -> str:
        """64 hexadecimal digits."""
        return _digest(self.document(request))


def _digest(document: str) -> str:
    # Unescaped UTF-8 with surrogates passed through is one-to-one on Python text. ASCII escapes are not:
    # an astral character and the two lone surrogates of the same code units escape to the same text.
    return hashlib.sha256(document.encode("utf-8", "surrogatepass")).hexdigest()


def request_key(
    identity: Mapping[str, Any],
    kind: Kind,
    request: ScoreRequest | GenerateRequest,
    parameters: Mapping[str, Any],
    repeat: int = 0,
) -> str:
    """Name a request by the SHA-256 of everything that decides its answer.

    Parameters
    ----------
    identity, kind, parameters, repeat
        See :class:`RequestKeys`.
    request : ScoreRequest or GenerateRequest

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    InputError
        If something is not a JSON value, or the request does not fit ``kind``.

    Examples
    --------
    >>> request = ScoreRequest("2 + 2 =", (" 4", " 5"))
    >>> key = request_key({"model": "m"}, "score", request, {})
    >>> len(key), key == request_key({"model": "n"}, "score", request, {})
    (64, False)
    """
    return RequestKeys(identity, kind, parameters, repeat).key(request)


def raw_key(key: str) -> bytes:
    """The 32 bytes of a key."""
    try:
        raw = bytes.fromhex(key)
    except (TypeError, ValueError):
        raw = b""
    if len(raw) != 32:
        raise InputError(
            f"key={key!r:.80} must be 64 hexadecimal digits.", hint="Make keys with request_key()."
        )
    return raw
