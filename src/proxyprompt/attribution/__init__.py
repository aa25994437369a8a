"""Explanation techniques: boolean coalitions and their values in, an Attribution out."""

from .banzhaf import Banzhaf
from .base import Attribution, Design, Explainer
from .decisions import Below, BottomK, Decision, FullRanking, TopK
from .exact import ExactShapley
from .interactions import Interactions
from .kernel_shap import KernelSHAP
from .lasso import Lasso
from .leave_one_out import LeaveOneOut
from .lime import LIME
from .pairwise import PairwiseInteractions
from .permutation import PermutationDesign, PermutationShapley
from .surrogate_shap import SurrogateSHAP
from .until_settled import Look, SettledAttribution, attribute_until_settled
from .weighted_banzhaf import WeightedBanzhaf

__all__ = [
    "LIME",
    "Attribution",
    "Banzhaf",
    "Below",
    "BottomK",
    "Decision",
    "Design",
    "ExactShapley",
    "Explainer",
    "FullRanking",
    "Interactions",
    "KernelSHAP",
    "Lasso",
    "LeaveOneOut",
    "Look",
    "PairwiseInteractions",
    "PermutationDesign",
    "PermutationShapley",
    "SettledAttribution",
    "SurrogateSHAP",
    "TopK",
    "WeightedBanzhaf",
    "attribute_until_settled",
]
