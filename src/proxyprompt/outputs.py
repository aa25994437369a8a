"""Files of a run: artifact.json, prompt.json, report.html, report.md, all private to their owner."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .artifact import Artifact
from .data import save_prompt, write_private
from .errors import InputError

__all__ = ["prepare_folder", "write_outputs"]


def prepare_folder(folder: Path) -> Path:
    """Make the output folder, mode 0700 if it is new.

    Raises
    ------
    InputError
        If it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = folder / ".proxyprompt-write-test"
        write_private(probe, "")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"output: {str(folder)!r} cannot be written ({error.strerror or error}).",
            hint="Name another folder.",
        ) from error
    return folder


def write_outputs(artifact: Artifact, folder: Path) -> Mapping[str, Path]:
    """Write everything that a run leaves behind.

    Returns
    -------
    mapping of str to Path
        ``artifact``, ``prompt`` (the prompt to deploy), ``html``, ``markdown``.
    """
    from .report import render_html, render_markdown

    paths = {
        "artifact": folder / "artifact.json",
        "prompt": folder / "prompt.json",
        "html": folder / "report.html",
        "markdown": folder / "report.md",
    }
    artifact.save(paths["artifact"])
    save_prompt(artifact.prompt, paths["prompt"])
    write_private(paths["html"], render_html(artifact.summary))
    write_private(paths["markdown"], render_markdown(artifact.summary))
    return paths
