"""Searches as studies: proposed, measured and kept so that they can be stopped, resumed, shared and reported."""

from __future__ import annotations

import logging
import math
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fuser.ir.errors import SearchError
from fuser.ir.graph import OperatorGraph, Region
from fuser.ir.target import Target
from fuser.runtime.cache import KernelCache
from fuser.search.ledger import VERSION, Ledger, list_studies
from fuser.search.objective import Objective
from fuser.search.results import Progress, SearchResult
from fuser.search.run import Limits, Run, remember
from fuser.search.space import Space

if TYPE_CHECKING:
    from fuser.search.samplers import Decode

STRATEGIES = ("default", "exact", "reward", "random", "anneal", "tpe", "gp", "atoffer", "atoffer-published")
"""``default`` is the shortest path over measured kernels, then group rewards around it; ``exact`` the shortest path
alone; the others propose every program by themselves, from the default scheme on."""
logger = logging.getLogger("fuser")
_SLACK = 1.5
_PLATEAU = 24
_PATIENCE_SECONDS = 15.0


def search(
    graph: OperatorGraph | Sequence[Region],
    target: Target,
    threads: int,
    *,
    trials: int | None = 200,
    timeout: float | None = None,
    strategy: str = "default",
    seed: int = 0,
    storage: str | None = None,
    study: str | None = None,
    resume: bool = False,
    plateau: int | None = None,
    label: str = "",
    cache: KernelCache | None = None,
    progress: Callable[[Progress], None] | None = None,
    decode: Decode | None = None,
    objective: Objective | None = None,
    space: Space | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> SearchResult:
    """Search the programs of a model's graph (or of some regions) for the fastest.

    Args:
        trials: total of the study's trials; None: what the study was made with (200 for a new one).
        timeout: seconds after which this call stops proposing and measuring.
        strategy: one of :data:`STRATEGIES`.
        seed: from 0 to 2³² − 1; the same seed proposes the same programs for the same measured times.
        storage: a journal file or SQLite file by its path, a folder, which keeps a journal file for each study, or a
            database URL; None: the folder ``studies`` of the kernel cache.
        study: the study's name; an existing one is joined, so that processes and machines share its trials. None: a new
            one, or with ``resume`` the newest of this model in the storage.
        plateau: stop after so many trials in a row without one that is better by more than noise; the default strategy
            after 24, or after 8 that took over 15 s, others never.
        label: part of a new study's name.
        progress: called with the state after every step.
        decode: ``fuser.schemes.from_atoffer``, for the atoffer strategies.
        objective: what to minimize; default: time measured in a child process.
        space: the space of ``graph`` if it is known already.
        attributes: JSON values that are kept with a new study, see :attr:`StudyView.attributes`.

    Ctrl-C ends the search as a timeout does, with everything kept. The best program, measured again against the default
    one in a fresh process, is remembered in the cache as the tuning of its regions.

    Raises SearchError for arguments, storages and studies that do not fit, or when no program could be measured.
    """
    if trials is not None and trials < 1:
        raise SearchError(f"a search needs at least one trial, not {trials}")
    if timeout is not None and not timeout > 0:
        raise SearchError(f"the timeout must be a positive number of seconds, not {timeout:g}")
    if not 0 <= seed < 1 << 32:
        raise SearchError(f"the seed must be between 0 and {(1 << 32) - 1}, not {seed}")
    if strategy not in STRATEGIES:
        raise SearchError(f"there is no strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    space = Space.of(graph, target, threads) if space is None else space
    if strategy in ("default", "exact", "reward"):
        space = space.prune(_SLACK)
    ledger = _ledger(space, storage, study, resume, strategy, seed, trials, label, attributes or {})
    trials = int(ledger.header["trials"]) if trials is None else trials
    if objective is None:
        from fuser.search.measured import MeasuredObjective

        objective = MeasuredObjective(space, cache=cache)
    patience = math.inf
    if plateau is None and strategy == "default":
        plateau, patience = _PLATEAU, _PATIENCE_SECONDS
    sampler = None
    if strategy != "exact":
        from fuser.search.samplers import make_sampler

        sampler = make_sampler(strategy, space, seed, objective.costs, decode)
    limits = Limits(trials, timeout, plateau, patience)
    try:
        result = Run(ledger, space, objective, strategy, sampler, limits, progress).run()
    finally:
        objective.close()
    remember(result, cache)
    return result


def context_of(target: Target, threads: int) -> dict[str, Any]:
    """What measured times depend on beside the program."""
    return {
        "target": target.key,
        "cores": target.cores,
        "threads": threads,
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def _ledger(
    space: Space,
    storage: str | None,
    name: str | None,
    resume: bool,
    strategy: str,
    seed: int,
    trials: int | None,
    label: str,
    attributes: Mapping[str, Any],
) -> Ledger:
    if name is None and resume:
        for known in reversed(list_studies(storage)):
            try:
                ledger = Ledger.open(known, storage)
            except SearchError as error:
                logger.warning("the study %r cannot be resumed: %s", known, error)
                continue
            if ledger.header.get("space", {}).get("hash") == space.hash:
                return ledger
        raise SearchError("there is no study of this model, target and number of threads to resume; start a new one")
    if name is not None and resume:
        ledger = Ledger.open(name, storage)
    else:
        now = time.time()
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
        header = {
            "version": VERSION,
            "created": now,
            "space": space.describe(),
            "strategy": strategy,
            "seed": seed,
            "trials": 200 if trials is None else trials,
            "context": context_of(space.target, space.threads),
            "attributes": dict(attributes),
        }
        unique = "-".join(filter(None, [label or "model", stamp, uuid.uuid4().hex[:4]]))
        ledger = Ledger.create(name or unique, storage, header)
    theirs = ledger.header["space"]
    if theirs["hash"] != space.hash:
        same = [r["hash"] for r in theirs["regions"]] == [r.region.hash for r in space.regions]
        what = "machine, number of threads or version of fuser" if same else "model, mask or shape of inputs"
        raise SearchError(f"the study {ledger.name!r} is of another {what}; use a new name")
    return ledger
