"""From a chain with few-shot examples to the same chain with fewer of them, and the evidence."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import Runnable

from proxyprompt import (
    Artifact,
    Result,
    Settings,
    build_artifact,
    open_model,
    optimize_prompt,
    write_outputs,
)
from proxyprompt.backends.base import (
    Backend,
)
from proxyprompt.errors import ArtifactError, InputError
from proxyprompt.prompt import Demonstration
from proxyprompt.report import render_markdown

from ._finding import find_template, replace_parts
from ._materialize import written_out
from ._parts import Parts, with_examples
from ._queries import Queries, own_inputs, split_rows
from ._running import LoopJob
from ._site import open_site
from .models import ChatModelBackend

__all__ = ["PrunedChain", "apply_artifact", "aprune_examples", "materialize", "prune_examples"]

Metric: TypeAlias = str | Callable[[Any, Any], float]


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
    asked, splits = split_rows(given["queries"], given["sizes"], settings)
    notes = []
    own = own_inputs(site, asked, given["output_key"])
    if own is None and (settings.clean_prior != "off" or settings.relabel != "off"):
        notes.append(
            "The examples do not have the fields of a query, so the model was not asked for their own inputs."
        )
    asked |= own or {}
    parts = Parts(chain, site, asked, given, loop)
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
    return PrunedChain(with_examples(chain, site, artifact.kept), result, artifact)


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
    return with_examples(chain, site, artifact.kept)


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
