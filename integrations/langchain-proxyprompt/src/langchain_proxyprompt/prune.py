"""From a chain with few-shot examples to the same chain with fewer of them, and the evidence."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import BaseChatModel, BaseLanguageModel
from langchain_core.runnables import Runnable

from proxyprompt import (
    Artifact,
    LabelTask,
    Query,
    Result,
    Settings,
    Splits,
    TextTask,
    build_artifact,
    open_model,
    optimize_prompt,
    split_queries,
    write_outputs,
)
from proxyprompt.backends.base import (
    Backend,
    GenerateRequest,
    GenerateResult,
    Rendered,
    ScoreRequest,
    ScoreResult,
    Usage,
)
from proxyprompt.errors import ArtifactError, DataError, InputError
from proxyprompt.program import Call, ProgramPrompt, Renderings, ScoringProgramBackend
from proxyprompt.prompt import Demonstration
from proxyprompt.report import render_markdown

from ._finding import find_template, language_models, replace_parts
from ._materialize import written_out
from ._running import ChainRunner, LoopJob, Outcome, RunFailedError, describe
from ._site import Site, open_site
from .models import TOP_LOGPROBS, ChatModelBackend, ask_labels, model_identity, uncached

__all__ = ["PrunedChain", "apply_artifact", "aprune_examples", "materialize", "prune_examples"]

Queries: TypeAlias = Sequence[tuple[Any, Any]] | Mapping[str, Sequence[tuple[Any, Any]]]
Metric: TypeAlias = str | Callable[[Any, Any], float]
_SPLITS = ("explain", "select", "sealed")


@dataclass(frozen=True)
class PrunedChain:
    """A chain with the demonstrations that were certified, and the evidence.

    Attributes
    ----------
    chain : Runnable
        Of the type of the original, which is untouched; equal to it in effect if nothing was certified.
    result : Result
        Everything that was found.
    artifact : Artifact
        The same to store; :func:`apply_artifact` reads it.
    """

    chain: Any
    result: Result
    artifact: Artifact

    @property
    def kept(self) -> tuple[str, ...]:
        """Ids of the examples that stay, in the order of the new prompt."""
        return self.artifact.kept

    @property
    def removed(self) -> tuple[str, ...]:
        """Ids of the examples that go."""
        return self.artifact.removed

    @property
    def certified(self) -> bool:
        """Whether the new prompt carries a certificate."""
        return self.artifact.certified

    @property
    def report(self) -> str:
        """Markdown; shows the text of removed examples only."""
        return render_markdown(self.artifact.summary)

    def save(self, folder: str | Path) -> Mapping[str, Path]:
        """Write artifact.json, prompt.json, report.html, report.md, readable by their owner only."""
        return write_outputs(self.artifact, Path(folder))


def prune_examples(
    chain: Runnable[Any, Any],
    *,
    queries: Queries,
    proxy: Any = None,
    proxies: Sequence[Any] = (),
    labels: Sequence[str] | None = None,
    metric: Metric | None = None,
    binary: bool = False,
    template: Any = None,
    pool: Sequence[Mapping[str, Any]] | None = None,
    freeze_selector: bool = False,
    output_key: str | None = None,
    settings: Settings | None = None,
    ledger: str | Path = "proxyprompt-out/ledger.db",
    sizes: Mapping[str, int] | None = None,
    config: Mapping[str, Any] | None = None,
    concurrency: int = 4,
    trace: bool = False,
    title: str = "LangChain few-shot prompt",
) -> PrunedChain:
    """Find out which examples of a chain's few-shot prompt earn their tokens, and return the chain without the others.

    Parameters
    ----------
    chain : Runnable
        Any Runnable that renders a few-shot prompt and asks a model with it: ``prompt | model``, ``prompt |
        model | parser``,
        inside sequences, parallels, bindings, retries, fallbacks, branches. It is run as it is, with its own rate limiter,
        callbacks and retries; it is not changed.
    queries : sequence of (inputs, reference), or mapping of split name to such
        What the chain is invoked with, and the right answer. Split by the names ``explain``, ``select``,
        ``sealed``, or drawn.
    proxy, proxies : BaseChatModel, model name or Backend
        Cheap models that may stand in for the chain's own. None: the chain explains itself.
    labels : sequence of str, optional
        The answers that are allowed, for a chain that classifies. Log-probabilities are used where the model gives them.
    metric : {"exact_match", "token_f1", "embedding"} or callable, optional
        Otherwise: how good an output is. A callable gets ``(output, reference)`` as the chain and you gave them and
        returns a score in [0, 1]. Default ``"exact_match"``.
    binary : bool
        Says that your metric gives 0 or 1 only, which allows an exact certificate.
    template : object or str, optional
        Which few-shot template, where there are several: the object or its path.
    pool : sequence of dict, optional
        Examples that an example selector may choose, where they cannot be listed.
    freeze_selector : bool
        Measure, and return, a prompt that always shows the pool's examples, instead of the selector's choice
        among the kept ones.
    output_key : str, optional
        The field of an example that holds its answer (string templates); by default the last one shown.
    settings : Settings, optional
        ``tau``, ``confidence``, budgets and everything else of a run.
    ledger : str or Path
        Where every call is recorded, so that none is paid for twice.
    sizes : mapping, optional
        Queries of each split.
    config : mapping, optional
        Runnable config that your chain needs, merged into every call's.
    concurrency : int
        Most runs of the chain at a time.
    trace : bool
        Whether the runs go to LangSmith, if that is on. There are thousands.
    title : str

    Returns
    -------
    PrunedChain

    Raises
    ------
    InputError
        If the template cannot be found, told apart or replaced; if an example would be evaluated as a
        template; if the chain
        sends another prompt than it renders.
    MaskLostError
        If a call loses its mask, for example in a thread pool of the chain's own.
    """
    return _prune(locals(), None)


async def aprune_examples(chain: Runnable[Any, Any], *, queries: Queries, **options: Any) -> PrunedChain:
    """:func:`prune_examples` for chains that are asynchronous: every run is awaited on the loop of the caller.

    When it is cancelled, the runs under way are cancelled and no other is begun; what was answered is in the ledger.
    """
    given = dict(_DEFAULTS, chain=chain, queries=queries)
    unknown = sorted(set(options) - set(_DEFAULTS))
    if unknown:
        raise InputError(f"aprune_examples: unknown {unknown}; allowed: {', '.join(sorted(_DEFAULTS))}.")
    job = LoopJob(asyncio.get_running_loop())
    work = asyncio.ensure_future(asyncio.to_thread(_prune, given | options, job))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        job.stop()  # a thread cannot be cancelled: without this it would go on spending
        with contextlib.suppress(Exception):
            await asyncio.shield(work)
        raise


_DEFAULTS: dict[str, Any] = dict(prune_examples.__kwdefaults__ or {})


def _prune(given: Mapping[str, Any], loop: LoopJob | None) -> PrunedChain:
    chain, labels = given["chain"], given["labels"]
    if labels is not None and given["metric"] is not None:
        raise InputError(
            "labels, metric: give one of them: labels for a chain that classifies, metric for other outputs."
        )
    found = find_template(chain, given["template"])
    site = open_site(
        found.template,
        pool=None if given["pool"] is None else [dict(e) for e in given["pool"]],
        freeze=given["freeze_selector"],
        output_key=given["output_key"],
    )
    settings = given["settings"] or Settings()
    asked, splits = _queries(given["queries"], given["sizes"], settings)
    notes = []
    own = _own_inputs(site, asked, given["output_key"])
    if own is None and (settings.clean_prior != "off" or settings.relabel != "off"):
        notes.append(
            "The examples do not have the fields of a query, so the model was not asked for their own inputs."
        )
    asked |= own or {}
    parts = _Parts(chain, site, asked, given, loop)
    task, target = parts.task(), parts.target()
    result = optimize_prompt(
        parts.prompt(splits["explain"][0]),
        task,
        splits,
        target=target,
        proxies=[
            _backend(p, given)
            for p in [*([given["proxy"]] if given["proxy"] is not None else []), *given["proxies"]]
        ],
        settings=settings,
        ledger=given["ledger"],
        title=given["title"],
        notes=notes,
    )
    artifact = build_artifact(result)
    return PrunedChain(_with(chain, site, artifact.kept), result, artifact)


def _with(chain: Any, site: Site, kept: Sequence[str]) -> Any:
    new = site.keeping(kept)
    return replace_parts(chain, lambda part: new if part is site.template else None)


def _backend(proxy: Any, given: Mapping[str, Any]) -> Backend:
    if isinstance(proxy, BaseChatModel):
        return ChatModelBackend(proxy, concurrency=given["concurrency"], trace=given["trace"])
    if isinstance(proxy, str):
        return open_model(proxy)
    if isinstance(proxy, Backend):
        return proxy
    raise InputError(
        f"proxy: got a {type(proxy).__name__}; a LangChain chat model, a model name such as 'embedded:smollm2-135m', or a"
        " ProxyPrompt backend."
    )


def _text(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    )


def _queries(
    given: Queries, sizes: Mapping[str, int] | None, settings: Settings
) -> tuple[dict[str, Any], Splits]:
    rows: list[tuple[Any, Any, str | None]] = []
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(_SPLITS))
        if unknown:
            raise InputError(f"queries: unknown splits {unknown}; allowed: {', '.join(_SPLITS)}.")
        rows = [(*_pair(row), name) for name in _SPLITS for row in given.get(name, ())]
    else:
        rows = [(*_pair(row), None) for row in given]
    inputs = {f"q{i}": row[0] for i, row in enumerate(rows)}
    queries = [
        (Query(f"q{i}", {"input": _text(value)}, _text(reference)), split)
        for i, (value, reference, split) in enumerate(rows)
    ]
    rng = np.random.default_rng([settings.seed, 101])
    return dict(inputs), split_queries(queries, sizes=sizes, rng=rng)


def _pair(row: Any) -> tuple[Any, Any]:
    if not isinstance(row, tuple | list) or len(row) != 2:
        raise InputError(f"queries: got {str(row)[:60]!r}; each is a pair (inputs of the chain, reference).")
    return row[0], row[1]


def _own_inputs(site: Site, asked: Mapping[str, Any], output_key: str | None) -> dict[str, Any] | None:
    """What to invoke the chain with for the examples' own inputs; None where the examples lack a field of the queries."""
    fields = {name for value in asked.values() if isinstance(value, Mapping) for name in value}
    if site.pool is None or not fields or not all(isinstance(v, Mapping) for v in asked.values()):
        return None
    if not all(fields <= set(example) for example in site.pool.examples.values()):
        return None
    return {f"own:{i}": {name: example[name] for name in fields} for i, example in site.pool.examples.items()}


