"""Any LangChain chat model as a proxy or target of ProxyPrompt."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.outputs import LLMResult

from proxyprompt.backends.base import (
    GenerateRequest,
    GenerateResult,
    OnSend,
    OnTokens,
    Rendered,
    ScoreRequest,
    ScoreResult,
    Usage,
)
from proxyprompt.errors import InputError, ProxyPromptError
from proxyprompt.program import run_blocks, score_from_logprobs, score_from_text

from ._running import RunFailedError, failure, model_parameters, tracing, usage_of

__all__ = ["ChatModelBackend", "ask_labels", "model_identity", "uncached"]

R = TypeVar("R", ScoreResult, GenerateResult)
TOP_LOGPROBS = 20


def uncached(model: Any) -> Any:
    """The same model without LangChain's answer cache: what is counted as paid must be asked."""
    return model.model_copy(update={"cache": False})


def model_identity(model: BaseChatModel) -> dict[str, Any]:
    """What decides a model's answers, without secrets; address and name in the form that prices are looked up by."""
    parameters = model_parameters(model)
    name = parameters.get("model_name") or parameters.get("model") or getattr(model, "model", None)
    base = getattr(model, "openai_api_base", None) or getattr(model, "base_url", None)
    said = model._get_ls_params()
    return {
        "provider": str(said.get("ls_provider") or model._llm_type),
        "model": str(name or said.get("ls_model_name") or type(model).__name__),
        "base_url": _address(str(base)) if base else None,
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "parameters": parameters,
    }


def _address(url: str) -> str:
    """Without user, password, query."""
    scheme, _, rest = url.partition("://")
    host = rest.split("?")[0].split("#")[0]
    head, slash, path = host.partition("/")
    return f"{scheme}://{head.rpartition('@')[2]}{slash}{path}".rstrip("/")


def to_messages(prompt: Rendered) -> list[BaseMessage]:
    """ProxyPrompt's turns as LangChain's messages; a text is one human turn."""
    if isinstance(prompt, str):
        return [HumanMessage(prompt)]
    made: list[BaseMessage] = []
    for turn in prompt:
        if turn.role == "developer":
            made.append(
                SystemMessage(
                    turn.content, name=turn.name, additional_kwargs={"__openai_role__": "developer"}
                )
            )
        else:
            kind = {"system": SystemMessage, "user": HumanMessage, "assistant": AIMessage}[turn.role]
            made.append(kind(turn.content, name=turn.name))
    return made


def ask_labels(
    ask: Callable[[bool], tuple[Any, str | None, Usage, str | None]],
    candidates: Sequence[str],
    known: dict[str, bool],
    lock: threading.Lock,
    *,
    must_agree: bool = False,
) -> ScoreResult:
    """Ask for labels by log-probabilities where the model gives them, else by its text; finds out once.

    Parameters
    ----------
    ask : callable
        ``ask(with_logprobs) -> (message, text, usage, model)``.
    candidates : sequence of str
    known : dict
        ``{"logprobs": bool}`` once it is known; shared by all calls of one model.
    lock : threading.Lock
        Held while it is found out, so that one call does.
    must_agree : bool
        Where the text is not the model's own, use log-probabilities only if the first answer's most likely label is the
        one that the text names: a chain may give another label than its model begins with (a parser that maps, an answer
        behind an explanation).
    """
    with lock:
        if "logprobs" not in known:
            return _find_out(ask, candidates, known, must_agree)
    message, text, usage, model = ask(known["logprobs"])
    if not known["logprobs"]:
        return score_from_text(text, candidates, usage=usage, model_returned=model)
    result = _by_logprobs(message, candidates, usage, model)
    if result is None:
        none = (None,) * len(candidates)
        why = "no log-probabilities this time, unlike before"
        return ScoreResult(none, (False,) * len(candidates), usage, why, model)
    return result


def _find_out(
    ask: Callable[[bool], tuple[Any, str | None, Usage, str | None]],
    candidates: Sequence[str],
    known: dict[str, bool],
    must_agree: bool,
) -> ScoreResult:
    try:
        message, text, usage, model = ask(True)
    except RunFailedError as failed:
        if not failed.refused:
            raise  # a lost connection says nothing about log-probabilities
        # Refused, perhaps for the parameter: asked without it. Where the reason was another, that fails in the same way.
        known["logprobs"] = False
        message, text, usage, model = ask(False)
        return score_from_text(text, candidates, usage=usage, model_returned=model)
    result = _by_logprobs(message, candidates, usage, model)
    by_text = score_from_text(text, candidates, usage=usage, model_returned=model)
    if result is not None and must_agree and not _handed_on(message, text):
        first = _named(result)
        if first is None or first != _named(by_text):
            result = None
    known["logprobs"] = result is not None
    return by_text if result is None else result


