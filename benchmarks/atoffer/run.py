"""AToffer's experiments with our objective: convergence and cost of searches over one layer of BERT-base.

Every strategy minimizes the same number, the measured time of one encoder layer (its attention half and its
feed-forward half), from one table: a program that one strategy has measured costs another the same seconds and has the
same time.

    python benchmarks/atoffer/run.py --lengths 128 512 --masks strided fixed --rounds 5
    python benchmarks/atoffer/run.py --lengths 512 --masks fixed --append     keep other settings of the stored results

Strategies: ``fuser`` (shortest path over measured kernels, then group rewards), ``fuser-reward`` (group rewards
alone), ``atoffer`` (the published loop, see loops.py), ``random`` and ``annealing`` (its baselines over 16-bit
schemes). Schemes of 16 bits are decoded by ``fuser.schemes.from_atoffer`` and repaired where no kernel runs a segment;
kernels have their family's default parameters. An evaluation is one program, or one kernel, whose time the strategy
asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

sys.path.append(str(Path(__file__).parent.parent))

import loops
from bert_layer import Builder, layer, objective
from harness import RESULTS, machine

from fuser.ir.masks import Fixed, Mask, Strided
from fuser.ir.target import Target
from fuser.runtime.cache import default_cache
from fuser.runtime.device import cpu_target
from fuser.schemes import from_atoffer
from fuser.search.objective import AdditiveObjective, KernelTime, Objective, Outcome
from fuser.search.space import Groups, Point, Space
from fuser.search.study import search
from fuser.search.worker import Worker

Answer = TypeVar("Answer")
MASKS: dict[str, Callable[[], Mask]] = {"strided": Strided, "fixed": Fixed}
SHOWN = (1, 8, 32, 128)
"""Evaluations at which the published tables give the best time so far."""
LABELS = {
    "fuser": "shortest path + reward (ours)",
    "fuser-reward": "reward alone (ours)",
    "atoffer": "AToffer's loop, as published",
    "random": "random 16-bit schemes",
    "annealing": "simulated annealing, 16-bit schemes",
}
_COLOURS = ("#2563eb", "#0891b2", "#ea580c", "#64748b", "#9333ea")


@dataclass(frozen=True)
class Evaluation:
    """One answer of the objective: of a program (``seconds`` is its time, None when it failed) or of a kernel.

    ``parts`` are what had to be measured for it, a region's program or a kernel, with the seconds that this took when
    it was measured first.
    """

    name: str
    seconds: float | None
    parts: tuple[tuple[str, float], ...]
    is_program: bool


class Table:
    """An objective that measures every region's program and every kernel once, and answers all strategies from that.

    ``fresh`` makes an objective that has told nobody anything, so that no strategy learns from another's questions.
    ``building`` tells the seconds that compilers have taken so far, which are in no cost.
    """

    def __init__(
        self, space: Space, fresh: Callable[[], Objective], building: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.space = space
        self.fresh = fresh
        self.inner = fresh()
        self.building = building
        self.default = space.default()
        self.outcomes: dict[str, Outcome] = {}
        self.paid: dict[str, float] = {}
        """Seconds of measuring by part."""
        self.log: list[Evaluation] = []
        self.busy = 0.0
        """Seconds inside the objective since :meth:`start`."""
        parts = self._parts(self.default)
        _, seconds = self._timed(lambda: self.inner(self.default))
        self.paid.update((part, seconds / len(parts)) for part in parts)

    def start(self) -> None:
        """Forget what was asked."""
        self.inner = self.fresh()
        self.log = []
        self.busy = 0.0

    def expect(self, points: Iterable[Point]) -> None:
        """Kernels are built when they are asked for: building is not a part of the comparison."""

    def __call__(self, point: Point) -> Outcome:
        key = str(point)
        parts = self._parts(point)
        if key not in self.outcomes:
            for at, (part, program) in enumerate(parts.items()):
                if part not in self.paid:
                    # The default's other regions are known, so this is the time of one region alone.
                    alone = self.default.replace(at, program)
                    _, self.paid[part] = self._timed(lambda alone=alone: self.inner(alone))  # type: ignore[misc]
            self.outcomes[key], _ = self._timed(lambda: self.inner(point))
        outcome = self.outcomes[key]
        self.log.append(Evaluation(key, outcome.seconds, tuple((p, self.paid[p]) for p in parts), True))
        return outcome

    def kernel(self, region: int, members: int, kernel: int) -> KernelTime:
        key = (region, members, kernel)
        name = f"kernel {key}"
        found, seconds = self._timed(lambda: self.inner.kernel(*key))
        self.paid.setdefault(name, seconds)
        self.log.append(Evaluation(name, None, ((name, self.paid[name]),), False))
        return found

    def _parts(self, point: Point) -> dict[str, Groups]:
        return {f"{at}: {groups}": groups for at, groups in enumerate(point.regions)}

    def _timed(self, ask: Callable[[], Answer]) -> tuple[Answer, float]:
        """The answer and the seconds that it took, without those of compilers."""
        begin, built = time.perf_counter(), self.building()
        answer = ask()
        spent = time.perf_counter() - begin
        self.busy += spent
        return answer, spent - (self.building() - built)

    def costs(self, region: int, members: int, kernel: int) -> float:
        return self.inner.costs(region, members, kernel)

    def compare(self, points: list[Point]) -> list[float] | None:
        return None

    def close(self) -> None:
        """Other strategies go on with this table."""

    def milliseconds(self, value: int) -> float:
        """The time of a 16-bit scheme; infinite for a program that failed."""
        seconds = self(program(self.space, value)).seconds
        return float("inf") if seconds is None else 1e3 * seconds


def program(space: Space, value: int) -> Point:
    """The program that a 16-bit scheme denotes, repaired where no kernel runs a segment."""
    regions = []
    for region in space.regions:
        sets = region.members_of(from_atoffer(value, region.region)[2])
        regions.append(tuple((members, region.allowed[members][0]) for members in sets))
    return Point(tuple(regions))


@dataclass(frozen=True)
class Round:
    """One run of one strategy. ``curve`` is (seconds of measuring so far, best milliseconds so far) after every
    evaluation; ``searcher`` the seconds that the strategy itself took; ``best`` the fastest program."""

    curve: tuple[tuple[float, float], ...]
    programs: int
    kernels: int
    measuring: float
    searcher: float
    best: str = ""


def run_round(strategy: str, table: Table, target: Target, threads: int, seed: int, evaluations: int) -> Round:
    """One strategy from one seed."""
    table.start()
    begin = time.perf_counter()
    if strategy == "atoffer":
        loops.reward_loop(table.milliseconds, seed, evaluations)
    elif strategy == "random":
        loops.random_loop(table.milliseconds, seed, evaluations)
    elif strategy == "annealing":
        loops.annealing_loop(table.milliseconds, seed, evaluations)
    else:
        name = {"fuser": "default", "fuser-reward": "reward"}[strategy]
        with tempfile.TemporaryDirectory() as folder:
            search(
                [space.region for space in table.space.regions],
                target,
                threads,
                trials=evaluations,
                strategy=name,
                seed=seed,
                storage=str(Path(folder) / "studies.journal"),
                plateau=evaluations,
                objective=table,
                space=table.space,
            )
    spent = time.perf_counter() - begin
    return summarized(table.log[:evaluations], spent - table.busy)


def summarized(log: Sequence[Evaluation], searcher: float) -> Round:
    """A round from what its strategy asked: what was measured before costs nothing, but counts as an evaluation."""
    curve = []
    paid: dict[str, float] = {}
    best, winner = math.inf, ""
    for found in log:
        paid.update(found.parts)
        if found.seconds is not None and 1e3 * found.seconds < best:
            best, winner = 1e3 * found.seconds, found.name
        curve.append((math.fsum(paid.values()), best))
    programs = {found.name for found in log if found.is_program}
    kernels = {found.name for found in log if not found.is_program}
    return Round(tuple(curve), len(programs), len(kernels), math.fsum(paid.values()), searcher, winner)


def record(rounds: Sequence[Round]) -> dict[str, Any]:
    """What is stored of a strategy's rounds: means over rounds, and the best time of each."""

    def mean(values: Iterable[float]) -> float:
        return statistics.fmean(values)

    longest = max(len(r.curve) for r in rounds)
    shown = sorted({n for n in SHOWN if n < longest} | {longest})
    return {
        "rounds": len(rounds),
        "best_ms_after": {str(n): round(mean(at(r, n)[1] for r in rounds), 4) for n in shown},
        "best_ms": [round(r.curve[-1][1], 4) for r in rounds],
        "programs_measured": round(mean(r.programs for r in rounds), 1),
        "kernels_measured": round(mean(r.kernels for r in rounds), 1),
        "measuring_seconds": round(mean(r.measuring for r in rounds), 3),
        "searcher_seconds": round(mean(r.searcher for r in rounds), 4),
        "searcher_share": round(mean(r.searcher / max(r.searcher + r.measuring, 1e-9) for r in rounds), 5),
    }


