"""Operator fusion for sparse-transformer inference.

``fuser.optimize(model)`` returns a drop-in module that runs fused kernels; ``fuser.sparse_attention`` computes exact
attention under any mask of ``fuser.masks``.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "optimize": ("fuser.module.optimized", "optimize"),
    "OptimizedModule": ("fuser.module.optimized", "OptimizedModule"),
    "load": ("fuser.saved", "load"),
    "sparse_attention": ("fuser.attention", "sparse_attention"),
    "varlen_attention": ("fuser.attention", "varlen_attention"),
    "linear_attention": ("fuser.attention", "linear_attention"),
    "attention": ("fuser.attention", None),
    "flex_attention": ("fuser.attention.flex", "flex_attention"),
    "Int8": ("fuser.module.quantizing", "Int8"),
    "FP8": ("fuser.module.quantizing", "FP8"),
    "SoftCap": ("fuser.ir.scores", "SoftCap"),
    "DEQ": ("fuser.ir.prediction", "DEQ"),
    "Int8Attention": ("fuser.ir.int8_attention", "Int8Attention"),
    "Sanger": ("fuser.ir.prediction", "Sanger"),
    "plan": ("fuser.kernels.planner", "plan"),
    "masks": ("fuser.masks", None),
    "cqs": ("fuser.cqs", None),
    "evit": ("fuser.evit", None),
    "flat": ("fuser.flat", None),
    "schemes": ("fuser.schemes", None),
    "integrations": ("fuser.integrations", None),
    "FuserError": ("fuser.ir.errors", "FuserError"),
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that importing a mask or a target does not load the compiler.
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fuser' has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    value = importlib.import_module(module)
    value = value if attribute is None else getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
