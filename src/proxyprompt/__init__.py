"""ProxyPrompt: cut your few-shot prompt, keep your accuracy, with proof and a price tag.

The names below are the public interface; each is imported when it is first used, so that
``import proxyprompt`` stays cheap and loads no model library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .artifact import Artifact
    from .attribution import (
        Attribution,
        Banzhaf,
        Below,
        BottomK,
        FullRanking,
        Interactions,
        KernelSHAP,
        Lasso,
        LeaveOneOut,
        PairwiseInteractions,
        PermutationShapley,
        SurrogateSHAP,
        TopK,
        WeightedBanzhaf,
        attribute_until_settled,
    )
    from .config import load_config
    from .data import Splits, load_demonstrations, load_prompt, load_queries, save_prompt, split_queries
    from .errors import ProxyPromptError
    from .estimate import RunEstimate, estimate_run
    from .explains import OutputCheck, calibrate_check, explains
    from .explanation import QueryExplanation, explain_queries
    from .ledger import Ledger
    from .messages import PrunedMessages, prune_messages
    from .models import open_model
    from .openai_client import PruneCounter, wrap_openai
    from .outputs import write_outputs
    from .pipeline import Result, optimize_prompt
    from .prompt import Demonstration, FewShotPrompt, Query
    from .screening import Screening, screen
    from .settings import Settings
    from .summary import build_artifact
    from .task import LabelTask, TextTask
    from .units import InstructionSentences, QueryDocuments, QuerySentences, QueryWords
    from .value_function import PromptValueFunction, Values
    from .verifying import QueryVerification, VerifiedQueries, verify_queries

_HOME = {
    "Artifact": "artifact",
    "Attribution": "attribution",
    "Banzhaf": "attribution",
    "Below": "attribution",
    "BottomK": "attribution",
    "Demonstration": "prompt",
    "FewShotPrompt": "prompt",
    "FullRanking": "attribution",
    "InstructionSentences": "units",
    "Interactions": "attribution",
    "KernelSHAP": "attribution",
    "LabelTask": "task",
    "Lasso": "attribution",
    "LeaveOneOut": "attribution",
    "Ledger": "ledger",
    "OutputCheck": "explains",
    "PairwiseInteractions": "attribution",
    "PermutationShapley": "attribution",
    "PromptValueFunction": "value_function",
    "ProxyPromptError": "errors",
    "PruneCounter": "openai_client",
    "PrunedMessages": "messages",
    "Query": "prompt",
    "QueryDocuments": "units",
    "QueryExplanation": "explanation",
    "QueryVerification": "verifying",
    "VerifiedQueries": "verifying",
    "verify_queries": "verifying",
    "QuerySentences": "units",
    "QueryWords": "units",
    "Result": "pipeline",
    "RunEstimate": "estimate",
    "Screening": "screening",
    "Settings": "settings",
    "Splits": "data",
    "SurrogateSHAP": "attribution",
    "TextTask": "task",
    "TopK": "attribution",
    "Values": "value_function",
    "WeightedBanzhaf": "attribution",
    "attribute_until_settled": "attribution",
    "build_artifact": "summary",
    "calibrate_check": "explains",
    "explains": "explains",
    "estimate_run": "estimate",
    "explain_queries": "explanation",
    "load_config": "config",
    "load_demonstrations": "data",
    "load_prompt": "data",
    "load_queries": "data",
    "open_model": "models",
    "optimize_prompt": "pipeline",
    "prune_messages": "messages",
    "save_prompt": "data",
    "screen": "screening",
    "split_queries": "data",
    "wrap_openai": "openai_client",
    "write_outputs": "outputs",
}

__all__ = [
    "Artifact",
    "Attribution",
    "Banzhaf",
    "Below",
    "BottomK",
    "Demonstration",
    "FewShotPrompt",
    "FullRanking",
    "InstructionSentences",
    "Interactions",
    "KernelSHAP",
    "LabelTask",
    "Lasso",
    "LeaveOneOut",
    "Ledger",
    "OutputCheck",
    "PairwiseInteractions",
    "PermutationShapley",
    "PromptValueFunction",
    "ProxyPromptError",
    "PruneCounter",
    "PrunedMessages",
    "Query",
    "QueryDocuments",
    "QueryExplanation",
    "QuerySentences",
    "QueryVerification",
    "QueryWords",
    "Result",
    "RunEstimate",
    "Screening",
    "Settings",
    "Splits",
    "SurrogateSHAP",
    "TextTask",
    "TopK",
    "Values",
    "VerifiedQueries",
    "WeightedBanzhaf",
    "__version__",
    "attribute_until_settled",
    "build_artifact",
    "calibrate_check",
    "estimate_run",
    "explain_queries",
    "explains",
    "load_config",
    "load_demonstrations",
    "load_prompt",
    "load_queries",
    "open_model",
    "optimize_prompt",
    "prune_messages",
    "save_prompt",
    "screen",
    "split_queries",
    "verify_queries",
    "wrap_openai",
    "write_outputs",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
