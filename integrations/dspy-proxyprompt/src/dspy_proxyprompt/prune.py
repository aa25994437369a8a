"""``ProxyPrune``: the last step after a DSPy optimizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any, Literal

import dspy
import numpy as np
from dspy.teleprompt import Teleprompter

from proxyprompt import Demonstration, Ledger, PromptValueFunction, Settings, TextTask, WeightedBanzhaf
from proxyprompt.errors import InputError
from proxyprompt.metering import Meter
from proxyprompt.pipeline import Observer, Result, optimize_prompt, price_of_calls, run_limits
from proxyprompt.program import ProgramBackend, ProgramPrompt
from proxyprompt.summary import build_artifact

from ._predictions import Codec, Scorer, decides_binary
from ._program import Predictor, Template, plain, predictors, refuse_unprunable, replace_demos
from ._running import Students, dropped_demos, incomplete_demos
from ._sets import Sets, make_sets
from .report import DemoReport, PredictorReport, PruneReport, demo_hash

__all__ = ["ProxyPrune"]


class ProxyPrune(Teleprompter):  # type: ignore[misc]
    """Remove demos that do harm or earn nothing, with proof on queries that nothing else has seen.

    Parameters
    ----------
    metric : callable
        ``metric(example, prediction, trace=None)``, as for any DSPy optimizer; metrics with feedback too. Scores lie
        in [0, 1].
    proxies : sequence of dspy.LM
        Cheap models that may explain in the target's place, if a test shows that their reasons agree. The target is
        the program with its own models.
    settings : Settings, optional
        All numbers of a run; the next four replace single ones.
    tau : float, optional
        Share of the full program's score that the smaller one must keep.
    confidence : float, optional
    budget_calls : int, optional
        Most runs of the program with its own models. A run of a program with several predictors is several calls.
    seed : int, optional
    ledger : Ledger or path
        Where every run is recorded: a run found there is not paid again.
    num_threads : int, optional
        Runs at a time. Default: ``dspy.settings.num_threads``.
    max_errors : int, optional
        So many runs without an answer end the pruning. Default: ``dspy.settings.max_errors``.
    binary : bool, optional
        Whether the metric gives right or wrong only, for which the certificate is exact. Default: whether it
        returns a truth value for examples' own labels.
    unparsable : {"wrong", "missing"}
        What an answer is that the adapter cannot parse: score 0, as it is for whoever uses the program, or a
        missing value.
    explain_share : float
        Share of the train set that explains; the rest confirms harm and chooses the cut. All of the validation set
        is sealed for the certificate.
    include_frozen : bool
        Whether demos of compiled sub-modules, which DSPy treats as frozen, may be pruned too.
    per_predictor : bool
        Whether to explain each predictor's demos also with all others' in place; costs more runs. What is removed
        is decided and certified jointly, for the program as a whole.
    title : str
    observer : Observer, optional

    Attributes
    ----------
    report : PruneReport
        Of the last ``compile``.
    result : Result
        All that the run found, of the last ``compile``.

    Notes
    -----
    Run it last, outside of ``BetterTogether``: that keeps the earlier of two programs with the same score, and so
    discards a smaller program that is as good.

    Examples
    --------
    >>> pruner = ProxyPrune(lambda example, prediction, trace=None: example.answer == prediction.answer, tau=0.95)
    >>> pruner.settings.tau
    0.95
    """

    def __init__(
        self,
        metric: Callable[..., Any],
        *,
        proxies: Sequence[Any] = (),
        settings: Settings | None = None,
        tau: float | None = None,
        confidence: float | None = None,
        budget_calls: int | None = None,
        seed: int | None = None,
        ledger: Ledger | str | os.PathLike[str] = "proxyprompt-out/ledger.db",
        num_threads: int | None = None,
        max_errors: int | None = None,
        binary: bool | None = None,
        unparsable: Literal["wrong", "missing"] = "wrong",
        explain_share: float = 0.4,
        include_frozen: bool = False,
        per_predictor: bool = False,
        title: str = "DSPy program",
        observer: Observer | None = None,
    ) -> None:
        super().__init__()
        given: dict[str, Any] = {
            "tau": tau,
            "confidence": confidence,
            "budget_calls": budget_calls,
            "seed": seed,
        }
        self.settings = replace(
            settings or Settings(), **{name: value for name, value in given.items() if value is not None}
        )
        odd = [p for p in proxies if not isinstance(p, dspy.BaseLM)]
        if odd:
            raise InputError(
                f"proxies: got {odd[0]!r}; a list of dspy.LM is needed.",
                hint="dspy.LM('openai/NAME', api_base=...) reaches any OpenAI-compatible server.",
            )
        for name, value in (("num_threads", num_threads), ("max_errors", max_errors)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name}: got {value!r}; a whole number, at least 1.")
        if unparsable not in ("wrong", "missing"):
            raise InputError(f"unparsable: got {unparsable!r}; allowed: wrong, missing.")
        if not 0.0 < explain_share < 1.0:
            raise InputError(f"explain_share: got {explain_share!r}; it lies in (0, 1).")
        Scorer(metric, Codec({}), {})  # refuses what cannot be called, before anything is paid
        self.metric, self.proxies, self.ledger = metric, list(proxies), ledger
        self.num_threads, self.max_errors, self.binary = num_threads, max_errors, binary
        self.unparsable, self.explain_share = unparsable, explain_share
        self.include_frozen, self.per_predictor = include_frozen, per_predictor
        self.title, self.observer = title, observer
        self.report: PruneReport | None = None
        self.result: Result | None = None

    def compile(
        self,
        student: Any,
        *,
        trainset: Sequence[Any] | None = None,
        valset: Sequence[Any] | None = None,
        teacher: Any = None,
    ) -> Any:
        """A copy of the student with fewer demos, and ``proxyprompt_report`` as its attribute.

        Parameters
        ----------
        student : dspy.Module
            Compiled or loaded, with demos; stays as it is.
        trainset : sequence of Example
            Explains the demos and chooses among them. Examples that are demos are not used.
        valset : sequence of Example
            Certifies; disjoint from ``trainset`` and demos.
        teacher : object
            Not used; there because compositions of optimizers pass it.

        Returns
        -------
        dspy.Module
            All demos that the adapter shows if nothing smaller could be certified.

        Raises
        ------
        DataError
            A set is missing, too small or not disjoint.
        InputError
            A program without demos, or whose demos are no list (KNNFewShot); a metric that fails or leaves [0, 1].
        BackendError
            ``max_errors`` runs gave no answer.
        """
        del teacher
        refuse_unprunable(student)
        every = predictors(student)
        active = [p for p in every if p.demos and (self.include_frozen or not p.frozen)]
        adapter = dspy.settings.adapter or dspy.ChatAdapter()
        dropped = {p.index: dropped_demos(adapter, p) for p in active}
        units = {
            f"{p.path}:{i}": (p.index, demo)
            for p in active
            for i, demo in enumerate(p.demos)
            if not dropped[p.index][i]
        }
        sets = make_sets(
            trainset,
            valset,
            (d for p in every for d in p.demos),
            explain_share=self.explain_share,
            seed=self.settings.seed,
        )
        if not active:
            raise InputError(
                f"student: no demos to prune{_frozen_hint(every)}.",
                hint="Compile it first, for example with BootstrapFewShot or MIPROv2.",
            )
        notes = [*sets.notes, *_notes(every, active, dropped, self.include_frozen)]
        if not units:
            self.result = None
            order: dict[int, list[int]] = {p.index: [] for p in active}
            self.report = _report(every, active, dropped, order, None, {}, notes)
            return self._finished(student, every, order)
        run = _Run(self, student, every, active, units, sets)
        self.result = run.optimize(notes)
        order = {p.index: [] for p in active}
        for demonstration in self.result.prompt.demonstrations:
            index, position = run.places[demonstration.id]
            order[index].append(position)
        self.report = _report(every, active, dropped, order, self.result, run.own, [*notes, *run.notes()])
        return self._finished(student, every, order)

    def _finished(self, student: Any, every: list[Predictor], order: dict[int, list[int]]) -> Any:
        program = Template(student).copy()
        replace_demos(
            program, {p.index: [p.demos[i] for i in order[p.index]] for p in every if p.index in order}
        )
        program._compiled = True
        program.proxyprompt_report = self.report
        return program


class _Run:
    """One pruning: the program as prompt and models."""

    def __init__(
        self,
        pruner: ProxyPrune,
        student: Any,
        every: list[Predictor],
        active: list[Predictor],
        units: dict[str, tuple[int, Any]],
        sets: Sets,
    ) -> None:
        self.pruner, self.sets, self.active = pruner, sets, active
        self.places = {f"{p.path}:{i}": (p.index, i) for p in active for i in range(len(p.demos))}
        pruned = {p.index for p in active}
        annotations: dict[str, list[Any]] = {}
        for p in every:
            for name, field in p.signature.output_fields.items():
                annotations.setdefault(name, []).append(field.annotation)
        codec = Codec(annotations)
        self.students = Students(
            student,
            units,
            fixed={p.index: p.demos for p in every if p.index not in pruned},
            examples=sets.by_query,
            codec=codec,
            max_errors=pruner.max_errors or dspy.settings.max_errors,
            unparsable=pruner.unparsable,
            num_threads=pruner.num_threads or dspy.settings.num_threads,
        )
        scorer = Scorer(pruner.metric, codec, sets.by_reference)
        binary = (
            decides_binary(scorer, list(sets.by_reference.values()))
            if pruner.binary is None
            else pruner.binary
        )
        self.task = TextTask(scorer, stop=(), binary=binary)
        self.prompt = ProgramPrompt(
            tuple(_demonstration(u, demo, every[index]) for u, (index, demo) in units.items()),
            renderings=self.students.renderings,
        )
        self.own: dict[str, tuple[float, float]] = {}

    def optimize(self, notes: list[str]) -> Result:
        p = self.pruner
        target = self.students.target()
        proxies: list[ProgramBackend] = []
        for lm in p.proxies:
            backend = self.students.proxy(lm)
            if any(dict(b.identity) == dict(backend.identity) for b in proxies):
                raise InputError(
                    f"proxies: two are the same model, {lm.model!r}, with the same parameters; their answers could not be"
                    " told apart in the ledger.",
                    hint="Name each once; a custom model should keep what makes it another in its attributes.",
                )
            twins = sum(b.name.partition("#")[0] == backend.name for b in proxies)
            if twins:
                backend = self.students.proxy(lm, name=f"{backend.name}#{twins + 1}")
            proxies.append(backend)
        opened = p.ledger if isinstance(p.ledger, Ledger) else Ledger(p.ledger)
        try:
            result = optimize_prompt(
                self.prompt,
                self.task,
                self.sets.splits,
                target=target,
                proxies=proxies,
                settings=p.settings,
                ledger=opened,
                observer=p.observer,
                title=p.title,
                notes=notes,
            )
            if p.per_predictor and len(self.active) > 1:
                self._explain_each(result, target, proxies, opened)
        finally:
            if opened is not p.ledger:
                opened.close()
        return result

    def _explain_each(
        self, result: Result, target: ProgramBackend, proxies: list[ProgramBackend], ledger: Ledger
    ) -> None:
        """Attributions of each predictor's demos with all other demos in place, by whoever explained jointly."""
        settings, by_id = self.pruner.settings, {q.id: q for q in self.sets.splits["explain"]}
        limits, of_proxies = run_limits(settings, result.pricing)
        if result.explanation.role == "target":
            meter = Meter(
                target, ledger, role="target", run=result.run, limits=limits,
                price=price_of_calls(target, result.pricing.target),
            )  # fmt: skip
        else:
            proxy = next(b for b in proxies if b.name == result.explanation.model)
            meter = Meter(
                proxy, ledger, role="proxy", run=result.run, limits=of_proxies,
                price=price_of_calls(proxy, result.pricing.proxies[proxy.name]),
            )  # fmt: skip
        ids = [d.id for d in self.prompt.demonstrations]
        queries = [by_id[i] for i in result.explanation.query_ids]
        function = PromptValueFunction(self.prompt, self.task, queries, meter, "attribute")
        for p in self.active:
            columns = [k for k, unit in enumerate(ids) if self.places[unit][0] == p.index]
            if not columns:
                continue
            explainer = WeightedBanzhaf()
            rng = np.random.default_rng([settings.seed, 9, p.index])
            design = explainer.design(len(columns), settings.n_fit(len(columns)), rng=rng)
            rows = np.ones((design.n_coalitions, len(ids)), dtype=np.bool_)
            rows[:, columns] = design.coalitions
            values = function.evaluate(rows)
            values.require_complete(f"attribution of {p.path}")
            found = explainer.fit(design, values.utility)
            for k, mean, error in zip(columns, found.mean, found.standard_error, strict=True):
                self.own[ids[k]] = (float(mean), float(error))

    def notes(self) -> list[str]:
        """What the runs taught."""
        counts, said = self.students.counts, []
        if counts.unparsed:
            what = "score 0" if self.pruner.unparsable == "wrong" else "missing"
            said.append(
                f"{counts.unparsed} answers could not be parsed by the adapter; they count as {what}."
            )
        if counts.failed:
            said.append(f"{counts.failed} runs gave no answer; they are missing, not 0.")
        if counts.unmetered:
            said.append(
                f"Of {counts.unmetered} runs no language model said what they cost; token counts miss them."
            )
        return said


