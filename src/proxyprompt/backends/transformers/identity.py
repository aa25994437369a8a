"""Where a model's files are, and a hash that says which model it is, without loading it."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxyprompt._require import require
from proxyprompt.errors import BackendError, InputError

__all__ = ["ModelFiles", "context_limit", "hash_folder", "read_config", "resolve", "stored_dtype"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DESCRIBING = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model")
_SAMPLE = 128


class ModelFiles:
    """A folder with a model, and the commit it is of where it came from a hub."""

    def __init__(self, folder: Path, commit: str | None) -> None:
        self.folder = folder
        self.commit = commit


def resolve(model: str, revision: str | None) -> ModelFiles:
    """Find a model's folder: a local one, or a hub's snapshot, fetched if it is not there yet.

    Raises
    ------
    BackendError
        If there is no such folder, or the hub's files are neither cached nor reachable.
    """
    local = Path(model).expanduser()
    if local.is_dir():
        if revision is not None:
            raise InputError(
                f"revision: {revision!r} was given for a local folder.",
                hint="A revision names a commit of a hub id; leave it out.",
            )
        return ModelFiles(local, None)
    if not _HUB_ID.fullmatch(model) or local.exists():
        raise BackendError(
            f"model: {model!r} is neither a folder nor a hub id of the form owner/name.",
            hint="Check the path; a folder needs config.json, tokenizer.json and *.safetensors.",
        )
    return _snapshot(model, revision)


def _snapshot(model: str, revision: str | None) -> ModelFiles:
    hub = require("huggingface_hub", "transformers")
    options: dict[str, Any] = {"revision": revision, "allow_patterns": list(_HUB_PATTERNS)}
    try:
        folder = Path(hub.snapshot_download(model, local_files_only=True, **options))
        if not any(folder.glob("*.safetensors")):
            raise FileNotFoundError(folder)
    except (OSError, ValueError):
        try:
            folder = Path(hub.snapshot_download(model, **options))
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BackendError(
                f"model: {model!r} is not in the local cache and could not be fetched ({reason}).",
                hint="Check the name, the network and HF_HUB_OFFLINE, or give a local folder; "
                "embedded:smollm2-135m and embedded:gemma-3-270m need no network.",
            ) from error
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
    return ModelFiles(folder, commit)


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` and refuse what is not a causal language model in safetensors format.

    Raises
    ------
    BackendError
        If the configuration is missing or unreadable, names no causal language model, or has no safe weights.
    """
    _check_links(folder)
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BackendError(
            f"model: the folder {folder.name!r} has no config.json.",
            hint="Give the folder that model.save_pretrained(...) wrote.",
        ) from error
    except ValueError as error:
        raise BackendError(
            f"model: config.json in {folder.name!r} is not valid JSON ({error}).",
            hint="Save the model again.",
        ) from error
    if not isinstance(config, dict):
        raise BackendError(
            f"model: config.json in {folder.name!r} is no JSON object.", hint="Save the model again."
        )
    _check_code(config, folder)
    names = config.get("architectures") or []
    causal = ("CausalLM", "LMHeadModel", "ForConditionalGeneration")
    if config.get("is_encoder_decoder") or (names and not any(name.endswith(causal) for name in names)):
        raise BackendError(
            f"model: {folder.name!r} ({', '.join(names) or 'encoder-decoder'}) is no causal language model.",
            hint="Take a decoder-only model, for example a Llama, Qwen, Gemma, Mistral or GPT-2.",
        )
    if not any(folder.glob("*.safetensors")):
        raise BackendError(
            f"model: {folder.name!r} has no *.safetensors file; pickled weights are never loaded.",
            hint="Save the model with model.save_pretrained(folder).",
        )
    result: dict[str, Any] = config
    return result


def _check_code(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model that needs code from its own folder, or sets what only transformers itself may set."""
    internal = sorted(
        key
        for part in (config, *(v for v in config.values() if isinstance(v, Mapping)))
        for key in part
        if key.startswith(("_attn_implementation", "_experts_implementation"))
    )
    if internal:
        raise BackendError(
            f"model: config.json in {folder.name!r} sets {', '.join(internal)}, through which code could be loaded.",
            hint="Remove it, if you trust the rest.",
        )
    if "auto_map" in config:
        known = require("transformers.models.auto.configuration_auto", "transformers").CONFIG_MAPPING_NAMES
        if config.get("model_type") not in known:
            raise BackendError(
                f"model: {folder.name!r} brings code of its own (auto_map), and such code is never run.",
                hint="Take a model whose architecture the installed transformers knows.",
            )


def _check_links(folder: Path) -> None:
    """Refuse links out of the folder; a hub's cache links to its own ``blobs``, next to ``snapshots``."""
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    names = [folder / name for name in _DESCRIBING] + sorted(folder.glob("*.safetensors"))
    for file in names:
        if file.is_symlink() and not any(file.resolve().is_relative_to(place) for place in allowed):
            raise BackendError(
                f"model: {file.name} in {folder.name!r} is a link to somewhere else.",
                hint="Put the file itself into the folder.",
            )


def context_limit(config: Mapping[str, Any]) -> int | None:
    """Most tokens the model can read, or ``None`` if its configuration does not say."""
    inner = config.get("text_config") or {}
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "seq_length"):
        for source in (config, inner):
            if isinstance(source.get(key), int):
                return int(source[key])
    return None


def stored_dtype(config: Mapping[str, Any]) -> str:
    """Name of the number type the weights were saved in; ``"float32"`` where the configuration is silent."""
    inner = config.get("text_config") or {}
    for source in (config, inner):
        for key in ("dtype", "torch_dtype"):
            if source.get(key):
                return str(source[key])
    return "float32"


def hash_folder(folder: Path) -> str:
    """SHA-256 that tells models apart, from small reads.

    Notes
    -----
    Hashed are: the configuration, generation and tokenizer files and the weight index in full; of each
    ``*.safetensors`` file its name, its size, its header, and of every tensor the first and the middle 128
    bytes. Weights are not read in full, so that a start costs milliseconds: fine-tuning changes whole
    tensors, but a change of single values elsewhere in a tensor goes unseen.
    """
    digest = hashlib.sha256()
    for name in _DESCRIBING:
        file = folder / name
        if file.is_file():
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        _hash_weights(file, digest)
    return digest.hexdigest()


def _hash_weights(file: Path, digest: Any) -> None:
    try:
        with file.open("rb", buffering=0) as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size - 8:
                raise ValueError("the header is longer than the file")
            header = stream.read(length)
            digest.update(header)
            for name, entry in sorted(json.loads(header).items()):
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                for offset in (begin, (begin + end) // 2):
                    stream.seek(8 + length + offset)
                    digest.update(stream.read(min(_SAMPLE, end - offset)))
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise BackendError(
            f"model: {file.name} in {file.parent.name!r} is not a readable safetensors file ({error}).",
            hint="The file may be cut off; copy or save the model again.",
        ) from error
