"""Names that other modules had in earlier versions."""

import importlib
import warnings
from collections.abc import Callable
from typing import Any


def getter(module: str, places: dict[str, str]) -> Callable[[str], Any]:
    """Returns a ``__getattr__`` for a module whose names have moved, which warns.

    Args:
      module: the old module.
      places: the module where each of its names is now.
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} has moved to {places[name]}.{name}; the old name will be removed",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(places[name]), name)

    return get
