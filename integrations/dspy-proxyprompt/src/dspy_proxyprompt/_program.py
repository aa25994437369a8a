"""A DSPy program taken apart: its predictors and their demos, its language models, and copies of it.

A copy is made with all language models taken off and put back by reference: copying a client with each program is
slow, and on DSPy 3.0 it takes callbacks apart.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import dspy
from pydantic_core import to_jsonable_python

from proxyprompt.errors import InputError

__all__ = [
    "Predictor",
    "Template",
    "adapter_identity",
    "base_url",
    "fresh_adapter",
    "fresh_lm",
    "lm_identity",
    "parts",
    "plain",
    "predictors",
    "refuse_unprunable",
    "replace_demos",
    "structure",
]

_PUBLIC_APIS = {
    "openai": "https://api.openai.com/v1",
    "anthropic": "https://api.anthropic.com",
    "gemini": "https://generativelanguage.googleapis.com",
    "mistral": "https://api.mistral.ai/v1",
    "groq": "https://api.groq.com/openai/v1",
    "deepseek": "https://api.deepseek.com",
}
_SECRET = ("key", "secret", "password", "authorization", "credential", "header", "token")
_NO_SECRET = ("max_tokens", "max_completion_tokens", "max_output_tokens", "tokenizer")


@dataclass(frozen=True)
class Predictor:
    """One ``dspy.Predict`` of a program.

    Attributes
    ----------
    path : str
        As :meth:`dspy.Module.named_predictors` writes it; where that does not see it, as attribute path.
    index : int
        Its place among all predictors of the program, the same in every copy.
    demos : tuple
        Examples or, after ``load``, dictionaries.
    frozen : bool
        Whether ``named_predictors`` leaves it out: it belongs to a compiled sub-module.
    signature : type
    """

    path: str
    index: int
    demos: tuple[Any, ...]
    frozen: bool
    signature: Any


def _all(program: Any) -> list[tuple[str, Any]]:
    return list(program.named_sub_modules(type_=dspy.Predict))


def predictors(program: Any) -> list[Predictor]:
    """All predictors, frozen ones too."""
    seen = {id(p): name for name, p in program.named_predictors()}
    found = []
    for index, (name, predictor) in enumerate(_all(program)):
        path = seen.get(id(predictor), name.removeprefix("self."))
        found.append(
            Predictor(path, index, tuple(predictor.demos), id(predictor) not in seen, predictor.signature)
        )
    return found


def replace_demos(program: Any, demos: Mapping[int, Sequence[Any]]) -> None:
    """Give predictors, by their index, other demos."""
    for index, (_, predictor) in enumerate(_all(program)):
        if index in demos:
            predictor.demos = list(demos[index])


def parts(program: Any) -> list[Any]:
    """All sub-modules, predictors among them, in an order that every copy has."""
    return [module for _, module in program.named_sub_modules()]


def refuse_unprunable(program: Any) -> None:
    """Refuse what is no program, and programs whose demos are no list that could be pruned.

    Raises
    ------
    InputError
        With advice.
    """
    if not isinstance(program, dspy.Module):
        raise InputError(
            f"student: got {type(program).__name__}; a dspy.Module is needed.",
            hint="Give the program itself, compiled or not.",
        )
    for module in parts(program):
        if "forward" in vars(module):
            raise InputError(
                f"student: the forward method of {type(module).__name__} was replaced on the instance, as KNNFewShot"
                " does; its demonstrations are chosen anew in each call and lie in a closure.",
                hint="Prune the examples it chooses from: give KNNFewShot a smaller trainset, or compile with"
                " LabeledFewShot, BootstrapFewShot or MIPROv2 and prune that.",
            )


# --- language models ----------------------------------------------------------------------------------


def _holders(program: Any) -> Iterator[tuple[int, str, Any]]:
    """Where language models sit: (index of the module, attribute, model)."""
    for index, module in enumerate(parts(program)):
        for name, value in list(vars(module).items()):
            if isinstance(value, dspy.BaseLM):
                yield index, name, value


class Template:
    """A program to make copies of: language models detached, attached to each copy by reference.

    Parameters
    ----------
    program : dspy.Module
        Left as it is, but for a moment without its language models.

    Attributes
    ----------
    held : list of (int, str, BaseLM)
        Which module holds which model, under which attribute.
    """

    def __init__(self, program: Any) -> None:
        self.held = list(_holders(program))
        modules = parts(program)
        try:
            for index, name, _ in self.held:
                setattr(modules[index], name, None)
            self._bare = program.deepcopy()
        finally:
            for index, name, lm in self.held:
                setattr(modules[index], name, lm)

    def copy(self, held: Sequence[tuple[int, str, Any]] | None = None) -> Any:
        """An independent copy that holds the models of the original, or others."""
        program = self._bare.deepcopy()
        modules = parts(program)
        for index, name, lm in self.held if held is None else held:
            setattr(modules[index], name, lm)
        return program

    def holding(self, *, default: Any, everywhere: Any = None) -> list[tuple[int, str, Any]]:
        """What each copy shall hold so that nothing depends on a context, and nothing comes from DSPy's cache.

        Parameters
        ----------
        default : BaseLM or None
            For predictors without a model of their own.
        everywhere : BaseLM, optional
            For every predictor: a predictor's own model would beat the context.
        """
        fresh: dict[int, Any] = {}

        def without_cache(lm: Any) -> Any:
            if id(lm) not in fresh:
                fresh[id(lm)] = fresh_lm(lm)
            return fresh[id(lm)]

        own = {(index, name): lm for index, name, lm in self.held}
        held = []
        for index, module in enumerate(parts(self._bare)):
            if isinstance(module, dspy.Predict):
                lm = everywhere or own.pop((index, "lm"), None) or default
                own.pop((index, "lm"), None)
                if lm is None:
                    raise InputError(
                        "student: a predictor has no language model, and none is configured.",
                        hint="dspy.configure(lm=dspy.LM(...)), or student.set_lm(...).",
                    )
                held.append((index, "lm", without_cache(lm)))
        return held + [(index, name, without_cache(lm)) for (index, name), lm in own.items()]


def fresh_lm(lm: Any) -> Any:
    """A copy of a language model that neither reads nor writes DSPy's cache."""
    return lm.copy(cache=False)


