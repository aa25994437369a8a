"""Run configurations in TOML: read, checked completely before any model is loaded.

::

    title = "Support routing"
    output = "out"
    tau = 0.9                      # or: margin = 0.02
    confidence = 0.95
    seed = 0

    [prompt]                       # or: file = "prompt.json"
    instruction = "..."
    demonstration_template = "Message: {input}\\nTeam: {output}"
    demonstrations = "demonstrations.jsonl"

    [queries]
    file = "queries.jsonl"         # rows may name their split; or explain/select/sealed = "..." each
    sizes = {explain = 40, select = 60, sealed = 120}

    [task]
    kind = "label"
    labels = ["billing", "delivery"]

    [target]
    model = "embedded:gemma-3-270m"

    [[proxies]]
    model = "embedded:smollm2-135m"

    [budget]
    max_calls = 20000              # also max_tokens; max_usd, or max_cost in the currency of [price]

    [ledger]
    store = "encrypted"            # or "hash", "full"
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .backends.base import Backend, Generator, Scorer
from .data import (
    SPLIT_NAMES,
    Splits,
    load_queries,
    parse_json,
    prompt_from_mapping,
    read_text,
    split_queries,
)
from .errors import ConfigError, DataError, InputError
from .ledger import StoreMode
from .models import open_model
from .prompt import Demonstration, FewShotPrompt, Query
from .settings import Settings
from .task import LabelTask, Task, TextTask

__all__ = ["RunConfig", "load_config"]

_SECTIONS: dict[str, frozenset[str]] = {
    "": frozenset({"title", "output", "tau", "margin", "confidence", "seed"}),
    "prompt": frozenset(
        {
            "file",
            "demonstrations",
            "instruction",
            "demonstration_template",
            "query_template",
            "separator",
            "style",
            "answer_style",
        }
    ),
    "queries": frozenset({"file", "sizes", *SPLIT_NAMES}),
    "task": frozenset({"kind", "labels", "metric", "max_tokens", "stop"}),
    "screening": frozenset(
        {
            "method",
            "on",
            "tau",
            "delta",
            "ensemble",
            "repeats",
            "max_pairs",
            "block",
            "fit_coalitions",
            "judge_coalitions",
        }
    ),
    "attribution": frozenset(
        {
            "explainer",
            "proxy_coalitions",
            "calibrate",
            "oracle_queries",
            "error",
            "calls",
            "money",
            "verify",
            "verify_top",
            "verify_level",
            "verify_calls",
        }
    ),
    "clean": frozenset(
        {
            "enabled",
            "level",
            "suspect_level",
            "max_suspects",
            "rounds",
            "reexplain_calls",
            "prior",
            "relabel",
            "relabel_level",
        }
    ),
    "compress": frozenset(
        {
            "max_evaluations",
            "search_level",
            "keep",
            "keep_labels",
            "per",
            "interactions",
            "max_demonstrations",
            "max_tokens",
            "orders",
        }
    ),
    "certificate": frozenset({"method", "block"}),
    "budget": frozenset({"max_calls", "max_tokens", "max_usd", "max_cost"}),
    "ledger": frozenset({"store", "key_file"}),
    "price": frozenset(
        {
            "input_per_million",
            "output_per_million",
            "cached_input_per_million",
            "cache_write_per_million",
            "batch_discount",
            "currency",
            "source",
            "date",
            "model",
        }
    ),
    "caching": frozenset({"minimum_tokens", "increment_tokens", "hit_rate", "calls_per_hour"}),
    "report": frozenset({"text"}),
}
_RENAMED = {
    ("screening", "method"): "screening_method",
    ("screening", "on"): "screening_on",
    ("screening", "tau"): "screening_tau",
    ("screening", "delta"): "screening_delta",
    ("screening", "ensemble"): "screening_ensemble",
    ("screening", "repeats"): "screening_repeats",
    **{("attribution", key): f"attribution_{key}" for key in ("error", "calls", "money")},
    ("screening", "block"): "screening_block",
    ("clean", "enabled"): "clean",
    ("clean", "level"): "clean_level",
    ("clean", "rounds"): "clean_rounds",
    ("clean", "prior"): "clean_prior",
    ("certificate", "method"): "certificate_method",
    ("certificate", "block"): "certificate_block",
    ("budget", "max_calls"): "budget_calls",
    ("budget", "max_tokens"): "budget_tokens",
    ("budget", "max_usd"): "budget_usd",
    ("budget", "max_cost"): "budget_cost",
    **{("price", key): f"price_{key}" for key in _SECTIONS["price"]},
    **{("caching", key): f"cache_{key}" for key in ("minimum_tokens", "increment_tokens", "hit_rate")},
}


_OLD_NAMES = {("budget", "target_calls"): "max_calls", ("budget", "target_tokens"): "max_tokens"}


@dataclass(frozen=True)
class RunConfig:
    """A checked configuration: everything a run needs, models named but not loaded."""

    title: str
    output: Path
    prompt: FewShotPrompt
    task: Task
    splits: Splits
    target: Backend
    proxies: tuple[Backend, ...]
    settings: Settings
    report_text: Literal["all", "removed", "none"] = "removed"
    notes: tuple[str, ...] = field(default=())
    store: StoreMode | None = None
    key_file: Path | None = None


def load_config(path: str | os.PathLike[str], *, output: str | os.PathLike[str] | None = None) -> RunConfig:
    """Read and check a configuration file.

    Parameters
    ----------
    path : path
        TOML; paths inside are relative to its folder.
    output : path, optional
        Overrides the output folder.

    Raises
    ------
    ConfigError, DataError, ModelSpecError
        With section, key, value, rule and remedy. Nothing has been loaded or written.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: malformed TOML ({error}).") from error
    except DataError as error:
        raise ConfigError(error.message, hint=error.hint) from error
    return config_from_mapping(raw, folder=path.parent, where=str(path), output=output)


