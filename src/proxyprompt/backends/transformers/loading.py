"""Loading weights safely and quietly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from proxyprompt._require import require
from proxyprompt.errors import BackendError, InputError

from .threads import import_torch

__all__ = ["Device", "Dtype", "load_model", "pick_device"]

Dtype: TypeAlias = Literal["float32", "bfloat16", "auto"]
Device: TypeAlias = Literal["auto", "cpu", "cuda"]


def pick_device(device: Device) -> str:
    """Name of the device to compute on; ``"auto"`` takes CUDA where there is one.

    Raises
    ------
    InputError
        If CUDA is asked for and absent.
    """
    torch = import_torch()
    available = bool(torch.cuda.is_available())
    if device == "cuda" and not available:
        raise InputError(
            "device: 'cuda' was asked for and torch sees no CUDA device.", hint="Use device='auto' or 'cpu'."
        )
    return "cuda" if available and device != "cpu" else "cpu"


def load_model(folder: Path, dtype: str, device: str) -> Any:
    """Load a causal language model from a folder: safetensors only, no code from the folder.

    Raises
    ------
    BackendError
        If transformers cannot load it, or weights are missing from the files.
    """
    torch = import_torch()
    auto = require("transformers", "transformers").AutoModelForCausalLM
    try:
        with _no_progress_bars():
            model, info = auto.from_pretrained(
                str(folder),
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackendError(
            f"model: {folder.name!r} could not be loaded ({reason}).",
            hint="It must be a causal language model that the installed transformers knows, in safetensors.",
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise BackendError(
            f"model: the files of {folder.name!r} lack {len(missing)} weights, the first {missing[0]!r}.",
            hint="transformers would fill them with random numbers; save the model again.",
        )
    return model.eval().requires_grad_(False).to(device)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    logging = require("transformers.utils.logging", "transformers")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
