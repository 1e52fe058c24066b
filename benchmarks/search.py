"""What searches over BERT-base find and cost: against an exhaustive search of one layer, cold and warm, and again.

For every shape, from an empty cache on:

1. A search of the whole model, all kernels to be built (cold), and one with all kernels built but nothing measured
   (warm). Overhead is what is neither building nor measuring.
2. The program that the warm search found against the default one, in a fresh process each time.
3. One encoder layer: every kernel of every legal group is measured, and the best sum over all legal programs is found
   by enumeration and, as a check, as a shortest path. A search that knows nothing of this has its best program compared
   with the exhaustive one's, the default and the best that either has seen, in one fresh process, all in turns.

    python benchmarks/search.py
    python benchmarks/search.py --shapes 1x128 8x512 --repeats 5
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from bert_layer import Builder, layer, objective
from harness import save

from fuser import zoo
from fuser.ir.graph import OperatorGraph
from fuser.ir.target import Target
from fuser.runtime.cache import KernelCache
from fuser.runtime.device import cpu_target
from fuser.search.ledger import StudyView, open_study
from fuser.search.measured import MeasuredObjective
from fuser.search.results import SearchResult
from fuser.search.space import Costs, Groups, Point, RegionSpace, Space
from fuser.search.study import search
from fuser.searching import graph_of

ATOFFER_EVALUATIONS = 640
"""Of AToffer's search for one shape: five rounds of 128, each in a new process."""
_CONTENDERS = 6


def whole_model(batch: int, length: int) -> OperatorGraph:
    """The operators of BERT-base."""
    configuration = zoo.configuration("bert-base")
    model, sizes = configuration.build(batch=batch, seq=length)
    return graph_of(model, (), configuration.example(sizes, False))


def searched(space: Space, measured: MeasuredObjective, folder: Path, seed: int) -> tuple[SearchResult, StudyView]:
    """A search by the default strategy, and its study."""
    storage = str(folder / f"{measured.cache.root.name}-{seed}.journal")
    regions = [region.region for region in space.regions]
    found = search(
        regions,
        space.target,
        space.threads,
        seed=seed,
        storage=storage,
        cache=measured.cache,
        objective=measured,
        space=space,
    )
    return found, open_study(found.study, storage)


def cost_of(found: SearchResult) -> dict[str, Any]:
    """What a search took."""
    return {
        "seconds": round(found.seconds_total, 2),
        "building": round(found.seconds_building, 2),
        "measuring": round(found.seconds_measuring, 2),
        "overhead_share": round(found.seconds_searching / found.seconds_total, 4),
        "trials": found.trials,
        "kernels_measured": found.kernels_measured,
        "stopped": found.stopped,
        "rank_correlation": None if found.rank_correlation is None else round(found.rank_correlation, 3),
        "default_ms": round(1e3 * found.default_seconds, 4),
        "best_ms": round(1e3 * found.seconds, 4),
    }


def evaluations_until_close(view: StudyView) -> int:
    """Kernels and programs that a search had measured when it first had a program within 2 % of its best."""
    done = [(trial, trial.seconds) for trial in view.trials if trial.seconds is not None]
    least = min(seconds for _, seconds in done)
    number, first = next((n, trial) for n, (trial, seconds) in enumerate(done, 1) if seconds <= 1.02 * least)
    return number + (0 if first.strategy == "start" else len(view.kernels))


def exhaustive(space: Space, measured: MeasuredObjective) -> tuple[Point, int]:
    """The program of the least sum of measured kernels among all legal ones, and the number of kernels measured.

    Raises AssertionError when the shortest path is not the best of the enumeration.
    """
    for at, region in enumerate(space.regions):
        for members, kernels in region.kernels.items():
            for kernel in range(len(kernels)):
                measured.kernel(at, members, kernel)
    best = Point(tuple(_least(region, at, measured.costs) for at, region in enumerate(space.regions)))
    path = space.additive(space.shortest(measured.costs), measured.costs)
    assert math.isclose(path, space.additive(best, measured.costs), rel_tol=1e-9), "the shortest path is not the best"
    return best, space.kernels