def at(found: Round, evaluation: int) -> tuple[float, float]:
    """(seconds, best) after that many evaluations, or after the last one of a round that ended before."""
    return found.curve[min(evaluation, len(found.curve)) - 1]


def reaching(rounds: Sequence[Round], goal: float) -> float | None:
    """Median number of evaluations until the best time is at most ``goal`` milliseconds; None when most rounds never
    are."""
    numbers = [next((n for n, (_, best) in enumerate(r.curve, 1) if best <= goal), None) for r in rounds]
    done = sorted(n for n in numbers if n is not None)
    return float(statistics.median_low(done)) if 2 * len(done) > len(numbers) else None


def setting(mask: str, length: int, options: argparse.Namespace, target: Target) -> tuple[dict[str, Any], Any]:
    """All strategies on one mask and length: the record, and the rounds for the plots."""
    threads = torch.get_num_threads()
    space = Space.of(layer(MASKS[mask](), options.batch, length), target, threads)
    rounds: dict[str, list[Round]] = {}
    with tabled(space, options.objective) as table:
        for strategy in options.strategies:
            rounds[strategy] = [
                run_round(strategy, table, target, threads, seed, options.evaluations) for seed in range(options.rounds)
            ]
            print(f"{mask} {length} {strategy}: {record(rounds[strategy])}", flush=True)
        default = table(table.default).seconds
        again = compared(table, [found.best for found in itertools.chain(*rounds.values())])
    times = [1e3 * outcome.seconds for outcome in table.outcomes.values() if outcome.seconds is not None]
    strategies = {}
    for strategy, found in rounds.items():
        strategies[strategy] = record(found)
        strategies[strategy]["evaluations_to_within_2_percent"] = reaching(found, 1.02 * min(times))
        strategies[strategy]["best_ms_again"] = [again.get(r.best) for r in found]
    return {
        "mask": mask,
        "length": length,
        "batch": options.batch,
        "objective": options.objective,
        "programs": str(space.programs),
        "schemes": str(space.schemes),
        "best_ms_of_all": round(min(times), 4),
        "default_ms": None if default is None else round(1e3 * default, 4),
        "default_ms_again": again.get(str(table.default)),
        "strategies": strategies,
    }, rounds


