"""Recorded leave-one-out scores of several models on the same prompts: read, checked, and served as recordings.

One JSON object a line (plain or gzip): ``id``, ``bench``, ``labels``, ``roles`` (one a segment), optionally ``gold``, and
``models``, which maps a name to ``orig`` (a log-probability a label), ``loo`` (the same with each segment left out, in
order) and optionally ``orig_retest`` (the whole prompt asked again). ``null`` is a label that the provider did not list:
censored, not missing.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proxyprompt.errors import DataError, InputError, RecordingMissingError

from .base import ScoreRequest, ScoreResult

__all__ = ["LeaveOneOutCase", "LeaveOneOutScores", "leave_one_out_recordings", "load_leave_one_out"]


@dataclass(frozen=True, eq=False)
class LeaveOneOutScores:
    """One model on one prompt.

    Attributes
    ----------
    orig : ndarray of float64, shape (n_labels,)
        Log-probability of each label for the whole prompt; NaN: censored.
    loo : ndarray of float64, shape (n_left_out, n_labels)
        With segment ``k`` left out; a model may have been asked for the first segments only.
    retest : ndarray of float64, shape (n_labels,), or None
        The whole prompt asked a second time.
    """

    orig: NDArray[np.float64]
    loo: NDArray[np.float64]
    retest: NDArray[np.float64] | None


@dataclass(frozen=True, eq=False)
class LeaveOneOutCase:
    """One prompt and every model's scores.

    Attributes
    ----------
    id, bench : str
    labels : tuple of str
    gold : str or None
    roles : tuple of str, length n_segments
        What each segment is: ``"system"``, ``"context"``, ``"query"``.
    models : mapping of str to LeaveOneOutScores
    """

    id: str
    bench: str
    labels: tuple[str, ...]
    gold: str | None
    roles: tuple[str, ...]
    models: Mapping[str, LeaveOneOutScores]

    def scores(self, model: str, segment: int | None = None) -> NDArray[np.float64]:
        """Log-probability of each label, NaN where censored.

        Parameters
        ----------
        model : str
        segment : int, optional
            The segment left out; ``None``: the whole prompt.

        Raises
        ------
        RecordingMissingError
            If the model, or the model without this segment, was not recorded.
        """
        if model not in self.models:
            raise RecordingMissingError(
                f"No recording of {model!r} for case {self.id!r}.",
                hint=f"Recorded there: {', '.join(self.models)}.",
            )
        found = self.models[model]
        if segment is None:
            return found.orig
        if not 0 <= segment < len(found.loo):
            raise RecordingMissingError(
                f"No recording of {model!r} for case {self.id!r} without segment {segment} of {len(self.roles)};"
                f" segments 0 to {len(found.loo) - 1} were left out.",
                hint="Ask this model about those only.",
            )
        row: NDArray[np.float64] = found.loo[segment]
        return row


def load_leave_one_out(
    path: str | os.PathLike[str], *, bench: str | None = None
) -> tuple[LeaveOneOutCase, ...]:
    """Read a file of leave-one-out scores; the whole file is checked.

    Parameters
    ----------
    path : str or path
    bench : str, optional
        Only the cases of this benchmark.

    Returns
    -------
    tuple of LeaveOneOutCase

    Raises
    ------
    DataError
        If the file cannot be read, or a line breaks the format (the message gives its number).
    InputError
        If ``bench`` is not in the file.
    """
    where = Path(path)
    try:
        content = where.read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{where} cannot be read: {error}.", hint="Give a JSON Lines file.") from error
    cases = [_case(line, f"{where}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    chosen = tuple(c for c in cases if bench in (None, c.bench))
    if not chosen:
        raise InputError(
            f"bench={bench!r} is not in {where}, which holds {', '.join(sorted({c.bench for c in cases})) or 'nothing'}."
        )
    return chosen


def leave_one_out_recordings(
    case: LeaveOneOutCase, segments: tuple[str, ...], model: str, *, floor: float
) -> Iterator[tuple[ScoreRequest, ScoreResult]]:
    """One model's scores of one prompt as recordings, for :func:`~proxyprompt.backends.replay.write_recordings`.

    Parameters
    ----------
    case : LeaveOneOutCase
    segments : tuple of str
        Texts that make the prompt when joined; the prompt without segment ``k`` has that one empty.
    model : str
    floor : float
        Log-probability that stands for a censored label, as its upper bound; at most 0.

    Yields
    ------
    (ScoreRequest, ScoreResult)
        The whole prompt first. Candidates are the case's labels.

    Raises
    ------
    InputError
        If the number of segments is another, or ``floor`` is above 0.
    RecordingMissingError
        If the model was not recorded.
    """
    if len(segments) != len(case.roles):
        raise InputError(f"segments: {len(segments)} for case {case.id!r}, which has {len(case.roles)}.")
    if not floor <= 0:
        raise InputError(f"floor={floor}: a log-probability is at most 0.")
    case.scores(model)
    for k in (None, *range(len(case.models[model].loo))):
        row = case.scores(model, k)
        censored = np.isnan(row)
        prompt = "".join(text for i, text in enumerate(segments) if i != k)
        yield (
            ScoreRequest(prompt, case.labels),
            ScoreResult(
                tuple(np.where(censored, floor, np.minimum(row, 0.0)).tolist()),
                tuple(censored.tolist()),
                model_returned=model,
            ),
        )


def _case(line: str, where: str) -> LeaveOneOutCase:
    try:
        entry = json.loads(line)
        labels, roles = tuple(map(str, entry["labels"])), tuple(map(str, entry["roles"]))
        models = {str(name): _scores(scores, len(labels)) for name, scores in entry["models"].items()}
        case = LeaveOneOutCase(
            str(entry["id"]), str(entry["bench"]), labels, entry.get("gold"), roles, models
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: not a case of leave-one-out scores ({error!r}).") from error
    for name, found in models.items():
        if len(found.loo) > len(roles):
            raise DataError(f"{where}: {name} has {len(found.loo)} ablations for {len(roles)} segments.")
    return case


def _scores(entry: Mapping[str, Any], n_labels: int) -> LeaveOneOutScores:
    orig = _rows([entry["orig"]], n_labels)[0]
    again = entry.get("orig_retest")
    return LeaveOneOutScores(
        orig, _rows(entry["loo"], n_labels), None if again is None else _rows([again], n_labels)[0]
    )


def _rows(rows: Any, n_labels: int) -> NDArray[np.float64]:
    array = np.array([[np.nan if v is None else float(v) for v in row] for row in rows], dtype=np.float64)
    if array.size and array.shape[1:] != (n_labels,):
        raise ValueError(f"{array.shape[1:]} log-probabilities for {n_labels} labels")
    array = array.reshape(-1, n_labels)
    array.setflags(write=False)
    return array
