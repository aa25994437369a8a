"""Prune the few-shot examples of a LangChain chain, with proof on your own queries."""

from ._finding import Found, find_templates
from ._mask import MaskLostError
from .component import PruneDemonstrations
from .models import ChatModelBackend
from .prune import PrunedChain, apply_artifact, aprune_examples, materialize, prune_examples
from .selector import PrunedExampleSelector

__all__ = [
    "ChatModelBackend",
    "Found",
    "MaskLostError",
    "PruneDemonstrations",
    "PrunedChain",
    "PrunedExampleSelector",
    "apply_artifact",
    "aprune_examples",
    "find_templates",
    "materialize",
    "prune_examples",
]