def _demonstration(unit: str, demo: Any, predictor: Predictor) -> Demonstration:
    """A demo as reports show it."""
    fields = plain(demo)

    def text(names: Sequence[str]) -> str:
        return "\n".join(f"{n}: {fields[n]}" for n in names if fields.get(n) is not None)

    return Demonstration(
        unit,
        {"input": text(list(predictor.signature.input_fields))},
        text(list(predictor.signature.output_fields)),
    )


def _frozen_hint(every: Sequence[Predictor]) -> str:
    frozen = [p.path for p in every if p.frozen and p.demos]
    return f"; those of {', '.join(frozen)} are frozen (include_frozen=True prunes them)" if frozen else ""


def _notes(
    every: Sequence[Predictor],
    active: Sequence[Predictor],
    dropped: dict[int, list[bool]],
    include_frozen: bool,
) -> list[str]:
    said = []
    for p in active:
        gone = [i for i, yes in enumerate(dropped[p.index]) if yes]
        if gone:
            said.append(
                f"{p.path}: demos {gone} lack every input or every output; the adapter never shows them, so they were"
                " removed without asking a model."
            )
        partial = [i for i, yes in enumerate(incomplete_demos(p)) if yes and not dropped[p.index][i]]
        if partial:
            reasons = (
                " Labelled demos in a ChainOfThought have no reasoning to show; bootstrapped ones do."
                if "reasoning" in p.signature.output_fields
                else ""
            )
            said.append(
                f"{p.path}: demos {partial} lack fields of the signature; the adapter shows them first and says that they"
                f" are incomplete, so the order in the prompt is not that of demos.{reasons}"
            )
    for p in every:
        if p.frozen and p.demos:
            said.append(
                f"{p.path}: {len(p.demos)} demos of a compiled sub-module, "
                + (
                    "pruned as asked"
                    if include_frozen
                    else "left as they are (include_frozen=True prunes them)"
                )
                + "; program.save('x.json') does not hold them, save_program=True does."
            )
    return said


