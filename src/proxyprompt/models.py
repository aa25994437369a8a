"""Model names: ``embedded:NAME``, ``hf:ID_OR_FOLDER``, ``openai:MODEL``, ``replay:FILE``.

A name is checked when a configuration is read; the model itself is loaded when it is first asked something
that the ledger cannot answer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .backends.base import Backend
from .errors import BackendError, InputError, ModelSpecError

__all__ = ["open_model"]

KINDS = ("embedded", "hf", "openai", "replay")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_OPTIONS: dict[str, frozenset[str]] = {
    "embedded": frozenset({"approximate", "dtype", "device", "threads", "memory_budget", "chat_template"}),
    "hf": frozenset(
        {"approximate", "dtype", "device", "threads", "memory_budget", "chat_template", "revision"}
    ),
    "openai": frozenset(
        {
            *("base_url", "api", "top_logprobs", "evidence", "repeats", "reasoning_tokens", "parameters"),
            *("concurrency", "rpm", "tpm", "timeout", "max_tries", "max_wait", "paid_retries"),
            *("batch", "batch_size", "batch_poll", "batch_wait", "model_change", "allow_http"),
        }
    ),
    "replay": frozenset({"model"}),
}


def open_model(
    spec: str, *, folder: str | os.PathLike[str] = ".", options: Mapping[str, Any] | None = None
) -> Backend:
    """A backend for a model name, checked but not loaded.

    Parameters
    ----------
    spec : str
        ``KIND:REST``.
    folder : path
        What relative paths in ``hf:`` and ``replay:`` start from.
    options : mapping, optional
        Keyword arguments of the backend (``dtype``, ``base_url``, ...).

    Raises
    ------
    ModelSpecError
        Unknown kind, embedded model, option; missing folder or file; missing key.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in KINDS or not rest:
        raise ModelSpecError(
            f"model: {spec!r} is not understood; use {', '.join(k + ':...' for k in KINDS)}.",
            hint="Example: embedded:gemma-3-270m.",
        )
    given = dict(options or {})
    unknown = sorted(set(given) - _OPTIONS[kind])
    if unknown:
        raise ModelSpecError(
            f"model {spec!r}: unknown options {unknown}; known for {kind}: {', '.join(sorted(_OPTIONS[kind]))}."
        )
    try:
        return {"embedded": _embedded, "hf": _hugging_face, "openai": _openai, "replay": _replay}[kind](
            rest, Path(folder), given
        )
    except ModelSpecError:
        raise
    except (InputError, BackendError, TypeError) as error:
        raise ModelSpecError(f"model {spec!r}: {error}") from error


def _embedded(name: str, folder: Path, options: dict[str, Any]) -> Backend:
    del folder
    from .backends.embedded import embedded

    return embedded(name, **options)


def _hugging_face(name: str, folder: Path, options: dict[str, Any]) -> Backend:
    from .backends.transformers import TransformersBackend

    local = Path(name).expanduser() if Path(name).expanduser().is_absolute() else folder / name
    if local.is_dir():
        return TransformersBackend(str(local), name=f"hf:{name}", **options)
    if name.startswith((".", "/", "~")) or not _HUB_ID.match(name):
        raise ModelSpecError(
            f"model 'hf:{name}': no such folder ({local}), and not a hub id.",
            hint="Give a folder, or owner/name.",
        )
    return TransformersBackend(name, name=f"hf:{name}", **options)


def _openai(name: str, folder: Path, options: dict[str, Any]) -> Backend:
    del folder
    from .backends.openai import OpenAIBackend

    local = options.get("base_url") or os.environ.get("OPENAI_BASE_URL")
    if not os.environ.get("OPENAI_API_KEY") and not local:
        raise ModelSpecError(
            f"model 'openai:{name}': OPENAI_API_KEY is not set.",
            hint="Set it in the environment; keys are never read from files. A local server needs base_url instead.",
        )
    return OpenAIBackend(name, name=f"openai:{name}", **options)


def _replay(name: str, folder: Path, options: dict[str, Any]) -> Backend:
    from .backends.replay import ReplayBackend

    path = Path(name).expanduser() if Path(name).expanduser().is_absolute() else folder / name
    if not path.is_file():
        raise ModelSpecError(f"model 'replay:{name}': no such file ({path}).")
    return ReplayBackend(path, name=f"replay:{path.name}", **options)