def _least(region: RegionSpace, at: int, costs: Costs) -> Groups:
    def total(program: Groups) -> float:
        return math.fsum(costs(at, members, kernel) for members, kernel in program)

    return min(region.enumerate(), key=total)


def one_layer(space: Space, kernels: KernelCache, folder: Path) -> dict[str, Any]:
    """A search of one layer against the exhaustive one; ``kernels`` are built there."""
    builder = Builder(space, kernels)
    everything = objective(space, folder / "exhaustive", builder)
    measured = objective(space, folder / "layer", builder)
    try:
        optimum, count = exhaustive(space, everything)
        found, view = searched(space, measured, folder, seed=0)
        # Programs that may be the best there is: what either way of searching ranks first.
        ranked = sorted((t for t in view.trials if t.seconds is not None), key=lambda t: float(t.seconds or 0.0))
        seen = [Point.parse(trial.point) for trial in ranked[:_CONTENDERS]]
        points = list(dict.fromkeys([space.default(), found.best, optimum, *seen]))
        again = everything.compare(points)
    finally:
        everything.close()
        measured.close()
    assert again is not None
    seconds = dict(zip(points, again, strict=True))
    best = min(again)
    return {
        "programs": str(space.programs),
        "kernels_of_all_groups": count,
        "kernels_measured": found.kernels_measured,
        "trials": found.trials,
        "evaluations_until_within_2_percent": evaluations_until_close(view),
        "atoffer_evaluations": ATOFFER_EVALUATIONS,
        "same_groups_as_exhaustive": _groups(found.best) == _groups(optimum),
        "found_ms": round(1e3 * seconds[found.best], 4),
        "exhaustive_ms": round(1e3 * seconds[optimum], 4),
        "default_ms": round(1e3 * seconds[space.default()], 4),
        "best_seen_ms": round(1e3 * best, 4),
        "gap_to_exhaustive": round(seconds[found.best] / seconds[optimum] - 1, 4),
        "gap_to_best_seen": round(seconds[found.best] / best - 1, 4),
        "additive_gap": round(
            space.additive(found.best, everything.costs) / space.additive(optimum, everything.costs) - 1, 4
        ),
    }


def _groups(point: Point) -> list[frozenset[int]]:
    return [frozenset(members for members, _ in groups) for groups in point.regions]


def case(batch: int, length: int, target: Target, threads: int, repeats: int) -> dict[str, Any]:
    """Everything about one shape."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        space = Space.of(whole_model(batch, length), target, threads)
        builder = Builder(space, KernelCache(folder / "cold"))
        cold = objective(space, folder / "cold", builder)
        first, _ = searched(space, cold, folder, seed=0)
        # Every kernel of the space, so that the warm search builds nothing, whatever it proposes.
        builder([source for at in range(len(space.regions)) for source in _sources(space, cold, at)])
        warm = objective(space, folder / "warm", builder)
        second, _ = searched(space, warm, folder, seed=1)
        ratios = []
        for _ in range(repeats):
            times = warm.compare([space.default(), second.best])
            assert times is not None
            ratios.append(round(times[0] / times[1], 4))
        warm.close()
        found = {
            "shape": f"{batch}x{length}",
            "programs": str(space.programs),
            "cold": cost_of(first),
            "warm": cost_of(second),
            "default_over_best": ratios,
            "default_over_best_median": statistics.median(ratios),
            "layer": one_layer(Space.of(layer(None, batch, length), target, threads), builder.cache, folder),
        }
        print(found, flush=True)
        return found


def _sources(space: Space, measured: MeasuredObjective, at: int) -> list[Any]:
    region = space.regions[at]
    alone = [((members, kernel),) for members, kernels in region.kernels.items() for kernel in range(len(kernels))]
    return [source for program in alone for source in measured.sources(at, program)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1x128", "1x512", "8x128", "8x512"], metavar="BATCHxTOKENS")
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes that compare default and best")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    target = cpu_target(recalibrate=True)
    threads = torch.get_num_threads()
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    results = [case(batch, length, target, threads, options.repeats) for batch, length in shapes]
    print(save("search", target, results, options.output))


if __name__ == "__main__":
    main()
