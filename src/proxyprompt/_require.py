"""The one place where optional packages are imported."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import MissingDependencyError


def require(module: str, extra: str) -> ModuleType:
    """Import ``module`` or say which extra of ``proxyprompt-core`` brings it.

    Raises
    ------
    MissingDependencyError
        If the module is not installed. An error inside an installed module is passed on unchanged.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingDependencyError(
            f"The package {module.split('.')[0]!r} is needed here and not installed.",
            hint=f"Install it with: pip install 'proxyprompt-core[{extra}]'",
        ) from error