class _Parts:
    """Prompt, task and target of one run."""

    def __init__(
        self,
        chain: Any,
        site: Site,
        asked: Mapping[str, Any],
        given: Mapping[str, Any],
        loop: LoopJob | None,
    ) -> None:
        self._site, self._asked, self._given = site, asked, given
        models = language_models(chain)
        if get_llm_cache() is not None and not models:
            raise InputError(
                "chain: LangChain's answer cache is on and the model is out of reach; it might answer instead.",
                hint="Switch it off with set_llm_cache(None), or pass the inner chain.",
            )
        self._models = [m for m in models if isinstance(m, BaseChatModel)]
        masked = site.masked()
        self._chain = replace_parts(chain, lambda part: self._swap(part, masked, logprobs=False))
        self._scored = replace_parts(chain, lambda part: self._swap(part, masked, logprobs=True))
        options = {"config": given["config"], "loop": loop, "trace": given["trace"]}
        self._runner, self._scoring = (
            ChainRunner(self._chain, **options),
            ChainRunner(self._scored, **options),
        )
        self._structure = describe(_with(chain, site, ()))
        self._renderings = Renderings(self._render)
        self._known: dict[str, bool] = {} if self._models else {"logprobs": False}
        self._lock = threading.Lock()

    def _swap(self, part: Any, masked: Any, *, logprobs: bool) -> Any:
        if part is self._site.template:
            return masked
        if not isinstance(part, BaseLanguageModel):
            return None
        model = uncached(part)
        chat = logprobs and isinstance(part, BaseChatModel)
        return model.bind(logprobs=True, top_logprobs=TOP_LOGPROBS) if chat else model

    def _render(self, call: Call) -> Rendered:
        if call.query.id not in self._asked:
            raise DataError(f"query {call.query.id!r}: there are no inputs of the chain for it.")
        return self._runner.render(call.kept, self._asked[call.query.id])

    def prompt(self, query: Query) -> ProgramPrompt:
        """The prompt, in the form in which a stored result recognises its turns."""
        site = self._site
        instruction = self._instruction(query)
        return ProgramPrompt(
            site.demonstrations,
            instruction=instruction,
            demonstration_template="{input}{output}",
            query_template="{input}",
            style="chat",
            renderings=self._renderings,
        )

    def _instruction(self, query: Query) -> str:
        shown = self._render(Call(tuple(d.id for d in self._site.demonstrations), query))
        if isinstance(shown, str) or not shown or shown[0].role not in ("system", "developer"):
            return ""
        # A system turn that holds the query, or the examples themselves, is no instruction.
        other = self._render(Call((), query))
        alike = not isinstance(other, str) and bool(other) and other[0] == shown[0]
        return shown[0].content if alike else ""

    def task(self) -> LabelTask | TextTask:
        """How an output is scored."""
        labels, metric = self._given["labels"], self._given["metric"]
        if labels is not None:
            return LabelTask(tuple(labels))
        if metric is None or isinstance(metric, str):
            return TextTask(metric or "exact_match", stop=())
        scored: Callable[[Any, Any], float] = metric
        references = {_text(r): r for r in _references(self._given["queries"])}

        def score(output: str, accepted: Sequence[str]) -> float:
            return scored(json.loads(output), references.get(accepted[0], accepted[0]))

        score.__name__ = getattr(metric, "__name__", "user metric")
        return TextTask(score, stop=(), binary=self._given["binary"])

    def target(self) -> ScoringProgramBackend:
        """The chain as a model."""
        identity: dict[str, Any] = {"integration": "langchain", "structure": self._structure}
        name = "chain"
        if len(self._models) == 1:
            identity |= model_identity(self._models[0])
            name = str(identity["model"])
        return ScoringProgramBackend(
            f"langchain:{name}",
            identity,
            self._renderings,
            generate=self._generate,
            score=self._score,
            concurrency=self._given["concurrency"],
        )

    def _generate(self, call: Call, request: GenerateRequest) -> GenerateResult:
        try:
            outcome = self._run(self._runner, call, request.prompt)
        except RunFailedError as failed:
            return GenerateResult(None, failed.usage, str(failed), uncertain=failed.uncertain)
        output = _jsonable(outcome.output)
        named = isinstance(self._given["metric"], str) or self._given["metric"] is None
        if named and not isinstance(output, str):
            raise InputError(
                f"metric: the chain's output is a {type(outcome.output).__name__}, no text.",
                hint="Give metric= a function (output, reference) -> score in [0, 1].",
            )
        text = output if named else json.dumps(output, sort_keys=True, ensure_ascii=False)
        return GenerateResult(text, outcome.usage, model_returned=outcome.model)

    def _score(self, call: Call, request: ScoreRequest) -> ScoreResult:
        def ask(logprobs: bool) -> tuple[Any, str | None, Usage, str | None]:
            outcome = self._run(self._scoring if logprobs else self._runner, call, request.prompt)
            output = _jsonable(outcome.output)
            return outcome.message, output if isinstance(output, str) else None, outcome.usage, outcome.model

        try:
            return ask_labels(ask, request.candidates, self._known, self._lock, must_agree=True)
        except RunFailedError as failed:
            n = len(request.candidates)
            return ScoreResult(
                (None,) * n, (False,) * n, failed.usage, str(failed), uncertain=failed.uncertain
            )

    def _run(self, runner: ChainRunner, call: Call, prompt: Rendered) -> Outcome:
        return runner.run(call.kept, self._asked[call.query.id], prompt)


