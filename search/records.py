"""Tuning records: what a search found for a region, kept in the kernel cache for compilations to come.

A record belongs to one region on one target with one number of threads. It is also used for regions that differ only in
their number of rows, the nearest first, and travels with ``fuserc cache export``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch

from fuser.codegen.choice import Choice, GroupChoice, Kernel
from fuser.ir.errors import FuserError
from fuser.ir.graph import OperatorGroup, Region
from fuser.ir.scheme import Scheme, groups
from fuser.ir.target import Target
from fuser.kernels.base import Table, canonical
from fuser.kernels.families import IMPLEMENTATIONS
from fuser.runtime.cache import KernelCache
from fuser.search.partition import alternatives, choose, kernels, predicted

logger = logging.getLogger("fuser")
RECORD = "tuning"
_FARTHEST = 8.0
"""Rows may differ by this factor; beyond it the cost model knows more than the record."""


def structure(region: Region) -> str:
    """A hash of 16 hex digits that is equal for regions that differ in their number of rows alone: operators, wiring,
    constants' shapes, dtypes, and the widths that follow from neither, such as those of attention."""
    graph = region.graph
    order: dict[str, int] = {}
    parts = []
    for op in region.operators:
        parts.append(op.semantics.signature)
        for value in (*op.inputs, *op.outputs):
            spec = graph.values[value]
            at = order.setdefault(graph.base(value), len(order))
            shape = spec.shape if graph.base(value) in graph.constants else (len(spec.shape),)
            parts.append(f"{at}:{spec.dtype}:{shape}")
        parts.append(str(op.semantics.widths([graph.values[value].shape for value in op.inputs])))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def rows(region: Region) -> int:
    """Rows of the region's last result: all its elements over those of one row."""
    shape = region.graph.values[region.operators[-1].output].shape
    return max(math.prod(shape[:-1]), 1)


def write(
    cache: KernelCache, region: Region, choice: Choice, target: Target, threads: int, details: Mapping[str, Any]
) -> None:
    """Remember ``choice`` for ``region``; ``details`` are numbers to keep with it. Raises CacheError when the cache
    cannot be written."""
    position = {op.name: i for i, op in enumerate(region.operators)}
    chosen = []
    for group in choice.groups:
        found = [] if group.kernel is None else alternatives(group.kernel, IMPLEMENTATIONS, target)
        chosen.append(
            {
                "operators": [position[op.name] for op in group.group.operators],
                "family": group.family,
                "parameters": None if group.kernel is None else canonical(group.parameters),
                "index": found.index(group.kernel) if group.kernel in found else 0,
                "seconds": group.seconds if group.measured else None,
                "offline": group.offline,
            }
        )
    key = "\0".join([*_context(region, target, threads), region.hash])
    value = {
        "structure": structure(region),
        "target": target.key,
        "cores": target.cores,
        "threads": threads,
        "region": region.hash,
        "rows": rows(region),
        "scheme": str(choice.scheme),
        "kernels": chosen,
        "torch": torch.__version__,
        **details,
    }
    cache.write_record(RECORD, key, value)


def read(
    cache: KernelCache,
    region: Region,
    target: Target,
    threads: int,
    table: Table = IMPLEMENTATIONS,
    *,
    exact: bool = False,
) -> Choice | None:
    """The remembered choice for ``region``, or for the nearest number of rows (``exact``: this region only); None when
    there is none that fits, say because it was made by another version whose kernels are gone."""
    context = _context(region, target, threads)
    mine = rows(region)
    found: list[tuple[float, str, Mapping[str, Any]]] = []
    record = cache.read_record(RECORD, "\0".join([*context, region.hash]))
    if record is not None:
        found.append((-1.0, region.hash, record))
    if not found and not exact:
        for other in cache.records(RECORD):
            if [other.get(name) for name in ("structure", "target", "cores", "threads")] != [
                context[0],
                target.key,
                target.cores,
                threads,
            ]:
                continue
            try:
                distance = abs(math.log(max(int(other.get("rows", 1)), 1) / mine))
            except (TypeError, ValueError, OverflowError):
                continue
            if distance <= math.log(_FARTHEST):
                found.append((distance, str(other.get("region")), other))
    for _, _, value in sorted(found, key=lambda f: f[:2]):
        try:
            choice = _restore(value, region, target, table)
        except (FuserError, LookupError, TypeError, ValueError) as error:
            logger.info("a tuning record does not fit the region %s: %s", region.hash, error)
            continue
        return choice
    return None


def _context(region: Region, target: Target, threads: int) -> tuple[str, ...]:
    return structure(region), target.key, str(target.cores), str(threads)


def _restore(value: Mapping[str, Any], region: Region, target: Target, table: Table) -> Choice:
    """The choice of a record for a region of the same structure. Raises SchemeError, LookupError, TypeError or
    ValueError when it does not fit."""
    operators = region.operators
    wanted = {tuple(k["operators"]): k for k in value["kernels"]}
    scheme = Scheme.from_groups(region, (region.graph.group(operators[i] for i in positions) for positions in wanted))
    position = {op.name: i for i, op in enumerate(operators)}
    known: dict[frozenset[str], list[Kernel]] = {}

    def all_kernels(group: OperatorGroup) -> list[Kernel]:
        if group.names not in known:
            known[group.names] = list(kernels(group, table, target, offline=True))
        return known[group.names]

    chosen: list[GroupChoice] = []
    for group in groups(scheme, region, lambda group: bool(all_kernels(group))):
        entry = wanted.get(tuple(position[op.name] for op in group.operators))
        if entry is None:
            raise ValueError("no kernel of this version runs one of its groups")
        offline = bool(entry.get("offline"))
        space = [k for k in all_kernels(group) if k.family.name == entry["family"] and k.offline == offline]
        same = [k for k in space if canonical(k.parameters) == entry["parameters"]]
        if not space or (offline and not same):
            # No other kernel is like one that was built offline, say of headers that are gone.
            chosen.extend(choose([group], table, target))
            continue
        choice = predicted(group, same[0] if same else space[min(int(entry["index"]), len(space) - 1)], target)
        seconds = entry.get("seconds") if same and value.get("region") == region.hash else None
        if seconds is not None:
            choice = dataclasses.replace(choice, seconds=float(seconds), measured=True)
        chosen.append(choice)
    return Choice(Scheme.from_groups(region, (c.group for c in chosen)), tuple(chosen))
