"""What the journal holds of a provider's batches, by which a later process goes on with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from proxyprompt.errors import BackendError

from ._openai_wire import Endpoint
from .base import Evidence, Journal


@dataclass
class Job:
    """One batch as the journal knows it; ``batch`` is ``None`` until the provider has accepted it.

    Not ``greedy`` where the server takes no temperature, so that tokens are drawn.
    """

    name: str
    endpoint: Endpoint
    kind: Literal["score", "generate"]
    keys: list[str]
    evidence: Evidence | None = None
    copies: int = 1
    file: str | None = None
    batch: str | None = None
    created: float = 0.0
    delivered: list[str] = field(default_factory=list)
    greedy: bool = True

    def save(self, journal: Journal) -> None:
        """Write the entry."""
        journal.write(self.name, json.dumps(asdict(self), separators=(",", ":")))

    def custom_ids(self, key: str) -> list[str]:
        """The names of one request's lines; providers take 64 characters."""
        return [key] if self.copies == 1 else [f"{key[:56]}#{copy}" for copy in range(self.copies)]

    def left(self) -> list[str]:
        """Keys that have not been handed to a caller yet."""
        done = set(self.delivered)
        return [key for key in self.keys if key not in done]


def read_jobs(journal: Journal) -> list[Job]:
    """All jobs of a journal; what cannot be read was written by another version and is an error."""
    jobs = []
    for name, entry in journal.read().items():
        try:
            jobs.append(Job(**json.loads(entry)))
        except (ValueError, TypeError) as error:
            raise BackendError(
                f"The journal's entry {name!r} is not understood: {error}.",
                hint="It was written by another version; use that one to collect the batch.",
            ) from error
    return jobs


def positions(journal: Journal) -> dict[str, int]:
    """Where each key stands in ``journal.keys``, also under the name that an earlier version wrote down."""
    former = getattr(journal, "former_keys", ())
    return {key: index for keys in (former, journal.keys) for index, key in enumerate(keys)}


def under_way(journal: Journal) -> list[int]:
    """Indices of the requests of ``journal.keys`` that an earlier process sent and nobody has collected."""
    where = positions(journal)
    return sorted({where[key] for job in read_jobs(journal) for key in job.left() if key in where})


class Forgetful:
    """A journal that lives as long as one call."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = keys
        self._entries: dict[str, str] = {}

    def read(self) -> Mapping[str, str]:
        """All entries by name."""
        return self._entries

    def write(self, name: str, entry: str | None) -> None:
        """Set or remove one entry."""
        self._entries.pop(name, None)
        if entry is not None:
            self._entries[name] = entry
