"""The examples that train: a few steps of each, with every attention's module in one of them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "attention", "flags", "score"),
    [
        ("train_lm", "causal_eva", ["--steps", "10", "--length", "64"], "perplexity"),
        ("train_vit", "eva", ["--steps", "60"], "accuracy"),
    ],
)
def test_a_model_learns_and_stays_itself_when_it_is_optimized(
    name: str, attention: str, flags: list[str], score: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    if name == "train_vit":
        pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module(name)
    monkeypatch.setattr(example, "SIZES", {**example.SIZES, "depth" if name == "train_vit" else "layers": 1})
    if name == "train_vit":
        monkeypatch.setattr(example, "HELD_OUT", 40)
    example.main(["--attention", attention, *flags, "--out", str(tmp_path)])
    found = json.loads((tmp_path / f"{name}.json").read_text())["results"][attention]
    assert found["optimized"] == pytest.approx(found[score], rel=1e-4)
    losses = [point["loss"] for point in found["curve"]]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert (tmp_path / f"{name}.png").stat().st_size > 0
    sys.modules.pop(name)
