"""From attributions to a smaller prompt: clean, compress, certify."""

from .certificate import Certificate, certify
from .clean import Cleaning, Confirmation, clean
from .compress import Compression, PathPoint, compress

__all__ = [
    "Certificate",
    "Cleaning",
    "Compression",
    "Confirmation",
    "PathPoint",
    "certify",
    "clean",
    "compress",
]