def config_from_mapping(
    raw: Mapping[str, Any],
    *,
    folder: Path,
    where: str = "config",
    output: str | os.PathLike[str] | None = None,
) -> RunConfig:
    """Check a configuration that is already parsed; see :func:`load_config`."""
    _known_keys(raw, where)
    settings = _settings(raw, where)
    prompt = _prompt(raw.get("prompt"), folder, where)
    rng = np.random.default_rng([settings.seed, 7])
    splits = _splits(raw.get("queries"), folder, where, rng)
    task = _task(raw.get("task", {}), prompt, splits, where)
    task.validate(prompt.demonstrations, (q for queries in splits.values() for q in queries))
    _keep_known(settings, prompt)
    for query in (q for queries in splits.values() for q in queries[:1]):
        prompt.render(np.zeros(prompt.n_units, dtype=bool).tolist(), query)
    target = _model(raw.get("target"), "target", folder, where, task)
    proxies = raw.get("proxies", [])
    if not isinstance(proxies, list):
        raise ConfigError(
            f"{where}: proxies must be tables written [[proxies]]; got {type(proxies).__name__}."
        )
    text = raw.get("report", {}).get("text", "removed")
    if text not in ("all", "removed", "none"):
        raise ConfigError(f"{where}: report.text: got {text!r}; allowed: all, removed, none.")
    store, key_file = _ledger(raw.get("ledger", {}), folder, where, task)
    opened = tuple(_model(p, f"proxies[{i}]", folder, where, task) for i, p in enumerate(proxies))
    names = [b.name for b in opened]
    if len(set(names)) < len(names):
        raise ConfigError(f"{where}: proxies: {names} names a model twice.")
    out = Path(output) if output is not None else folder / str(raw.get("output", "proxyprompt-out"))
    return RunConfig(
        title=str(raw.get("title", "Few-shot prompt")),
        output=out,
        prompt=prompt,
        task=task,
        splits=splits,
        target=target,
        proxies=opened,
        settings=settings,
        report_text=text,
        notes=_notes(prompt, splits),
        store=store,
        key_file=key_file,
    )


