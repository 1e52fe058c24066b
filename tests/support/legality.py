"""The rule that real schemes obey, for tests of schemes: some kernel runs every group of several operators."""

from __future__ import annotations

from fuser.ir.scheme import Legality
from fuser.ir.target import Target
from fuser.kernels.base import Table
from fuser.search.partition import kernels


def legality(table: Table, target: Target) -> Legality:
    """Whether a family of ``table`` runs a group on ``target``."""
    return lambda group: next(kernels(group, table, target), None) is not None
