"""Tuning records: what a search found for a region, kept in the kernel cache for compilations to come.

A record belongs to one region on one target with one number of threads. It is also used for regions that differ only in
their number of rows, the nearest first, and travels with ``fuserc cache export``.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fuser.codegen.partition import PYTORCH, Choice, GroupChoice, choose, offline_space
from fuser.ir.errors import FuserError
from fuser.ir.graph import Region
from fuser.ir.scheme import Scheme, groups
from fuser.ir.target import Target
from fuser.kernels.base import KernelFamily, canonical
from fuser.kernels.families import FAMILIES
from fuser.runtime.cache import KernelCache

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
    kernels = []
    for group in choice.groups:
        space = [] if group.family is None else _space(group.family, group.match, target, group.offline)
        kernels.append(
            {
                "operators": [position[op.name] for op in group.group.operators],
                "family": PYTORCH if group.family is None else group.family.name,
                "parameters": None if group.family is None else canonical(group.parameters),
                "index": space.index(group.parameters) if group.parameters in space else 0,
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
        "kernels": kernels,
        "torch": torch.__version__,
        **details,
    }
    cache.write_record(RECORD, key, value)


def read(
    cache: KernelCache,
    region: Region,
    target: Target,
    threads: int,
    families: Sequence[KernelFamily] = FAMILIES,
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
            choice = _restore(value, region, target, families)
        except (FuserError, LookupError, TypeError, ValueError) as error:
            logger.info("a tuning record does not fit the region %s: %s", region.hash, error)
            continue
        return choice
    return None


def _context(region: Region, target: Target, threads: int) -> tuple[str, ...]:
    return structure(region), target.key, str(target.cores), str(threads)


def _restore(value: Mapping[str, Any], region: Region, target: Target, families: Sequence[KernelFamily]) -> Choice:
    """The choice of a record for a region of the same structure. Raises SchemeError, LookupError, TypeError or
    ValueError when it does not fit."""
    operators = region.operators
    by_name = {family.name: family for family in families}
    wanted = {tuple(k["operators"]): k for k in value["kernels"]}
    members = [region.graph.group(operators[i] for i in positions) for positions in wanted]
    scheme = Scheme.from_groups(region, members)
    position = {op.name: i for i, op in enumerate(operators)}
    chosen: list[GroupChoice] = []
    for group in groups(scheme, region, lambda g: any(f.match(g, target) is not None for f in families)):
        entry = wanted.get(tuple(position[op.name] for op in group.operators))
        if entry is None:
            raise ValueError("no kernel of this version runs one of its groups")
        family = by_name.get(entry["family"])
        match = None if family is None else family.match(group, target)
        offline = bool(entry.get("offline"))
        space = [] if family is None or match is None else _space(family, match, target, offline)
        same = [p for p in space if canonical(p) == entry["parameters"]]
        if family is None or match is None or (offline and not same):
            # No other kernel is like one that was built offline, say of headers that are gone.
            chosen.extend(choose([group], families, target))
            continue
        parameters = same[0] if same else space[min(int(entry["index"]), len(space) - 1)]
        cost = family.cost(match, parameters, target)
        seconds = entry.get("seconds") if same and value.get("region") == region.hash else None
        chosen.append(
            GroupChoice(
                group,
                family,
                match,
                parameters,
                cost,
                cost.seconds(target) if seconds is None else float(seconds),
                seconds is not None,
                offline,
            )
        )
    return Choice(Scheme.from_groups(region, (c.group for c in chosen)), tuple(chosen))


def _space(family: KernelFamily, match: Any, target: Target, offline: bool) -> Sequence[Any]:
    """Where a record's parameters are looked up."""
    return offline_space(family, match, target) if offline else family.space(match, target)