def _references(queries: Queries) -> list[Any]:
    rows = [r for part in queries.values() for r in part] if isinstance(queries, Mapping) else list(queries)
    return [_pair(row)[1] for row in rows]


def _jsonable(output: Any) -> Any:
    if hasattr(output, "content"):  # a message: the chain ends in its model
        return output.content if isinstance(output.content, str) else _jsonable(output.content)
    if hasattr(output, "model_dump"):
        return output.model_dump(mode="json")
    if isinstance(output, Mapping):
        return {str(k): _jsonable(v) for k, v in output.items()}
    if isinstance(output, list | tuple):
        return [_jsonable(v) for v in output]
    if output is None or isinstance(output, str | int | float | bool):
        return output
    raise InputError(
        f"chain: its output is a {type(output).__name__}, which cannot be recorded.",
        hint="End the chain with a parser that gives text, numbers, lists, dictionaries or a pydantic model.",
    )


def apply_artifact(
    chain: Any,
    artifact: Artifact | str | Path,
    *,
    template: Any = None,
    pool: Sequence[Mapping[str, Any]] | None = None,
    freeze_selector: bool = False,
    output_key: str | None = None,
) -> Any:
    """Prune a chain by a stored result, without asking any model.

    Parameters
    ----------
    chain : Runnable
    artifact : Artifact or path
    template, pool, freeze_selector, output_key
        As for :func:`prune_examples`.

    Returns
    -------
    Runnable
        A new chain; the original is untouched.

    Raises
    ------
    ArtifactError
        If the chain's examples are not those that were measured, or what is left is not certified.
    """
    if not isinstance(artifact, Artifact):
        artifact = Artifact.load(artifact)
    site = open_site(
        find_template(chain, template).template,
        pool=None if pool is None else [dict(e) for e in pool],
        freeze=freeze_selector,
        output_key=output_key,
    )
    measured, here = artifact.original.demonstrations, site.demonstrations
    if [_content(d) for d in measured] != [_content(d) for d in here]:
        differ = [m.id for m, h in zip(measured, here, strict=False) if _content(m) != _content(h)]
        what = (
            f"example {differ[0]!r} differs" if differ else f"{len(here)} examples instead of {len(measured)}"
        )
        raise ArtifactError(
            f"The chain's examples are not those that the result measured: {what}.",
            hint="Measure this chain with prune_examples.",
        )
    if artifact.removed and not artifact.certified:
        raise ArtifactError("The result removes examples without a certificate for what is left.")
    return _with(chain, site, artifact.kept)


def _content(demonstration: Demonstration) -> tuple[Any, ...]:
    return demonstration.id, dict(demonstration.inputs), demonstration.output


def materialize(chain: Any, *, template: Any = None) -> Any:
    """The chain with its examples written out as fixed messages or text, which LangChain can serialise.

    LangChain's few-shot templates have no JSON form (``dumps`` writes "not implemented"); what this returns has one, and
    renders the same.

    Parameters
    ----------
    chain : Runnable
    template : object or str, optional
        As for :func:`prune_examples`.

    Raises
    ------
    InputError
        If the template uses an example selector, whose choice cannot be written out.
    """
    found = find_template(chain, template).template
    return replace_parts(chain, lambda part: written_out(part, found))
