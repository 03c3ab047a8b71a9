"""jaxzs: getting the most out of CLIP without labels, in JAX.

Submodules load on first use (PEP 562), so that `import jaxzs` costs no more than `import jax`.

>>> import jaxzs
>>> model = jaxzs.load("demo")
>>> model.config.projection_dim > 0
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxzs._version import __version__

_SUBMODULES = (
    "adapt",
    "classification",
    "clip",
    "data",
    "errors",
    "features",
    "flax",
    "metrics",
    "parallel",
    "patch",
    "prompt",
    "proxy",
    "report",
    "zeroshot",
)
# Names of the front door, by the submodule that they live in.
_FROM = {"Model": "clip", "load": "clip", "classify": "classification"}

# For type checkers, which do not run `__getattr__`.
if TYPE_CHECKING:
    from jaxzs.classification import classify
    from jaxzs.clip.load import Model, load

__all__ = ["Model", "__version__", "classify", "load", *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _FROM:
        return getattr(importlib.import_module(f"jaxzs.{_FROM[name]}"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"jaxzs.{name}")
    raise AttributeError(f"module 'jaxzs' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
