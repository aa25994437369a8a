"""The saved result: JSON, versioned, readable by every integration.

An artifact holds the prompt before and after, what was removed and why, the attributions with their standard
errors, the screening evidence, the certificate, the costs, and the versions and settings that made it. No path
and no endpoint in it is ever followed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data import prompt_from_mapping, write_private
from .errors import ArtifactError, ProxyPromptError
from .prompt import FewShotPrompt

__all__ = ["SCHEMA", "Artifact"]

SCHEMA = 1
KIND = "proxyprompt-artifact"
_LIMIT = 64 * 1024 * 1024


@dataclass(frozen=True)
class Artifact:
    """A result that can be stored, read back and applied.

    Parameters
    ----------
    body : mapping
        The JSON object; see the keys below.

    Attributes
    ----------
    original, prompt : FewShotPrompt
        The prompt as it was, and as it should be deployed.
    kept, removed : tuple of str
        Ids of demonstrations: kept ones in the order that is deployed, removed ones in the original prompt's.
    certified : bool
        Whether the certificate holds for ``prompt``.
    summary : mapping
        What the report shows.
    """

    body: Mapping[str, Any]

    @property
    def original(self) -> FewShotPrompt:
        """The prompt before."""
        return prompt_from_mapping(self.body["original_prompt"])

    @property
    def prompt(self) -> FewShotPrompt:
        """The prompt to deploy."""
        return self.original.reorder(self.kept)

    @property
    def kept(self) -> tuple[str, ...]:
        """Ids of the demonstrations that stay, in the order in which they are deployed."""
        return tuple(self.body["kept"])

    @property
    def removed(self) -> tuple[str, ...]:
        """Ids of the demonstrations that go."""
        return tuple(self.body["removed"])

    @property
    def certified(self) -> bool:
        """Whether the shipped prompt carries a certificate."""
        certificate = self.body.get("certificate")
        return bool(certificate and certificate["decision"] == "certified")

    @property
    def summary(self) -> Mapping[str, Any]:
        """What the report shows."""
        return dict(self.body["summary"])

    def to_json(self) -> str:
        """Text of the file."""
        return json.dumps(self.body, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the artifact, readable by its owner only."""
        write_private(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Artifact:
        """Read an artifact.

        Raises
        ------
        ArtifactError
            Not readable, not an artifact, of a newer schema, or inconsistent in itself.
        """
        path = Path(path)
        try:
            if path.stat().st_size > _LIMIT:
                raise ArtifactError(f"{path}: larger than {_LIMIT >> 20} MiB; not an artifact of ours.")
            body = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read ({error.strerror or error}).") from error
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{path}: not valid JSON ({error}).") from error
        if not isinstance(body, dict) or body.get("kind") != KIND:
            raise ArtifactError(f"{path}: not a ProxyPrompt artifact (kind is {_kind(body)!r}).")
        if body.get("schema") != SCHEMA:
            raise ArtifactError(
                f"{path}: schema {body.get('schema')!r}; this version reads {SCHEMA}.",
                hint="Install the version of proxyprompt-core that wrote it.",
            )
        artifact = cls(body)
        try:
            for name in ("kept", "removed"):
                if not isinstance(body[name], list):
                    raise ArtifactError(f"{path}: {name} must be a list of ids.")
            ids = [d.id for d in artifact.original.demonstrations]
            if sorted([*artifact.kept, *artifact.removed]) != sorted(ids):
                raise ArtifactError(f"{path}: kept and removed do not add up to the original demonstrations.")
        except (KeyError, TypeError, ProxyPromptError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(f"{path}: the stored prompt is not readable ({error}).") from error
        return artifact


def _kind(body: Any) -> Any:
    return body.get("kind") if isinstance(body, dict) else type(body).__name__
