"""From attributions to a smaller prompt: clean, compress, certify."""

from .certificate import Certificate, certify
from .classes import DemonstrationClass, classify
from .clean import Cleaning, Confirmation, Round, clean
from .compress import Compression, PathPoint, compress
from .order import OrderSearch, try_orders
from .path import nested_path, surrogate_path
from .relabel import Proposal, Relabeling
from .requirement import Requirement
from .surrogate import Surrogate, choose_surrogate
from .swap import Swap, try_swaps

__all__ = [
    "Certificate",
    "Cleaning",
    "Compression",
    "Confirmation",
    "DemonstrationClass",
    "OrderSearch",
    "PathPoint",
    "Proposal",
    "Relabeling",
    "Requirement",
    "Round",
    "Surrogate",
    "Swap",
    "certify",
    "choose_surrogate",
    "classify",
    "clean",
    "compress",
    "nested_path",
    "surrogate_path",
    "try_orders",
    "try_swaps",
]
