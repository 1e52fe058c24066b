"""How long binding a program's sizes takes: a 12-layer BERT of the published width, batch and length named.

``python benchmarks/bind.py``. The graph is captured at prime sizes and given names for these; no kernel is built.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / part) for part in ("support", "codegen")]

from test_template import BATCH, PRIMES, SEQUENCE, assembled, with_names  # noqa: E402

from fuser import zoo  # noqa: E402
from fuser.frontend.calls import flatten_call  # noqa: E402
from fuser.frontend.capture import capture  # noqa: E402
from fuser.frontend.graphs import raise_graph  # noqa: E402
from fuser.module.compiler import choose_all  # noqa: E402
from fuser.runtime.device import cpu_target  # noqa: E402

ROUNDS = 300


def main() -> None:
    configuration, target = zoo.configuration("bert-base"), cpu_target()
    model, sizes = configuration.build(batch=PRIMES["batch"], seq=PRIMES["sequence"], vocabulary=1000)
    graph = raise_graph(capture(model, flatten_call((), configuration.example(sizes, True))))
    late = with_names(graph, {PRIMES["batch"]: BATCH, PRIMES["sequence"]: SEQUENCE})
    template = assembled(late, choose_all(graph, target)[0], target).template
    start = time.perf_counter()
    template.bind({"batch": 2, "sequence": 128})
    print(f"the first binding, which compiles the formulas: {1e3 * (time.perf_counter() - start):.1f} ms")
    steps = len(template.plan.steps)
    for batch, sequence in ((2, 128), (8, 500)):
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            template.bind({"batch": batch, "sequence": sequence})
            times.append(time.perf_counter() - start)
        median, best = statistics.median(times), min(times)
        print(
            f"{batch} × {sequence}: {steps} steps in {1e3 * median:.3f} ms (median), {1e3 * best:.3f} ms (least); "
            f"{1e5 * median / steps:.3f} ms a hundred steps"
        )


if __name__ == "__main__":
    main()