def _handed_on(message: Any, text: str | None) -> bool:
    """Whether a chain's output is its model's answer as it stands."""
    own = message if isinstance(message, str) else getattr(message, "content", None)
    return isinstance(own, str) and text is not None and own.strip() == text.strip()


def _named(result: ScoreResult) -> int | None:
    """The label that a result names; ``None`` if it is censored throughout, or names none."""
    known = {k: value for k, value in enumerate(result.logprobs) if value is not None}
    if not known or (len(known) > 1 and all(result.censored)):
        return None
    return max(known, key=lambda k: known[k])


def _by_logprobs(
    message: Any, candidates: Sequence[str], usage: Usage, model: str | None
) -> ScoreResult | None:
    meta = getattr(message, "response_metadata", None) or {}
    return score_from_logprobs(_plain(meta.get("logprobs")), candidates, usage=usage, model_returned=model)


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


class ChatModelBackend:
    """A LangChain chat model as a model of ProxyPrompt: :class:`~proxyprompt.backends.base.Scorer` and ``Generator``.

    Parameters
    ----------
    model : BaseChatModel
        Its rate limiter, retries and callbacks apply; its answer cache does not.
    name : str, optional
    concurrency : int
        Most calls at a time.
    trace : bool
        Whether calls go to LangSmith, if that is on.

    Notes
    -----
    Labels come from log-probabilities where the model gives them (``logprobs=True``; the first call finds out), else from
    its text. Note that a model with ``use_responses_api=True`` loses them inside LangChain.

    Examples
    --------
    >>> from langchain_core.language_models import FakeListChatModel
    >>> ChatModelBackend(FakeListChatModel(responses=["yes"])).name
    'langchain:FakeListChatModel'
    """

    def __init__(
        self, model: BaseChatModel, *, name: str | None = None, concurrency: int = 4, trace: bool = False
    ) -> None:
        if not isinstance(model, BaseChatModel):
            raise InputError(f"model: got a {type(model).__name__}; a LangChain chat model is needed.")
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise InputError(f"concurrency: got {concurrency!r}; a whole number, at least 1.")
        self._model, self._concurrency, self._trace = uncached(model), concurrency, trace
        self._identity = {"integration": "langchain", **model_identity(model)}
        self._name = name or f"langchain:{self._identity['model']}"
        self._known: dict[str, bool] = {}
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """Name shown to people."""
        return self._name

    @property
    def identity(self) -> Mapping[str, Any]:
        """Provider, address, model and its parameters; no secrets."""
        return dict(self._identity)

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        on_send: OnSend | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Iterator[Sequence[tuple[int, ScoreResult]]]:
        """Yield blocks as calls finish."""

        def one(index: int) -> ScoreResult:
            request = requests[index]
            try:
                return ask_labels(
                    lambda logprobs: self._ask(request.prompt, logprobs),
                    request.candidates,
                    self._known,
                    self._lock,
                )
            except RunFailedError as failed:
                n = len(request.candidates)
                return ScoreResult(
                    (None,) * n, (False,) * n, failed.usage, str(failed), uncertain=failed.uncertain
                )

        return run_blocks(self._concurrency, len(requests), one, on_send, on_tokens)

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        on_send: OnSend | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Iterator[Sequence[tuple[int, GenerateResult]]]:
        """Yield blocks as calls finish."""

        def one(index: int) -> GenerateResult:
            request = requests[index]
            stop = list(request.stop) or None
            try:
                _, text, usage, model = self._ask(
                    request.prompt, False, stop=stop, max_tokens=request.max_tokens
                )
            except RunFailedError as failed:
                return GenerateResult(None, failed.usage, str(failed), uncertain=failed.uncertain)
            return GenerateResult(text, usage, model_returned=model)

        return run_blocks(self._concurrency, len(requests), one, on_send, on_tokens)

    def _ask(
        self, prompt: Rendered, logprobs: bool, **extra: Any
    ) -> tuple[Any, str | None, Usage, str | None]:
        if logprobs:
            extra |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        given = {key: value for key, value in extra.items() if value is not None}
        try:
            with tracing(self._trace):
                message = self._model.invoke(
                    to_messages(prompt),
                    config={"run_name": "proxyprompt:ask", "tags": ["proxyprompt"]},
                    **given,
                )
        except ProxyPromptError:
            raise
        except Exception as error:
            raise failure(error, Usage(), 1) from error
        meta = message.response_metadata or {}
        text = message.content if isinstance(message.content, str) else str(message.text)
        model = meta.get("model_name") or meta.get("model")
        return message, text, usage_of(message, LLMResult(generations=[[]])), model
