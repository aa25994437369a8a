"""The program as a model of ProxyPrompt: what it sends for a coalition, and a run of it."""

from __future__ import annotations

import contextvars
import copy
import inspect
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback
from dspy.utils.exceptions import AdapterParseError
from dspy.utils.parallelizer import ParallelExecutor
from dspy.utils.usage_tracker import UsageTracker

from proxyprompt.backends.base import GenerateRequest, GenerateResult, Message, Rendered, Usage
from proxyprompt.errors import BackendError, ProxyPromptError
from proxyprompt.program import Call, ProgramBackend, Renderings

from ._predictions import Codec, unparsed
from ._program import (
    Predictor,
    Template,
    adapter_identity,
    base_url,
    fresh_adapter,
    fresh_lm,
    lm_identity,
    plain,
    predictors,
    replace_demos,
    structure,
)

__all__ = ["Counts", "Students", "dropped_demos", "incomplete_demos"]


class Counts:
    """What happened besides answers; safe for threads.

    Attributes
    ----------
    unparsed : int
        Answers that the adapter could make nothing of.
    failed : int
        Runs without an answer.
    unmetered : int
        Runs of which no language model said what they cost.
    """

    def __init__(self) -> None:
        self.unparsed = self.failed = self.unmetered = 0
        self._lock = threading.Lock()

    def add(self, name: str) -> int:
        """Count one more; the new number."""
        with self._lock:
            setattr(self, name, getattr(self, name) + 1)
            return int(getattr(self, name))


class _SharedTracker(UsageTracker):  # type: ignore[misc]
    """Stays one when DSPy copies it for each thread of ``dspy.Parallel``; otherwise their usage is lost."""

    def __deepcopy__(self, memo: Any) -> _SharedTracker:
        return self


class _Outages(BaseCallback):  # type: ignore[misc]
    """Notices calls that failed inside a run, whatever adapter or program made of it.

    DSPy 3.0's ChatAdapter answers any failure, an outage too, with another prompt (JSONAdapter): what comes of that is
    no answer to the prompt that is measured. A refused ``response_format`` is part of that adapter's ordinary way.
    """

    def __init__(self) -> None:
        self._structured: dict[str, bool] = {}
        self.failed: list[Exception] = []
        self.refused: list[Exception] = []

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        asked = {**inputs, **(inputs.get("kwargs") or {})}
        self._structured[call_id] = asked.get("response_format") is not None

    def on_lm_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
        if exception is not None:
            (self.refused if self._structured.get(call_id) else self.failed).append(exception)


# DSPy 3.0.0: any usage tracker makes every thread of dspy.Parallel fail, without a word.
_TRACKER_BREAKS_THREADS = "thread_local_overrides.overrides" in inspect.getsource(ParallelExecutor)


def _metered(lm: Any) -> Any:
    """A model, already a copy of our own, that reports to ``settings.proxyprompt_usage`` instead of DSPy's tracker."""
    inner = lm.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        response = inner(*args, **kwargs)
        dspy.settings.proxyprompt_usage.add_usage(lm.model, dict(getattr(response, "usage", None) or {}))
        return response

    lm.forward = forward
    return lm


