"""Prompt, task and target of one run: the chain as ProxyPrompt sees it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.globals import get_llm_cache
from langchain_core.language_models import BaseChatModel, BaseLanguageModel

from proxyprompt import LabelTask, Query, TextTask
from proxyprompt.backends.base import (
    GenerateRequest,
    GenerateResult,
    Rendered,
    ScoreRequest,
    ScoreResult,
    Usage,
)
from proxyprompt.errors import DataError, InputError
from proxyprompt.program import Call, ProgramPrompt, Renderings, ScoringProgramBackend

from ._finding import language_models, replace_parts
from ._queries import as_text, references
from ._running import ChainRunner, LoopJob, Outcome, RunFailedError, describe
from ._site import Site
from .models import TOP_LOGPROBS, ask_labels, model_identity, uncached

__all__ = ["Parts", "with_examples"]


def with_examples(chain: Any, site: Site, kept: Sequence[str]) -> Any:
    """A new chain with these examples only."""
    new = site.keeping(kept)
    return replace_parts(chain, lambda part: new if part is site.template else None)


class Parts:
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
        self._structure = describe(with_examples(chain, site, ()))
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
        known = {as_text(r): r for r in references(self._given["queries"])}

        def score(output: str, accepted: Sequence[str]) -> float:
            return scored(json.loads(output), known.get(accepted[0], accepted[0]))

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
