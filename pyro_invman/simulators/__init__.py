"""Processes with known truth: `linear_gaussian`, closed forms throughout; `melt_pool`, the main job; `oscillations`;
`grain_growth`, cut up to be seen."""

import importlib
from types import ModuleType

__all__ = ["grain_growth", "linear_gaussian", "melt_pool", "oscillations"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