class Students:
    """Runs of one program with some of its demos.

    Parameters
    ----------
    program : dspy.Module
        The student; stays as it is.
    units : mapping of str to (int, Any)
        Predictor's index and demo of each unit, by the unit's id.
    fixed : mapping of int to sequence
        Demos that every run has, by predictor's index: those of predictors that are not pruned.
    examples : mapping of str to Example
        By query id.
    codec : Codec
    max_errors : int
        So many runs without an answer end everything.
    unparsable : {"wrong", "missing"}
        What an answer is that the adapter cannot parse.
    """

    def __init__(
        self,
        program: Any,
        units: Mapping[str, tuple[int, Any]],
        *,
        fixed: Mapping[int, Sequence[Any]],
        examples: Mapping[str, Any],
        codec: Codec,
        max_errors: int,
        unparsable: str,
        num_threads: int,
    ) -> None:
        self._template, self._units, self._fixed = Template(program), dict(units), dict(fixed)
        self._examples, self._codec = examples, codec
        self._max_errors, self._unparsable, self._threads = max_errors, unparsable, num_threads
        # Threads of a plain pool do not see dspy.context; the caller's settings are taken along.
        self._context = contextvars.copy_context()
        self._adapter = dspy.settings.adapter or dspy.ChatAdapter()
        self._configured = dspy.settings.lm
        self._structure = structure(program)
        self.counts = Counts()
        self.renderings = Renderings(self.render)
        self._plain = _sends_one_prompt(program)
        self._lm = self._target_held()[0][2] if self._plain else None

    def _target_held(self) -> list[tuple[int, str, Any]]:
        return self._template.holding(default=self._configured)

    def _with_demos(self, program: Any, kept: Sequence[str]) -> Any:
        demos: dict[int, list[Any]] = {index: list(found) for index, found in self._fixed.items()}
        for index, _ in self._units.values():
            demos.setdefault(index, [])
        for unit in kept:
            index, demo = self._units[unit]
            demos[index].append(copy.deepcopy(demo))
        replace_demos(program, demos)
        return program

    def render(self, call: Call) -> Rendered:
        """What decides a run: the messages that the adapter makes, or all demos and inputs as one text."""
        example = self._examples[call.query.id]
        program = self._with_demos(self._template.copy([]), call.kept)
        if self._plain:
            [predictor] = program.predictors()
            found = _messages(self._adapter, self._lm, predictor, dict(example.inputs()))
            if found is not None:
                return found
        demos = {p.path: [plain(d) for d in p.demos] for p in predictors(program)}
        return json.dumps(
            {"demos": demos, "inputs": plain(dict(example.inputs()))}, ensure_ascii=False, sort_keys=True
        )

    def target(self) -> ProgramBackend:
        """The program with its own language models."""
        held = self._target_held()
        lms = [lm for _, name, lm in held if name == "lm"]
        return self._backend(lms[0], held, default=self._configured)

    def proxy(self, lm: Any, *, name: str | None = None) -> ProgramBackend:
        """The program with another model in every predictor."""
        return self._backend(lm, self._template.holding(default=lm, everywhere=lm), default=lm, name=name)

    def _backend(
        self, lm: Any, held: list[tuple[int, str, Any]], *, default: Any, name: str | None = None
    ) -> ProgramBackend:
        modules = self._structure["modules"]
        identity = {
            "provider": "dspy",
            "model": str(lm.model).partition("/")[2] or str(lm.model),
            "base_url": base_url(lm),
            "program": self._structure,
            "fixed": {str(i): [plain(d) for d in demos] for i, demos in sorted(self._fixed.items())},
            "lms": [[index, name, lm_identity(one)] for index, name, one in held],
            "adapter": adapter_identity(self._adapter),
        }
        runner = _Runner(self, held, fresh_lm(default) if default is not None else None)
        shown = f"dspy:{modules[0]['class'].rpartition('.')[2]}@{lm.model}"
        return ProgramBackend(
            name or shown,
            identity,
            self.renderings,
            generate=runner.generate,
            concurrency=self._threads,
        )