def _report(
    every: Sequence[Predictor],
    active: Sequence[Predictor],
    dropped: dict[int, list[bool]],
    order: dict[int, list[int]],
    result: Result | None,
    own: dict[str, tuple[float, float]],
    notes: Sequence[str],
) -> PruneReport:
    artifact = None if result is None else build_artifact(result)
    rows = {} if artifact is None else {r["id"]: r for r in artifact.summary["demonstrations"]}
    pruned = {p.index for p in active}
    reports = []
    for p in every:
        if not p.demos:
            continue
        incomplete = incomplete_demos(p)
        demos = []
        for i, demo in enumerate(p.demos):
            row = rows.get(f"{p.path}:{i}")
            mean, error = own.get(f"{p.path}:{i}", (None, None))
            if row is not None:
                verdict, reason = row["verdict"], row["reason"] or ""
            elif p.index in pruned:
                verdict, reason = "dropped by the adapter", "It lacks every input or every output."
            else:
                verdict, reason = "frozen", "It belongs to a compiled sub-module."
            demos.append(
                DemoReport(
                    position=i,
                    sha256=demo_hash(demo),
                    kept=p.index not in pruned or i in order[p.index],
                    verdict=verdict,
                    reason=reason,
                    attribution=None if row is None else row["attribution"],
                    standard_error=None if row is None else row["standard_error"],
                    own_attribution=mean,
                    own_standard_error=error,
                    augmented=bool(demo.get("augmented")),
                    incomplete=incomplete[i],
                )
            )
        chosen = tuple(order[p.index]) if p.index in pruned else tuple(range(len(p.demos)))
        reports.append(PredictorReport(p.path, p.frozen, tuple(demos), chosen))
    versions = {name: metadata.version(name) for name in ("dspy", "proxyprompt-core")}
    return PruneReport(tuple(reports), artifact, tuple(notes), versions)
