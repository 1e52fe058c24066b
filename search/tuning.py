"""What ``optimize(search=…)`` measures: tuning records first, else the least that the cost model cannot tell.

Without a tuning record, for every GEMM of a scheme the fused kernel is compared with the library's GEMM followed by the
rest of the group. Results are records of the kernel cache, so they are reused by later programs and travel with
``fuserc cache export``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from fuser.codegen.choice import Choice, GroupChoice
from fuser.codegen.render import generator_hash
from fuser.ir.errors import BuildError, FuserError, KernelError, SchemeError
from fuser.ir.graph import OperatorGroup, Region
from fuser.ir.operators import Bias, Gemm
from fuser.ir.scheme import Scheme
from fuser.ir.target import Target
from fuser.kernels.base import KernelCall
from fuser.kernels.families import IMPLEMENTATIONS
from fuser.kernels.gemm import GemmFamily
from fuser.runtime.cache import KernelCache, default_cache
from fuser.search import records
from fuser.search.measure import measure, prepare
from fuser.search.partition import alternatives, choose, kernels, predicted
from fuser.search.study import search

logger = logging.getLogger("fuser")
RECORD = "kernel_time"
_MARGIN = 0.03
"""The library must win by this much: its results take another pass through memory that a lone kernel does not show."""


class Tuner:
    """Refines choices by measurement on one target with one number of threads.

    What a search has found for a region, or for one that differs only in its number of rows, is taken as it is. With
    ``trials``, a search of so many runs first for regions that have had none.
    """

    def __init__(self, target: Target, threads: int, trials: int = 0, cache: KernelCache | None = None) -> None:
        self.target = target
        self.threads = threads
        self.trials = trials
        self.cache = cache
        self.measured = 0
        """Kernels measured by this tuner beside its search, not counting those remembered."""

    def without_trials(self) -> Tuner:
        """One that searches nothing."""
        return self if not self.trials else Tuner(self.target, self.threads, cache=self.cache)

    def refine(self, choices: Sequence[tuple[Choice, Region]]) -> list[Choice]:
        """The choices that a search found, and for other regions the given ones with the fastest measured way to run
        each of their GEMM groups; kernels that lack a measurement are built together first."""
        if self.trials:
            self._search([region for _, region in choices])
        tuned = [records.read(self._store, region, self.target, self.threads) for _, region in choices]
        candidates = [
            [self._candidates(group) for group in choice.groups] if found is None else []
            for (choice, _), found in zip(choices, tuned, strict=True)
        ]
        self._prepare([c for groups in candidates for c in groups if len(c) > 1])
        refined = []
        for (choice, region), groups, known in zip(choices, candidates, tuned, strict=True):
            if known is not None:
                refined.append(known)
                continue
            found = [way for c in groups for way in (self._fastest(c) if len(c) > 1 else c[0])]
            try:
                refined.append(Choice(Scheme.from_groups(region, (g.group for g in found)), tuple(found)))
            except SchemeError:
                refined.append(choice)
        return refined

    def _search(self, regions: Sequence[Region]) -> None:
        """Search the regions unless each has a record of its own; what goes wrong leaves the cost model's choice."""
        known = [records.read(self._store, region, self.target, self.threads, exact=True) for region in regions]
        if not regions or all(choice is not None for choice in known):
            return
        hashes = {region.hash for region in regions}
        occurring = [region for region in regions[0].graph.regions if region.hash in hashes]
        try:
            found = search(
                occurring, self.target, self.threads, trials=self.trials, label="optimize", cache=self._store
            )
        except FuserError as error:
            logger.warning("the search failed, so nothing was tuned: %s", error)
        else:
            logger.info("%s", found.summary())

    def _prepare(self, groups: Sequence[Sequence[list[GroupChoice]]]) -> None:
        """Build what is about to be measured, in parallel."""
        missing = [ways for ways in groups if self._record(ways) is None]
        try:
            prepare([candidate for c in missing for candidate in c], self.target, self.threads, self._store)
        except BuildError as error:
            logger.warning("a candidate kernel did not build and is not considered: %s", error)

    @property
    def _store(self) -> KernelCache:
        return self.cache or default_cache()

    def _record(self, ways: Sequence[Sequence[GroupChoice]]) -> dict[str, Any] | None:
        return self._store.read_record(RECORD, self._key(ways))

    def _candidates(self, choice: GroupChoice) -> list[list[GroupChoice]]:
        """Ways to run a group, the given one first."""
        if choice.kernel is None or choice.family != GemmFamily.name or self.target.emulated:
            # How fast the emulator is says nothing about a GPU.
            return [[choice]]
        others = [k for k in alternatives(choice.kernel, IMPLEMENTATIONS, self.target) if k != choice.kernel]
        library = [predicted(choice.group, k, self.target) for k in others if k.implementation.from_library]
        split = self._library(choice.group)
        return [[choice], *([found] for found in library), *([split] if split is not None else [])]

    def _library(self, group: OperatorGroup) -> list[GroupChoice] | None:
        """The library's GEMM (with the bias) and the rest of the group as a kernel of its own."""
        (gemm,) = group.of(Gemm)
        head = [gemm, *(op for op in group.of(Bias) if op.inputs[0] == gemm.output)]
        rest = [op for op in group.operators if op not in head]
        if not rest or not group.graph.group(rest).is_convex:
            return None
        first = group.graph.group(head)
        library = (k for k in kernels(first, IMPLEMENTATIONS, self.target) if k.implementation.from_library)
        if (found := next(library, None)) is None:
            return None
        try:
            return [
                predicted(first, found, self.target),
                *choose([group.graph.group(rest)], IMPLEMENTATIONS, self.target),
            ]
        except ValueError:
            return None

    def _fastest(self, candidates: Sequence[list[GroupChoice]]) -> list[GroupChoice]:
        seconds = self.compare(candidates)
        if seconds is None:
            return candidates[0]
        best = min(range(1, len(seconds)), key=seconds.__getitem__)
        at = best if seconds[best] < seconds[0] * (1 - _MARGIN) else 0
        share = seconds[at] / len(candidates[at])
        return [dataclasses.replace(c, seconds=share, measured=True) for c in candidates[at]]

    def compare(self, candidates: Sequence[Sequence[GroupChoice]]) -> list[float] | None:
        """Seconds of ways to do the same work, each a sequence of groups, measured together unless they are remembered;
        None where one of them cannot be built or run."""
        # All together, also where some were measured before: only times of one run may be compared.
        if (record := self._record(candidates)) is not None:
            return [float(seconds) for seconds in record["seconds"]]
        try:
            times = measure(candidates, self.target, self.threads, self._store)
        except (BuildError, KernelError, torch.OutOfMemoryError) as error:
            logger.warning("ways to run a product could not be compared, so the first is taken: %s", error)
            return None
        self.measured += len(candidates)
        value = {
            "seconds": [time.seconds for time in times],
            "spread": [time.spread for time in times],
            "runs": [time.runs for time in times],
            "operators": [[op.kind for c in way for op in c.group.operators] for way in candidates],
            "families": [[c.family for c in way] for way in candidates],
            "torch": torch.__version__,
        }
        self._store.write_record(RECORD, self._key(candidates), value)
        return [t.seconds for t in times]

    def _key(self, ways: Sequence[Sequence[GroupChoice]]) -> str:
        """What times depend on: the kernels, their templates and sizes, the machine, the threads and the libraries.

        Rows count by their nearest power of two, so that a new length of a sequence reuses what its neighbour found.
        """
        parts = [self.target.key, str(self.target.cores), str(self.threads), torch.__version__]
        parts.append(generator_hash(self.target))
        for way in ways:
            parts.append("way")
            for choice in way:
                region = Region(choice.group.graph, choice.group.operators)
                call = choice.call(self.target, self.threads)
                parts += [records.structure(region), str(1 << round(math.log2(records.rows(region)))), choice.name]
                parts += [call.spec.hash] if isinstance(call, KernelCall) else []
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def tuner_for(search: str | int, target: Target, threads: int) -> Tuner | None:
    """The tuner that ``optimize(search=…)`` asks for: None for ``"model"``, which trusts the cost model.

    Raises ValueError for anything but ``"cached"``, ``"model"`` or a positive number of trials.
    """
    if search == "model":
        return None
    if search == "cached":
        return Tuner(target, threads)
    if isinstance(search, int) and not isinstance(search, bool) and search > 0:
        return Tuner(target, threads, trials=search)
    raise ValueError(f'search must be "cached", "model" or a positive number of trials, not {search!r}')
