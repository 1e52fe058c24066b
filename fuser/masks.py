"""Attention masks: ``fuser.masks.Causal() & ~fuser.masks.SlidingWindow(0, 3)``. See :mod:`fuser.ir.masks`."""

from __future__ import annotations

from fuser.ir.masks import *  # noqa: F403
from fuser.ir.masks import __all__ as __all__