class _Runner:
    """Runs copies of the program with given models."""

    def __init__(self, students: Students, held: list[tuple[int, str, Any]], default: Any) -> None:
        self._s, self._held, self._default = students, held, default
        self._adapter = fresh_adapter(students._adapter)
        if _TRACKER_BREAKS_THREADS:
            own = [lm for _, _, lm in held] + [
                v for v in (default, *vars(self._adapter).values()) if isinstance(v, dspy.BaseLM)
            ]
            for lm in {id(lm): lm for lm in own}.values():
                _metered(lm)

    def generate(self, call: Call, request: GenerateRequest) -> GenerateResult:
        """One run; called from many threads."""
        del request  # the program's own models decide length and stops
        return self._s._context.copy().run(self._run, call)

    def _run(self, call: Call) -> GenerateResult:
        s, tracker, outages = self._s, _SharedTracker(), _Outages()
        program = s._with_demos(s._template.copy(self._held), call.kept)
        try:
            # The runs' prompts stay out of DSPy's histories: they are private, and there are thousands.
            with dspy.context(
                lm=self._default,
                adapter=self._adapter,
                **self._metering(tracker),
                disable_history=True,
                trace=None,
                callbacks=[*dspy.settings.callbacks, outages],
            ):
                prediction = program(**s._examples[call.query.id].inputs())
        except AdapterParseError as error:
            broken = outages.failed or outages.refused
            return self._failed(broken[-1], tracker) if broken else self._unparsed(error, tracker)
        except ProxyPromptError:
            raise
        except Exception as error:
            return self._failed(error, tracker)
        if outages.failed:
            return self._failed(outages.failed[-1], tracker)
        return GenerateResult(s._codec.encode(prediction), self._usage(tracker))

    @staticmethod
    def _metering(tracker: UsageTracker) -> dict[str, Any]:
        if _TRACKER_BREAKS_THREADS:
            return {"usage_tracker": None, "track_usage": False, "proxyprompt_usage": tracker}
        return {"usage_tracker": tracker, "track_usage": True}

    def _unparsed(self, error: Exception, tracker: UsageTracker) -> GenerateResult:
        usage = self._usage(tracker)
        self._s.counts.add("unparsed")
        if self._s._unparsable == "missing":
            return GenerateResult(
                None, usage, error=f"the adapter could not parse the answer: {_short(error)}"
            )
        return GenerateResult(unparsed(type(error).__name__), usage)

    def _failed(self, error: Exception, tracker: UsageTracker) -> GenerateResult:
        s = self._s
        n = s.counts.add("failed")
        if n >= s._max_errors:
            raise BackendError(
                f"student: {n} runs of the program gave no answer (max_errors={s._max_errors}); the last one raised"
                f" {type(error).__name__}: {_short(error)}.",
                hint="Mend the cause and compile again; what was answered is in the ledger and is not bought twice.",
            ) from error
        return GenerateResult(
            None, _sum(tracker), error=f"{type(error).__name__}: {_short(error)}", uncertain=1
        )

    def _usage(self, tracker: UsageTracker) -> Usage:
        usage = _sum(tracker)
        if not usage.prompt_tokens:
            self._s.counts.add("unmetered")
        return usage


def _short(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def _sum(tracker: UsageTracker) -> Usage:
    """All calls of a run, over all models."""
    total = Usage()
    for found in tracker.get_total_tokens().values():
        prompt, completion = (found.get(f"{kind}_tokens_details") or {} for kind in ("prompt", "completion"))
        total += Usage(
            int(found.get("prompt_tokens") or found.get("input_tokens") or 0),
            int(found.get("completion_tokens") or found.get("output_tokens") or 0),
            int(prompt.get("cached_tokens") or 0),
            int(prompt.get("cache_write_tokens") or 0),
            int(completion.get("reasoning_tokens") or 0),
        )
    return total


# --- what is sent ---------------------------------------------------------------------------------------


def _sends_one_prompt(program: Any) -> bool:
    """Whether a run is one call of one predictor on the program's own inputs: ``Predict``, ``ChainOfThought``."""
    if type(program) is dspy.ChainOfThought:
        return type(program.predict) is dspy.Predict and len(program.predictors()) == 1
    return type(program) is dspy.Predict


def _messages(adapter: Any, lm: Any, predictor: Any, inputs: dict[str, Any]) -> tuple[Message, ...] | None:
    """The messages of the first call, as ``Adapter.__call__`` makes them; ``None`` where they are more than text."""
    for name, field in predictor.signature.input_fields.items():
        if name not in inputs and not field.is_required():
            inputs[name] = field.default
    signature = adapter._call_preprocess(lm, dict(predictor.config), predictor.signature, inputs)
    turns = adapter.format(signature, predictor.demos, inputs)
    if not all(isinstance(t.get("content"), str) and t["role"] in _ROLES for t in turns):
        return None
    return tuple(Message(t["role"], t["content"]) for t in turns)


_ROLES = ("system", "developer", "user", "assistant")


def dropped_demos(adapter: Any, predictor: Predictor) -> list[bool]:
    """Which demos the adapter leaves out without a word: those that lack every input, or every output."""
    found = []
    for demo in predictor.demos:
        try:
            found.append(not adapter.format_demos(predictor.signature, [demo]))
        except NotImplementedError:  # an adapter that formats whole prompts only
            found.append(False)
    return found


def incomplete_demos(predictor: Predictor) -> list[bool]:
    """Which demos lack a field of the signature; adapters show those first, and say so in the prompt."""
    return [
        not all(demo.get(name) is not None for name in predictor.signature.fields) for demo in predictor.demos
    ]
