"""Causal language models on this machine, through transformers, with shared prefixes computed once."""

from __future__ import annotations

from .backend import TransformersBackend

__all__ = ["TransformersBackend"]
