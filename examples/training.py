"""What the examples that train share: the loop with its progress, and curves as a picture and as JSON."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

REPORTS = 20
"""How often a training reports its progress."""


def train(
    name: str,
    model: nn.Module,
    batch: Callable[[], tuple[Tensor, Tensor]],
    evaluate: Callable[[nn.Module], float],
    *,
    steps: int,
    rate: float,
) -> list[dict[str, float]]:
    """Train ``model`` on the cross-entropy of its scores (…, classes) for ``batch`` () → (inputs, classes).

    Returns, for some steps, the mean loss since the last of them and what ``evaluate`` says of the model in evaluation.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    # Up for a fifth of the steps, then down.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.2 * steps), 1.0, (steps - step) / (0.8 * steps))
    )
    start, losses, curve = time.perf_counter(), list[float](), list[dict[str, float]]()
    for step in range(1, steps + 1):
        model.train()
        inputs, classes = batch()
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, -2), classes.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step == steps or step % math.ceil(steps / REPORTS) == 0:
            found = evaluate(model.eval())
            seconds = time.perf_counter() - start
            curve.append({"step": step, "loss": sum(losses) / len(losses), "held_out": found, "seconds": seconds})
            losses.clear()
            print(
                f"{name:12}{step:6} of {steps}  loss {curve[-1]['loss']:.4f}  held out {found:.4f}  {seconds:.0f} s",
                flush=True,
            )
    return curve


def write(
    folder: Path, name: str, what: str, results: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]
) -> None:
    """Write ``name``.json and ``name``.png, the curves of all results with ``what`` was held out on the axis."""
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for attention, result in results.items():
        curve: Sequence[Mapping[str, float]] = result["curve"]
        axes.plot([point["step"] for point in curve], [point["held_out"] for point in curve], label=attention)
    axes.set(xlabel="step", ylabel=what, yscale="log" if what == "perplexity" else "linear")
    axes.legend()
    figure.savefig(folder / f"{name}.png", bbox_inches="tight", dpi=120)
    pyplot.close(figure)
