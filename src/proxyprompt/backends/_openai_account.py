"""What is asked of the provider's account, and costs nothing: its batches and the files with their results."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from proxyprompt.errors import BackendError

from ._openai_connection import Connection
from ._openai_jobs import read_jobs
from .base import BatchStatus, Journal

STOPPED = frozenset({"cancelled", "canceled", "failed"})
"""States of batches that were ended on purpose: what has no answer then is not sent again."""

OVER = STOPPED | {"completed", "expired"}


def is_gone(error: BackendError) -> bool:
    """Whether the server said that it does not know what it was asked for."""
    return "HTTP 404: " in error.message or "HTTP 410: " in error.message


def cancel(connection: Connection, journal: Journal) -> list[str]:
    """Ask the provider to stop all batches of a journal; what they have answered is still collected by the next run.

    Batches that the provider does not know, or whose results it has deleted, are forgotten: what they held is bought anew.

    Returns
    -------
    list of str
        Ids of the batches that were still at work.
    """
    stopped = []
    for job in read_jobs(journal):
        if job.batch is None:
            continue
        try:
            status = connection.manage(partial(retrieve, job.batch))
            if status.status in OVER:
                for file in filter(None, (status.output_file_id, status.error_file_id)):
                    connection.manage(partial(content, file))
        except BackendError as error:
            if not is_gone(error):
                raise
            journal.write(job.name, None)  # on request, and only then
            continue
        if status.status not in OVER:
            connection.manage(partial(_cancel, job.batch))
            stopped.append(job.batch)
    return stopped


def states(connection: Connection, journal: Journal) -> list[BatchStatus]:
    """Every batch of a journal and where it stands, oldest first; changes nothing."""
    found = []
    for job in read_jobs(journal):
        status = "not accepted yet"
        if job.batch is not None:
            try:
                status = str(connection.manage(partial(retrieve, job.batch)).status)
            except BackendError as error:
                if not is_gone(error):
                    raise
                status = "gone"
        found.append(BatchStatus(job.batch, status, len(job.keys), len(job.left()), job.created))
    return found


def list_batches(more: Mapping[str, str], client: Any) -> Any:
    return client.batches.list(limit=100, **more)


def retrieve(batch: str, client: Any) -> Any:
    return client.batches.retrieve(batch)


def _cancel(batch: str, client: Any) -> Any:
    return client.batches.cancel(batch)


def content(file: str, client: Any) -> Any:
    return client.files.content(file)
