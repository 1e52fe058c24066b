"""One encoder layer of BERT-base as a space of programs, and an objective that trusts no earlier measurement."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fuser import zoo
from fuser.codegen.render import header_folder
from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.graphs import raise_graph
from fuser.ir.attention import AttentionSpec
from fuser.ir.errors import SchemeError
from fuser.ir.graph import Region
from fuser.ir.masks import Mask
from fuser.runtime.build import Source, build
from fuser.runtime.cache import KernelCache
from fuser.schemes import from_atoffer
from fuser.search.measured import Build, MeasuredObjective
from fuser.search.samplers import AtofferSampler
from fuser.search.space import Space


def layer(mask: Mask | None, batch: int, length: int) -> list[Region]:
    """The attention half and the feed-forward half of a BERT-base layer, as they are captured."""
    configuration = zoo.configuration("bert-base")
    model, sizes = configuration.build(layers=1, batch=batch, seq=length)
    captured = capture(model, flatten_call((), configuration.example(sizes, False)))
    found = {region.hash: region for region in raise_graph(captured, mask and AttentionSpec(mask)).regions}
    return [region for region in found.values() if is_half(region)]


def is_half(region: Region) -> bool:
    """Whether 16-bit schemes say something about a region."""
    try:
        from_atoffer(AtofferSampler.START, region)
    except SchemeError:
        return False
    return True


class Builder:
    """Builds kernels in ``cache`` and counts the seconds that this takes."""

    def __init__(self, space: Space, cache: KernelCache) -> None:
        self.space = space
        self.cache = cache
        self.spent: list[float] = []

    def __call__(self, sources: Sequence[Source]) -> Mapping[str, Path]:
        begin = time.perf_counter()
        target = self.space.target
        paths = build(sources, target, headers=header_folder(target), cache=self.cache)
        self.spent.append(time.perf_counter() - begin)
        return paths

    @property
    def seconds(self) -> float:
        return math.fsum(self.spent)


def objective(space: Space, folder: Path, builder: Build) -> MeasuredObjective:
    """Times of ``space`` that are remembered in ``folder`` alone, with kernels of ``builder``."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return MeasuredObjective(space, cache=KernelCache(folder), builder=builder)