def _ledger(
    section: Mapping[str, Any], folder: Path, where: str, task: Task
) -> tuple[StoreMode | None, Path | None]:
    store, key_file = section.get("store"), section.get("key_file")
    if store not in (None, "full", "hash", "encrypted"):
        raise ConfigError(f"{where}: ledger.store: got {store!r}; allowed: full, hash, encrypted.")
    if key_file is not None and (not isinstance(key_file, str) or store not in ("hash", "encrypted")):
        raise ConfigError(
            f"{where}: ledger.key_file: got {key_file!r}; a path, with store = 'hash' or 'encrypted'."
        )
    if store == "hash" and isinstance(task, TextTask):
        raise ConfigError(
            f"{where}: ledger.store = 'hash' keeps numbers only; the answers of a text task are none.",
            hint="Write store = 'encrypted'.",
        )
    return store, None if key_file is None else folder / Path(key_file).expanduser()


def _known_keys(raw: Mapping[str, Any], where: str) -> None:
    for key, value in raw.items():
        if key in _SECTIONS[""] or key in ("target", "proxies"):
            continue
        if key not in _SECTIONS:
            known = ", ".join(sorted([*_SECTIONS[""], *(s for s in _SECTIONS if s), "target", "proxies"]))
            raise ConfigError(f"{where}: unknown key {key!r}; known: {known}.")
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {key} must be a table; got {value!r}.")
        unknown = sorted(set(value) - _SECTIONS[key])
        for name in unknown:
            if (key, name) in _OLD_NAMES:
                new = _OLD_NAMES[key, name]
                raise ConfigError(f"{where}: [{key}] {name} is now called {new}.", hint=f"Write {new} = ...")
        if unknown:
            raise ConfigError(
                f"{where}: [{key}]: unknown keys {unknown}; known: {', '.join(sorted(_SECTIONS[key]))}."
            )


def _settings(raw: Mapping[str, Any], where: str) -> Settings:
    if "tau" in raw and "margin" in raw:
        raise ConfigError(f"{where}: tau and margin are both given; one of them decides.")
    values: dict[str, Any] = {k: raw[k] for k in ("tau", "margin", "confidence", "seed") if k in raw}
    for section in (
        "screening",
        "attribution",
        "clean",
        "compress",
        "certificate",
        "budget",
        "price",
        "caching",
    ):
        for key, value in raw.get(section, {}).items():
            values[_RENAMED.get((section, key), key)] = value
    keep = values.get("keep", ())
    if not isinstance(keep, list | tuple) or not all(isinstance(k, str) for k in keep):
        raise ConfigError(f"{where}: compress.keep must be a list of ids; got {keep!r}.")
    try:
        return Settings(**values)
    except InputError as error:
        raise ConfigError(f"{where}: {error.message}", hint=error.hint) from error


def _prompt(section: Any, folder: Path, where: str) -> FewShotPrompt:
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"{where}: no [prompt].", hint="Name demonstrations and a template, or a prompt file."
        )
    values: dict[str, Any] = {}
    if "file" in section:
        stored = parse_json(read_text(folder / str(section["file"])), str(folder / str(section["file"])))
        if not isinstance(stored, Mapping):
            raise ConfigError(f"{where}: prompt.file: {section['file']!r} is not a JSON object.")
        values.update({k: v for k, v in stored.items() if k != "labels"})
    values.update({k: v for k, v in section.items() if k not in ("file", "demonstrations")})
    rows = folder / str(section["demonstrations"]) if "demonstrations" in section else None
    prompt = prompt_from_mapping(
        {k: v for k, v in values.items() if k != "demonstrations" or rows is None}, demonstrations=rows
    )
    if prompt.n_units == 0:
        raise ConfigError(f"{where}: prompt: no demonstrations; there is nothing to attribute.")
    return prompt


