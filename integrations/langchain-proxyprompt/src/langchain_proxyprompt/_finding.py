"""Where few-shot templates hide inside a Runnable, and how to put another one there.

``Runnable.get_prompts()`` misses fallbacks, branches and routers, so the fields of the pydantic models are walked. What
lives in a closure (a ``RunnableLambda`` over another chain, a graph node, a tool) can be seen at best, not replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from langchain_core.language_models import BaseLanguageModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.prompts import (
    AIMessagePromptTemplate,
    ChatPromptTemplate,
    FewShotChatMessagePromptTemplate,
    FewShotPromptTemplate,
    HumanMessagePromptTemplate,
)
from langchain_core.prompts.few_shot_with_templates import FewShotPromptWithTemplates
from langchain_core.runnables import Runnable, RunnableLambda
from pydantic import BaseModel

from proxyprompt.errors import InputError

__all__ = [
    "FEW_SHOT",
    "Found",
    "copied",
    "find_template",
    "find_templates",
    "language_models",
    "replace_parts",
    "turn_pairs",
    "walk",
]

FEW_SHOT = (FewShotPromptTemplate, FewShotPromptWithTemplates, FewShotChatMessagePromptTemplate)
_OPAQUE = ("RunnableLambda", "RunnableGenerator", "StructuredTool", "Tool")


@dataclass(frozen=True)
class Found:
    """A template that holds demonstrations.

    Attributes
    ----------
    path : str
        How it is reached from the chain, such as ``first.messages[1]``; may be passed as ``template=``.
    template : object
        The live object.
    closure : str
        The part of ``path`` that is a closure, where nothing can be replaced; else empty.
    """

    path: str
    template: Any
    closure: str = ""


def _children(part: Any) -> Iterator[tuple[str, Any, bool]]:
    """``(step, child, in a closure)`` of what a part is made of."""
    if isinstance(part, BaseLanguageModel):
        return
    if isinstance(part, RunnableLambda):
        for i, inner in enumerate(_closed_over(part)):
            yield f"<closure {i}>", inner, True
    elif isinstance(part, BaseModel):
        for name in type(part).model_fields:
            yield f".{name}", getattr(part, name, None), False
    elif isinstance(part, Mapping):
        for key, value in part.items():
            yield f"[{key!r}]", value, False
    elif isinstance(part, list | tuple):
        for i, value in enumerate(part):
            yield f"[{i}]", value, False


def _closed_over(part: RunnableLambda[Any, Any]) -> list[Any]:
    """Runnables that a function can reach; ``deps`` reads its source text, which may not be there."""
    found = list(part.deps)
    function: Any = getattr(part, "func", None) or getattr(part, "afunc", None)
    owner = getattr(function, "__self__", None)
    found += [owner] if isinstance(owner, Runnable) else list(getattr(owner, "__dict__", {}).values())
    function = getattr(function, "__func__", function)
    code, known = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    found += [known[name] for name in getattr(code, "co_names", ()) if name in known]
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # not filled yet
            found.append(cell.cell_contents)
    # The bound method of a Runnable, such as (prompt | model).invoke, stands for it.
    found = [getattr(each, "__self__", each) for each in found]
    return list({id(each): each for each in found if isinstance(each, Runnable)}.values())


def walk(
    part: Any, path: str = "", closure: str = "", seen: frozenset[int] = frozenset()
) -> Iterator[tuple[str, Any, str]]:
    """``(path, part, closure)`` of a Runnable and everything in it; see :class:`Found`."""
    if id(part) in seen:
        return
    yield path.lstrip("."), part, closure
    for step, child, closed in _children(part):
        where = path + step
        yield from walk(child, where, closure or (where if closed else ""), seen | {id(part)})


def _static(item: Any, message: type[BaseMessage], template: type[Any]) -> bool:
    return isinstance(item, message) or (isinstance(item, template) and not item.input_variables)


def turn_pairs(prompt: ChatPromptTemplate) -> range:
    """Positions of the first run of (human, ai) turns without variables; each pair is a demonstration."""
    items = prompt.messages
    for start in range(len(items)):
        stop = start
        while (
            stop + 1 < len(items)
            and _static(items[stop], HumanMessage, HumanMessagePromptTemplate)
            and _static(items[stop + 1], AIMessage, AIMessagePromptTemplate)
        ):
            stop += 2
        # What follows the demonstrations is the query; a prompt that ends with them asks nothing.
        if stop > start and stop < len(items):
            return range(start, stop)
    return range(0)


def find_templates(chain: Any) -> list[Found]:
    """Every template with demonstrations, each object once.

    Parameters
    ----------
    chain : Runnable
        Or a prompt template.

    Returns
    -------
    list of Found
    """
    found: dict[int, Found] = {}
    for path, part, closure in walk(chain):
        holds = isinstance(part, FEW_SHOT) or (
            isinstance(part, ChatPromptTemplate) and len(turn_pairs(part)) > 0
        )
        # What a function uses too cannot be replaced everywhere, so a closure outweighs every other way.
        if holds and (id(part) not in found or (closure and not found[id(part)].closure)):
            found[id(part)] = Found(path or "(the prompt itself)", part, closure)
    return list(found.values())


def find_template(chain: Any, wanted: Any = None) -> Found:
    """The one template to prune.

    Parameters
    ----------
    chain : Runnable
    wanted : object or str, optional
        The template itself, or its path as :func:`find_templates` gives it. Needed where there are several.

    Raises
    ------
    InputError
        If there is none, there are several and none is named, or it lives where nothing can be replaced.
    """
    if _is_graph(chain):
        raise InputError(
            f"chain: a {type(chain).__name__} runs functions, in which a prompt cannot be found or replaced.",
            hint="Pass the inner chain (prompt | model) that the node calls, and use result.chain in the node.",
        )
    found = find_templates(chain)
    if wanted is not None:
        chosen = [f for f in found if f.template is wanted or f.path == wanted]
        if not chosen:
            paths = ", ".join(f.path for f in found) or "none"
            raise InputError(
                f"template: {str(wanted)[:80]!r} is not in the chain; templates with examples: {paths}."
            )
    else:
        chosen = found
    if not chosen:
        raise InputError(
            f"chain: no few-shot template found{_opaque(chain)}.",
            hint="Pass the chain that holds a FewShotPromptTemplate, a FewShotChatMessagePromptTemplate, or a"
            " ChatPromptTemplate with fixed (human, ai) turns before the query; from inside a function, graph node or"
            " tool, pass that inner chain itself.",
        )
    open_ones = [f for f in chosen if not f.closure]
    if len(chosen) > 1:
        raise InputError(
            f"chain: {len(chosen)} few-shot templates: {', '.join(f.path for f in chosen)}.",
            hint="Say which one with template=, by its path or the object itself.",
        )
    if not open_ones:
        raise InputError(
            f"chain: the few-shot template at {chosen[0].path} lives inside a function, where it cannot be replaced.",
            hint="Pass the inner chain that the function calls, and let the function call result.chain.",
        )
    return open_ones[0]


def _is_graph(chain: Any) -> bool:
    return any(kind.__module__.startswith("langgraph.") for kind in type(chain).__mro__)


def _opaque(chain: Any) -> str:
    names = [
        path or type(p).__name__ for path, p, _ in walk(chain) if type(p).__name__ in _OPAQUE or _is_graph(p)
    ]
    return f" (functions that cannot be looked into: {', '.join(names)})" if names else ""


def language_models(chain: Any) -> list[BaseLanguageModel[Any]]:
    """Models that can be replaced, each object once."""
    models = {id(p): p for _, p, closure in walk(chain) if isinstance(p, BaseLanguageModel) and not closure}
    return list(models.values())


def copied(part: BaseModel, **changed: Any) -> Any:
    """A copy with some fields changed, without what the original has cached about itself, such as its serialized form."""
    new = part.model_copy(update=changed)
    for name in [n for n in new.__dict__ if isinstance(getattr(type(new), n, None), cached_property)]:
        del new.__dict__[name]
    return new


def replace_parts(chain: Any, new: Callable[[Any], Any]) -> Any:
    """A copy of the chain in which some parts are others; what holds none of them is shared with the original.

    Parameters
    ----------
    chain : Runnable
    new : callable
        ``new(part)`` gives what stands in for a part, or ``None`` to keep it.

    Returns
    -------
    object
        Of the chain's own type; the chain itself if nothing was replaced.
    """
    memo: dict[int, Any] = {}

    def copy(part: Any) -> Any:
        if id(part) in memo:
            return memo[id(part)]
        memo[id(part)] = part  # a cycle ends here
        other = new(part)
        memo[id(part)] = other if other is not None else inside(part)
        return memo[id(part)]

    def inside(part: Any) -> Any:
        if isinstance(part, BaseLanguageModel | RunnableLambda):
            return part
        if isinstance(part, BaseModel):
            before = {name: getattr(part, name, None) for name in type(part).model_fields}
            after = {name: copy(value) for name, value in before.items()}
            changed = {name: value for name, value in after.items() if value is not before[name]}
            return copied(part, **changed) if changed else part
        if isinstance(part, dict):
            items = {key: copy(value) for key, value in part.items()}
            return items if any(items[k] is not part[k] for k in part) else part
        if isinstance(part, list | tuple):
            values = [copy(value) for value in part]
            if all(a is b for a, b in zip(values, part, strict=True)):
                return part
            return values if isinstance(part, list) else tuple(values)
        return part

    return copy(chain)