def compared(table: Table, programs: Iterable[str]) -> dict[str, float]:
    """Milliseconds of the default and of other programs, all timed in turns once more in a new process: of many noisy
    times the least is too good."""
    points = list(dict.fromkeys([table.default, *map(Point.parse, programs)]))
    seconds = table.inner.compare(points)
    return {} if seconds is None else {str(p): round(1e3 * s, 4) for p, s in zip(points, seconds, strict=True)}


@contextlib.contextmanager
def tabled(space: Space, kind: str) -> Iterator[Table]:
    """A table of times measured in a child process, or for a quick look of the cost model's.

    Kernels come from the user's cache, but no time that an earlier run measured is used, so that costs are whole.
    """
    if kind == "predicted":
        yield Table(space, lambda: AdditiveObjective(space))
        return
    builder = Builder(space, default_cache())
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        worker: list[Worker] = []

        def fresh() -> Objective:
            made = objective(space, Path(folder), builder)
            stack.callback(made.close)
            # One process measures for all, so that none pays for its start.
            worker.append(made.worker)
            made.worker = worker[0]
            return made

        yield Table(space, fresh, lambda: builder.seconds)


_FRESH = """
import torch
layer = torch.nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True).eval()
x = torch.zeros({batch}, {length}, 768)
with torch.no_grad():
    for _ in range(4 * 12):
        layer(x)
"""


