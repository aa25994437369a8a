"""Reading and writing demonstrations, queries and prompts: JSON, JSON Lines (also .gz), CSV, lists of dicts.

A row is ``{"id", "input", "label", "choices"}``; ``inputs`` may give several named fields instead of
``input``, and ``output`` may stand for ``label``. Other text columns become template fields as well.
Every error names the file and the row before any model is loaded.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError
from .prompt import ChatForm, Demonstration, FewShotPrompt, Query

__all__ = [
    "Splits",
    "load_demonstrations",
    "load_prompt",
    "load_queries",
    "save_prompt",
    "split_queries",
    "write_private",
]

_RESERVED = frozenset(
    {"id", "label", "output", "reference", "choices", "meta", "split", "note", "references", "inputs"}
)
_PROMPT_KEYS = frozenset(
    {
        "instruction",
        "demonstration_template",
        "query_template",
        "separator",
        "style",
        "answer_style",
        "chat_form",
        "demonstrations",
    }
)
SPLIT_NAMES = ("explain", "select", "sealed")

Rows = str | os.PathLike[str] | Iterable[Mapping[str, Any]]


def read_rows(source: Rows) -> list[tuple[str, Mapping[str, Any]]]:
    """Rows with a name for each (``file:line``), from a path or from a list of dicts."""
    if not isinstance(source, str | os.PathLike):
        return [(f"row {i + 1}", _mapping(row, f"row {i + 1}")) for i, row in enumerate(source)]
    path = Path(source)
    name = path.name[:-3] if path.name.endswith(".gz") else path.name
    text = read_text(path)
    if name.endswith(".csv"):
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        return [(f"{path}:{i + 2}", _csv_row(row, f"{path}:{i + 2}")) for i, row in enumerate(rows)]
    if name.endswith(".json"):
        data = parse_json(text, str(path))
        if not isinstance(data, list):
            raise DataError(f"{path}: a list of rows is needed; got {type(data).__name__}.")
        return [(f"{path}[{i}]", _mapping(row, f"{path}[{i}]")) for i, row in enumerate(data)]
    if name.endswith((".jsonl", ".ndjson")):
        lines = [(i + 1, line) for i, line in enumerate(text.split("\n")) if line.strip()]
        return [
            (f"{path}:{i}", _mapping(parse_json(line, f"{path}:{i}"), f"{path}:{i}")) for i, line in lines
        ]
    raise DataError(f"{path}: the ending is not known; use .jsonl, .json or .csv (each also with .gz).")


def read_text(path: Path) -> str:
    """UTF-8 text of a file, plain or gzip, with every failure as a :class:`DataError`."""
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.name.endswith(".gz") else raw).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file.", hint="Paths in a config are relative to the config's folder."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {error.start}).", hint="Save the file as UTF-8."
        ) from error
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error.__class__.__name__}: {error}).") from error


def load_demonstrations(source: Rows) -> tuple[Demonstration, ...]:
    """Read demonstrations; order is the order of the rows.

    Parameters
    ----------
    source : path or iterable of mappings

    Raises
    ------
    DataError
        Missing id, input or label; ids used twice; unreadable file.
    """
    demonstrations = []
    seen: dict[str, str] = {}
    for where, row in read_rows(source):
        identifier = _identifier(row, where, seen)
        output = _answer(row, where, ("output", "label"))
        demonstrations.append(Demonstration(identifier, _inputs(row, where), output, _choices(row, where)))
    return tuple(demonstrations)


def load_queries(source: Rows) -> list[tuple[Query, str | None]]:
    """Read queries together with the name of their split, if the rows give one."""
    queries = []
    seen: dict[str, str] = {}
    for where, row in read_rows(source):
        identifier = _identifier(row, where, seen)
        reference = _answer(row, where, ("reference", "label", "output"))
        meta = row.get("meta")
        more = row.get("references") or (meta.get("answers") if isinstance(meta, Mapping) else None) or ()
        split = row.get("split")
        if split is not None and split not in SPLIT_NAMES:
            raise DataError(f"{where}: split {split!r} is not known; allowed: {', '.join(SPLIT_NAMES)}.")
        query = Query(identifier, _inputs(row, where), reference, _choices(row, where), tuple(map(str, more)))
        queries.append((query, split))
    return queries


class Splits(dict[str, tuple[Query, ...]]):
    """Queries by split name: ``explain`` (screening, attribution), ``select``, ``sealed`` (the certificate).

    Raises
    ------
    DataError
        If a split is empty, or a query (its id, or its text) is in two splits or twice in one.
    """

    def __init__(self, parts: Mapping[str, Sequence[Query]]) -> None:
        super().__init__({name: tuple(parts.get(name, ())) for name in SPLIT_NAMES})
        owner: dict[tuple[str, str], str] = {}
        for name, queries in self.items():
            if not queries:
                raise DataError(
                    f"split {name!r}: no queries; each of {', '.join(SPLIT_NAMES)} needs some.",
                    hint="Give more queries, or other sizes in [queries.sizes].",
                )
            for query in queries:
                content = json.dumps([sorted(query.inputs.items()), query.choices])
                for key in (("id", query.id), ("text", content)):
                    if key in owner:
                        what = f"the id {query.id!r}" if key[0] == "id" else f"the text of query {query.id!r}"
                        both = (
                            f"in the splits {owner[key]!r} and {name!r}"
                            if owner[key] != name
                            else f"twice in {name!r}"
                        )
                        raise DataError(
                            f"queries: {what} is {both}; splits must not overlap.",
                            hint="Remove the repetition: a query that helped to choose cannot certify.",
                        )
                    owner[key] = name

    def digest(self, name: str) -> str:
        """SHA-256 of the queries of a split: ids, fields, references, choices."""
        body = [[q.id, sorted(q.inputs.items()), q.reference, q.choices, q.references] for q in self[name]]
        return hashlib.sha256(json.dumps(body, ensure_ascii=True).encode()).hexdigest()


def split_queries(
    queries: Sequence[tuple[Query, str | None]],
    *,
    sizes: Mapping[str, int] | None = None,
    rng: np.random.Generator,
) -> Splits:
    """Use the splits that the rows name, or draw disjoint ones, stratified by reference.

    Parameters
    ----------
    queries : sequence of (Query, split name or None)
    sizes : mapping, optional
        Number of queries of each split; of splits that the rows name, the first of each reference in turn.
        Default where the rows name none: one quarter to explain, one quarter to select, half sealed.
    rng : numpy.random.Generator

    Raises
    ------
    DataError
        If only some rows name a split, or the sizes ask for more queries than there are.
    """
    named = [split for _, split in queries if split is not None]
    if named and len(named) < len(queries):
        raise DataError(f"queries: {len(named)} of {len(queries)} rows name a split; all or none must.")
    if named:
        parts = {name: [q for q, split in queries if split == name] for name in SPLIT_NAMES}
        if sizes:
            parts = {name: _stratified_head(part, sizes.get(name, len(part))) for name, part in parts.items()}
        return Splits(parts)
    n = len(queries)
    wanted = dict(sizes) if sizes else {"explain": n // 4, "select": n // 4, "sealed": n - 2 * (n // 4)}
    if sum(wanted.values()) > n:
        raise DataError(
            f"queries.sizes: {wanted} asks for {sum(wanted.values())} queries; there are {n}.",
            hint="Ask for fewer, or give more rows.",
        )
    order = _stratified_order([q for q, _ in queries], rng)
    parts, start = {}, 0
    for name in SPLIT_NAMES:
        parts[name] = [queries[i][0] for i in order[start : start + wanted.get(name, 0)]]
        start += wanted.get(name, 0)
    return Splits(parts)


def _stratified_head(queries: Sequence[Query], size: int) -> list[Query]:
    """The first queries of each reference, in equal shares, in their own order."""
    count: dict[str, int] = {}
    turn = []
    for i, query in enumerate(queries):
        count[query.reference] = count.get(query.reference, 0) + 1
        turn.append((count[query.reference], i))
    return [queries[i] for i in sorted(i for _, i in sorted(turn)[:size])]


def _stratified_order(queries: Sequence[Query], rng: np.random.Generator) -> list[int]:
    """An order whose every stretch has about the same share of each reference."""
    keys = rng.random(len(queries))
    groups: dict[str, list[int]] = {}
    for i in np.argsort(keys):
        groups.setdefault(queries[i].reference, []).append(int(i))
    place = {i: ((k + keys[i]) / len(members)) for members in groups.values() for k, i in enumerate(members)}
    return sorted(place, key=lambda i: (place[i], i))


def prompt_from_mapping(data: Mapping[str, Any], *, demonstrations: Rows | None = None) -> FewShotPrompt:
    """Build a prompt from a mapping of its fields; unknown fields are an error.

    Only ``demonstrations`` may name a file. The mapping may come from somebody else's file, so a path in it is
    refused, never followed.
    """
    unknown = sorted(set(data) - _PROMPT_KEYS)
    if unknown:
        raise DataError(f"prompt: unknown fields {unknown}; known: {', '.join(sorted(_PROMPT_KEYS))}.")
    rows = demonstrations if demonstrations is not None else data.get("demonstrations")
    if rows is None:
        raise DataError(
            "prompt: no demonstrations given.", hint="Name a file, or put rows under 'demonstrations'."
        )
    if demonstrations is None and not isinstance(rows, list | tuple):
        raise DataError(
            f"prompt: demonstrations must be a list of rows; got {type(rows).__name__}.",
            hint="A stored prompt holds its rows; only a configuration may name a file.",
        )
    settings = {k: v for k, v in data.items() if k not in ("chat_form", "demonstrations") and v is not None}
    for key, value in settings.items():
        if not isinstance(value, str):
            raise DataError(f"prompt: {key} must be text; got {type(value).__name__}.")
    form = ChatForm.from_dict(_mapping(data.get("chat_form") or {}, "prompt: chat_form"))
    return FewShotPrompt(demonstrations=load_demonstrations(rows), chat_form=form, **settings)


def load_prompt(path: str | os.PathLike[str]) -> FewShotPrompt:
    """Read a prompt that :func:`save_prompt` wrote, or one written by hand in the same form."""
    data = parse_json(read_text(Path(path)), str(path))
    if isinstance(data, Mapping) and "prompt" in data and "demonstrations" not in data:
        data = data["prompt"]
    return prompt_from_mapping(_mapping(data, str(path)))


def save_prompt(prompt: FewShotPrompt, path: str | os.PathLike[str]) -> None:
    """Write a prompt as JSON, readable by its owner only."""
    write_private(Path(path), json.dumps(prompt.to_dict(), indent=2, ensure_ascii=False) + "\n")


def write_private(path: Path, text: str) -> None:
    """Write a file all or nothing, mode 0600; a folder made on the way gets 0700."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def parse_json(text: str, where: str) -> Any:
    """JSON from a file, every failure as a :class:`DataError` that says where."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}).") from error


def _mapping(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a row is an object with id, input and label; got {type(row).__name__}.")
    return row


def _csv_row(row: Mapping[str | None, Any], where: str) -> dict[str, Any]:
    if None in row:
        raise DataError(
            f"{where}: more cells than the header has columns.", hint="Quote cells that hold commas."
        )
    out: dict[str, Any] = {str(k): v for k, v in row.items() if v not in (None, "")}
    if "choices" in out:
        out["choices"] = parse_json(out["choices"], f"{where} (choices)")
    return out


def _identifier(row: Mapping[str, Any], where: str, seen: dict[str, str]) -> str:
    value = row.get("id")
    if value is None or value == "":
        raise DataError(f"{where}: no id.", hint="Give every row a unique id.")
    identifier = str(value)
    if identifier in seen:
        raise DataError(f"{where}: the id {identifier!r} was used at {seen[identifier]}; ids are unique.")
    seen[identifier] = where
    return identifier


def _answer(row: Mapping[str, Any], where: str, names: tuple[str, ...]) -> str:
    for name in names:
        if row.get(name) is not None:
            value = row[name]
            if isinstance(value, bool | list | dict):
                raise DataError(f"{where}: {name} must be text; got {value!r}.")
            return str(value)
    raise DataError(f"{where}: no label.", hint=f"One of {', '.join(names)} must be given.")


def _inputs(row: Mapping[str, Any], where: str) -> dict[str, str]:
    given = row.get("inputs")
    if given is None:
        given = {k: v for k, v in row.items() if k not in _RESERVED and isinstance(v, str | int | float)}
        if not given:
            raise DataError(f"{where}: no input.", hint="Give 'input', or named fields under 'inputs'.")
    values = _mapping(given, f"{where} (inputs)")
    for key, value in values.items():
        if isinstance(value, bool | list | dict) or value is None:
            raise DataError(f"{where}: field {key!r} must be text; got {value!r}.")
    return {str(k): str(v) for k, v in values.items()}


def _choices(row: Mapping[str, Any], where: str) -> tuple[str, ...] | None:
    value = row.get("choices")
    if value is None:
        return None
    if (
        not isinstance(value, list | tuple)
        or not all(isinstance(c, str) for c in value)
        or len(set(value)) != len(value)
    ):
        raise DataError(f"{where}: choices must be a list of different texts; got {value!r}.")
    return tuple(value)
