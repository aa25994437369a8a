"""Explanation techniques: boolean coalitions and their values in, an Attribution out."""

from .base import Attribution, Design, Explainer
from .exact import ExactShapley
from .kernel_shap import KernelSHAP
from .leave_one_out import LeaveOneOut
from .lime import LIME
from .weighted_banzhaf import WeightedBanzhaf

__all__ = [
    "LIME",
    "Attribution",
    "Design",
    "ExactShapley",
    "Explainer",
    "KernelSHAP",
    "LeaveOneOut",
    "WeightedBanzhaf",
]