def fresh_process_seconds(batch: int, length: int) -> float:
    """What AToffer's way of measuring costs at least here: a new process that runs twelve layers, eagerly, twice to
    warm up and twice for the clock. Median of three."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", _FRESH.format(batch=batch, length=length)], check=True)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def plot(name: str, rounds: dict[str, list[Round]], folder: Path) -> None:
    """Best time so far against evaluations and against seconds of measuring; thin lines are single rounds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for (strategy, found), colour in zip(rounds.items(), _COLOURS, strict=False):
        for r in found:
            left.step(
                range(1, len(r.curve) + 1), [best for _, best in r.curve], where="post", c=colour, lw=0.6, alpha=0.4
            )
            right.step(
                [s for s, _ in r.curve], [best for _, best in r.curve], where="post", c=colour, lw=0.6, alpha=0.4
            )
        numbers = range(1, max(len(r.curve) for r in found) + 1)
        means = [tuple(map(statistics.fmean, zip(*(at(r, n) for r in found), strict=True))) for n in numbers]
        left.step(numbers, [m[1] for m in means], where="post", color=colour, lw=2, label=LABELS[strategy])
        right.step([m[0] for m in means], [m[1] for m in means], where="post", color=colour, lw=2)
    left.set(xlabel="evaluations", ylabel="best time of one layer so far, ms", xscale="log")
    right.set(xlabel="seconds of measuring", xscale="log")
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(name)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"atoffer_{name.replace(' ', '_')}.{suffix}", dpi=120)


def merged(old: dict[str, Any] | None, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """New results in place of old ones of the same setting."""

    def key(result: dict[str, Any]) -> tuple[str, int, int]:
        return result["mask"], result["batch"], result["length"]

    known = {key(result): result for result in (old or {}).get("results", [])}
    known.update((key(result), result) for result in results)
    return [known[k] for k in sorted(known)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 128, 256, 384, 512])
    parser.add_argument("--masks", nargs="+", choices=list(MASKS), default=list(MASKS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=loops.ROUNDS)
    parser.add_argument("--evaluations", type=int, default=loops.ITERATIONS)
    parser.add_argument("--strategies", nargs="+", choices=list(LABELS), default=list(LABELS))
    parser.add_argument("--objective", choices=["measured", "predicted"], default="measured")
    parser.add_argument(
        "--cache", type=Path, default=Path("build/atoffer-cache"), help="kernel cache of the experiment"
    )
    parser.add_argument("--append", action="store_true", help="keep the stored results of other settings")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plots")
    parser.add_argument("--output", type=Path, default=RESULTS / "atoffer.json")
    options = parser.parse_args()
    target = cpu_target(recalibrate=options.objective == "measured")
    options.out.mkdir(parents=True, exist_ok=True)
    old = json.loads(options.output.read_text()) if options.append and options.output.exists() else None
    results = []
    for mask, length in itertools.product(options.masks, options.lengths):
        found, rounds = setting(mask, length, options, target)
        found["fresh_process_seconds"] = round(fresh_process_seconds(options.batch, length), 2)
        # Settings are measured one by one, perhaps from different commits: each says when and where.
        found["machine"] = machine(target)
        results.append(found)
        plot(f"{mask} {length}", rounds, options.out)
    report = {"benchmark": "atoffer", "machine": machine(target), "results": merged(old, results)}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(options.output)


if __name__ == "__main__":
    main()
