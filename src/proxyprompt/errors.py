"""Every exception that ProxyPrompt raises on purpose.

::

    ProxyPromptError
     +-- InputError (ValueError)          something the caller passed breaks a rule
     |    +-- ConfigError                 ... in a configuration file
     |    +-- DataError                   ... in demonstrations, queries, labels or splits
     |    +-- ModelSpecError              ... in a model name such as ``embedded:NAME``
     |    +-- PromptMismatchError         ... in a request that should hold an artifact's prompt; nothing was sent
     +-- MissingDependencyError (ImportError)   an optional package is not installed
     +-- BackendError (RuntimeError)      a model could not be loaded or did not answer
     |    +-- RetryableBackendError       the same request may succeed later
     |    +-- RecordingMissingError       a replay has no answer to this request
     +-- LedgerError (RuntimeError)       the ledger cannot be read or written
     |    +-- LedgerCorruptError          a stored row does not match its own hash
     +-- BudgetExceededError (RuntimeError)     a limit would be passed by the next call
     +-- InconclusiveError (RuntimeError) too few valid values to give an honest answer
     +-- ArtifactError (ValueError)       a saved result cannot be read

Messages give the parameter, the value received, the rule and the remedy. ``retryable`` says whether
repeating the call unchanged can help; ``hint`` is one sentence on what to do.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "ArtifactError",
    "BackendError",
    "BudgetExceededError",
    "ConfigError",
    "DataError",
    "InconclusiveError",
    "InputError",
    "LedgerCorruptError",
    "LedgerError",
    "MissingDependencyError",
    "ModelSpecError",
    "PromptMismatchError",
    "PromptMismatchWarning",
    "ProxyPromptError",
    "RecordingMissingError",
    "RetryableBackendError",
]


class ProxyPromptError(Exception):
    """Base of the tree; catches everything that ProxyPrompt raises on purpose.

    Parameters
    ----------
    message : str
        What is wrong: parameter, value, rule.
    hint : str, optional
        What to do about it; shown after the message.
    """

    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class InputError(ProxyPromptError, ValueError):
    """An argument breaks a rule."""


class ConfigError(InputError):
    """A configuration file breaks a rule."""


class DataError(InputError):
    """Demonstrations, queries, labels or splits break a rule."""


class ModelSpecError(InputError):
    """A model name is not understood."""


class PromptMismatchError(InputError):
    """A request does not hold the prompt that an artifact is about; nothing was sent."""


class PromptMismatchWarning(UserWarning):
    """A request does not hold the prompt that an artifact is about, and was sent as it is."""


class MissingDependencyError(ProxyPromptError, ImportError):
    """An optional package is needed and not installed."""


class BackendError(ProxyPromptError, RuntimeError):
    """A model could not be loaded, or did not answer."""


class RetryableBackendError(BackendError):
    """A model did not answer this time; the same request may succeed later."""

    retryable: ClassVar[bool] = True


class RecordingMissingError(BackendError):
    """A replay holds no answer to a request."""


class LedgerError(ProxyPromptError, RuntimeError):
    """The ledger cannot be opened, read or written."""


class LedgerCorruptError(LedgerError):
    """A stored row does not match the hash it carries."""


class BudgetExceededError(ProxyPromptError, RuntimeError):
    """The next call would pass a limit; nothing was sent."""


class InconclusiveError(ProxyPromptError, RuntimeError):
    """Too many values are missing for an honest answer."""


class ArtifactError(ProxyPromptError, ValueError):
    """A saved result is not readable, or of an unknown version."""