def fresh_adapter(adapter: Any) -> Any:
    """The adapter, its own extraction model (TwoStepAdapter) without cache."""
    found = {n: fresh_lm(v) for n, v in vars(adapter).items() if isinstance(v, dspy.BaseLM)}
    if not found:
        return adapter
    twin = copy.copy(adapter)
    vars(twin).update(found)
    return twin


# --- identity: what decides the answers, without secrets -----------------------------------------------


def plain(value: Any) -> Any:
    """JSON form of any value, as DSPy would save it."""
    if hasattr(value, "toDict"):
        value = value.toDict()
    return to_jsonable_python(value, fallback=str)


def _public(name: str, value: Any) -> Any:
    low = name.lower()
    if low not in _NO_SECRET and any(word in low for word in _SECRET):
        return None
    if isinstance(value, Mapping):
        return {str(k): _public(str(k), v) for k, v in value.items()}
    if isinstance(value, str) and "://" in value:
        url = urlsplit(value)
        return urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [_public(name, item) for item in value]
    return type(value).__qualname__


def lm_identity(lm: Any) -> dict[str, Any]:
    """Class, model, endpoint and parameters of a language model; no key, header or token."""
    kwargs = {k: _public(k, v) for k, v in sorted(getattr(lm, "kwargs", {}).items()) if v is not None}
    kwargs.pop("rollout_id", None)  # separates cache entries only, and there is no cache
    engine = getattr(lm, "_engine_spec", "auto")
    return {
        "class": f"{type(lm).__module__}.{type(lm).__qualname__}",
        "source": _source(type(lm)),
        "model": str(lm.model),
        "model_type": str(getattr(lm, "model_type", "")),
        "engine": engine if isinstance(engine, str) else _own_state(engine),
        "kwargs": {k: v for k, v in kwargs.items() if v is not None},
        # What a class of the user's own keeps beside DSPy's parameters may decide its answers.
        "state": None if _source(type(lm)) is None else _own_state(lm),
    }


def _own_state(thing: Any) -> dict[str, Any]:
    """Class and plain attributes; no secrets."""
    return {
        "class": f"{type(thing).__module__}.{type(thing).__qualname__}",
        **{
            name: _public(name, value)
            for name, value in sorted(getattr(thing, "__dict__", {}).items())
            if isinstance(value, str | int | float | bool)
            and name.lstrip("_") not in ("cache", "warned_zero_temp_rollout")
        },
    }


def base_url(lm: Any) -> str:
    """The address by which a price is looked up; of a provider that is not known, one that no price list knows."""
    given = lm.kwargs.get("api_base") or lm.kwargs.get("base_url")
    if given:
        return str(_public("url", str(given)))
    provider = str(lm.model).partition("/")[0]
    return _PUBLIC_APIS.get(provider, f"https://{provider}.invalid")


def adapter_identity(adapter: Any) -> dict[str, Any]:
    """Class and settings of an adapter."""
    return {
        "class": f"{type(adapter).__module__}.{type(adapter).__qualname__}",
        "source": _source(type(adapter)),
        **{
            name: lm_identity(value) if isinstance(value, dspy.BaseLM) else _public(name, value)
            for name, value in sorted(vars(adapter).items())
            if name != "callbacks" and (isinstance(value, dspy.BaseLM | str | int | float | bool))
        },
    }


def _source(cls: type) -> str | None:
    """Hash of a class's source; ``None`` for DSPy's own, whose version is named instead, and where there is none."""
    if cls.__module__.split(".")[0] == "dspy":
        return None
    try:
        return hashlib.sha256(inspect.getsource(cls).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return None


def structure(program: Any) -> dict[str, Any]:
    """Everything but demos and models that decides a run and can be read off the program."""
    modules = [
        {
            "class": f"{type(m).__module__}.{type(m).__qualname__}",
            "source": _source(type(m)),
            "settings": {
                name: _public(name, value)
                for name, value in sorted(vars(m).items())
                if isinstance(value, str | int | float | bool) and name not in ("stage", "_compiled")
            },
        }
        for m in parts(program)
    ]
    described = [
        {
            "path": p.path,
            "signature": plain(p.signature.dump_state()),
            "types": {k: str(f.annotation) for k, f in p.signature.fields.items()},
            "config": _public("config", predictor.config),
        }
        for p, (_, predictor) in zip(predictors(program), _all(program), strict=True)
    ]
    return {"dspy": str(dspy.__version__), "modules": modules, "predictors": described}