def _splits(section: Any, folder: Path, where: str, rng: np.random.Generator) -> Splits:
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where}: no [queries].", hint="Name a file of labelled queries.")
    named = [name for name in SPLIT_NAMES if name in section]
    sizes = section.get("sizes")
    if sizes is not None:
        ok = isinstance(sizes, Mapping) and set(sizes) <= set(SPLIT_NAMES)
        if not ok or not all(
            isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in sizes.values()
        ):
            raise ConfigError(
                f"{where}: queries.sizes: got {sizes!r}; whole numbers for {', '.join(SPLIT_NAMES)}."
            )
    if ("file" in section) == bool(named):
        raise ConfigError(
            f"{where}: [queries] needs either file, or one file for each of {', '.join(SPLIT_NAMES)}."
        )
    if named:
        parts = {}
        for name in SPLIT_NAMES:
            if name not in section:
                raise ConfigError(f"{where}: [queries] has no {name!r}; all three splits are needed.")
            parts[name] = [q for q, _ in load_queries(folder / str(section[name]))]
        return Splits({k: v[: sizes[k]] if sizes and k in sizes else v for k, v in parts.items()})
    return split_queries(load_queries(folder / str(section["file"])), sizes=sizes, rng=rng)


def _task(section: Mapping[str, Any], prompt: FewShotPrompt, splits: Splits, where: str) -> Task:
    kind = section.get("kind", "label")
    if kind not in ("label", "choice", "text"):
        raise ConfigError(f"{where}: task.kind: got {kind!r}; allowed: label, choice, text.")
    try:
        if kind == "text":
            given = {k: section[k] for k in ("metric", "max_tokens", "stop") if k in section}
            return TextTask(**given)
        if kind == "choice":
            return LabelTask(None)
        labels = section.get("labels")
        if labels is not None and (
            not isinstance(labels, list) or not all(isinstance(x, str) for x in labels)
        ):
            raise ConfigError(f"{where}: task.labels must be a list of texts; got {labels!r}.")
        return LabelTask(tuple(labels) if labels is not None else _labels_of(prompt, splits))
    except InputError as error:
        raise ConfigError(f"{where}: [task]: {error.message}", hint=error.hint) from error


def _labels_of(prompt: FewShotPrompt, splits: Splits) -> tuple[str, ...] | None:
    """Labels where the configuration names none.

    The rows' own choices, if every row has the same; per-query choices (``None``), if they differ; else the
    labels in use, in order of first appearance.
    """
    rows: list[Demonstration | Query] = [
        *prompt.demonstrations,
        *(q for queries in splits.values() for q in queries),
    ]
    offered = {tuple(sorted(row.choices)) for row in rows if row.choices is not None}
    if all(row.choices is not None for row in rows):
        return rows[0].choices if len(offered) == 1 else None
    found = [d.output for d in prompt.demonstrations] + [q.reference for qs in splits.values() for q in qs]
    return tuple(dict.fromkeys(found))


def _keep_known(settings: Settings, prompt: FewShotPrompt) -> None:
    unknown = sorted(set(settings.keep) - {d.id for d in prompt.demonstrations})
    if unknown:
        raise ConfigError(f"compress.keep: {unknown} name no demonstration of the prompt.")


def _model(section: Any, name: str, folder: Path, where: str, task: Task) -> Backend:
    if not isinstance(section, Mapping) or not isinstance(section.get("model"), str):
        raise ConfigError(f"{where}: {name}: no model.", hint='Write model = "embedded:gemma-3-270m".')
    backend = open_model(
        section["model"], folder=folder, options={k: v for k, v in section.items() if k != "model"}
    )
    if not isinstance(backend, Generator if isinstance(task, TextTask) else Scorer):
        raise ConfigError(f"{where}: {name}: {section['model']!r} cannot do a {task.kind} task.")
    return backend


def _notes(prompt: FewShotPrompt, splits: Splits) -> tuple[str, ...]:
    shown = {tuple(sorted(d.inputs.items())) for d in prompt.demonstrations}
    both = [q.id for qs in splits.values() for q in qs if tuple(sorted(q.inputs.items())) in shown]
    if not both:
        return ()
    return (
        f"{len(both)} queries have the text of a demonstration (first: {both[0]!r}); they flatter that demonstration.",
    )
