"""Prune the demos of a compiled DSPy program, with proof on your own queries.

>>> from dspy_proxyprompt import ProxyPrune
"""

from .prune import ProxyPrune
from .report import DemoReport, PredictorReport, PruneReport, apply, demo_hash

__all__ = ["DemoReport", "PredictorReport", "ProxyPrune", "PruneReport", "apply", "demo_hash"]
__version__ = "0.1.0"
