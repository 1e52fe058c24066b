"""``fuser.flat`` against float64 in every granularity, and its memory against what it says that it takes."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import attention_reference
import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import profile
from typer.testing import CliRunner

import fuser
import fuser.cli
from fuser import flat, masks
from fuser.cli import bench
from fuser.ir.errors import MaskError, PlanError

TILES: list[tuple[str, tuple[int, int, int] | None]] = [
    ("all", None),
    ("batch", None),
    ("batch", (2, 4, 70)),
    ("head", None),
    ("head", (2, 3, 70)),
    ("row", None),
    ("row", (1, 1, 1)),
    ("row", (2, 3, 7)),
    ("flash", None),
]
EMPTY_ROWS = masks.SlidingWindow(9, 9) & masks.from_dense((torch.arange(70) % 5 > 0)[:, None].expand(70, 90))
_G = torch.Generator().manual_seed(1)
MASKS: dict[str, Any] = {
    "none": None,
    "causal": masks.Causal(),
    "empty rows": EMPTY_ROWS,
    "per head": masks.per_head([masks.Causal(), masks.Strided(7), masks.SlidingWindow(2, 2), masks.Dense()]),
    "padding": (torch.arange(90) < 60)[None, None, None, :].expand(2, 1, 1, 90),
    "bias": torch.randn(1, 4, 70, 90, generator=_G),
}


def inputs(kv_heads: int = 4, seed: int = 0, **to: Any) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(*shape, generator=g) for shape in ((2, 4, 70, 32), (2, kv_heads, 90, 32), (2, kv_heads, 90, 24))
    )
    return q.to(**to), k.to(**to), v.to(**to)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    if isinstance(mask, masks.Mask):
        mask = mask.dense(70, 90)
    biased = mask is not None and mask.is_floating_point()
    return attention_reference.exact(q, k, v, *((None, mask) if biased else (mask, None)))


def test_a_bias_that_is_trained_is_a_bias() -> None:
    q, k, v = inputs()
    bias = MASKS["bias"].clone().requires_grad_()
    out = flat.attention(q, k, v, granularity="row", tile=(1, 1, 7), mask=bias)
    assert isinstance(out, Tensor) and not out.requires_grad
    torch.testing.assert_close(out.double(), exact(q, k, v, bias.detach())[0], rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("granularity", "tile"), TILES)
def test_exact(granularity: str, tile: tuple[int, int, int] | None, name: str) -> None:
    for kv_heads in (4, 2):
        q, k, v = inputs(kv_heads)
        want, sums = exact(q, k, v, MASKS[name])
        out, lse = flat.attention(q, k, v, granularity=granularity, tile=tile, mask=MASKS[name], return_lse=True)
        alone = flat.attention(q, k, v, granularity=granularity, tile=tile, mask=MASKS[name])
        assert isinstance(alone, Tensor) and out.shape == want.shape and lse.shape == sums.shape
        # Single precision; outputs and sums have the size of some units.
        for found, right in ((out, want), (alone, want), (lse, sums)):
            torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=3e-6)
        if name == "empty rows":
            assert not alone[:, :, ::5].any() and bool(torch.isneginf(lse[:, :, ::5]).all())


@pytest.mark.parametrize("granularity", ["all", "batch", "head", "row"])
@pytest.mark.parametrize("where", [1, 2])
@pytest.mark.parametrize("given", ["mask", "heads", "tensor", "bias"])
def test_poison_reaches_only_rows_that_may_see_it(given: str, where: int, granularity: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        operands = inputs(2, dtype=dtype)
        pattern = masks.Strided(7)
        allowed = pattern.dense(70, 90)
        bias = torch.where(allowed, 0.0, -math.inf)
        mask = {"mask": pattern, "heads": masks.per_head([pattern] * 4), "tensor": allowed, "bias": bias}[given]
        operands[where][:, :, 21] = 0.0
        clean = flat.attention(*operands, granularity=granularity, mask=mask)
        operands[where][:, :, 21] = math.nan
        out = flat.attention(*operands, granularity=granularity, mask=mask)
        assert isinstance(out, Tensor) and isinstance(clean, Tensor)
        sees = allowed[:, 21]
        torch.testing.assert_close(out[:, :, ~sees], clean[:, :, ~sees])
        assert out[:, :, sees].isnan().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2), (torch.half, 2e-3)])
@pytest.mark.parametrize("granularity", ["batch", "head", "row"])
def test_dtypes(dtype: torch.dtype, tolerance: float, granularity: str) -> None:
    q, k, v = inputs(2, dtype=dtype)
    out = flat.attention(q, k, v, granularity=granularity, mask=masks.Causal(), scale=32**-0.5)
    assert isinstance(out, Tensor) and out.dtype == dtype
    # What rounding the output alone to the dtype costs: half a unit in the last place of values up to 4.
    torch.testing.assert_close(out.double(), exact(q, k, v, masks.Causal())[0], rtol=0, atol=tolerance)


def test_layout_of_tokens_outside_heads() -> None:
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs())
    for granularity in ("batch", "head", "row"):
        out = flat.attention(q, k, v, granularity=granularity)
        assert isinstance(out, Tensor) and out.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(out.double(), exact(q, k, v, None)[0], rtol=1e-6, atol=3e-6)


def allocated(run: Any) -> int:
    """Peak bytes of tensors that a call allocates, those that PyTorch makes by itself included."""
    run()
    with profile(profile_memory=True) as found:
        kept = run()
    now = peak = 0
    for event in sorted(found.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert now == kept.numel() * kept.element_size()
    return peak - now


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("granularity", "tile"), [*TILES[:6], ("row", (1, 1, 35)), ("row", (2, 3, 35))])
def test_memory_is_what_the_formula_says(
    granularity: str, tile: tuple[int, int, int] | None, dtype: torch.dtype
) -> None:
    q, k, v = inputs(2, dtype=dtype)
    how: Any = {"granularity": granularity, "tile": tile}
    assert allocated(lambda: flat.attention(q, k, v, **how)) == flat.buffer_bytes(q, k, v, **how)


def test_memory_with_a_mask() -> None:
    q, k, v = inputs()
    tile = (1, 1, 35)
    padding = torch.ones(2, 1, 1, 90, dtype=torch.bool)
    used = allocated(lambda: flat.attention(q, k, v, tile=tile, mask=padding))
    # One row of the mask, and the largest logit of each row and whether it is finite; the logits come from one buffer.
    assert 0 <= used - flat.buffer_bytes(q, k, v, tile=tile) <= 90 + 3 * 35 * 8


def test_live_bytes() -> None:
    q, k, v = (torch.empty(2, 4, 128, 64, dtype=torch.bfloat16) for _ in range(3))
    assert flat.live_bytes(q, k, v, granularity="head", double_buffered=True) == 2 * (8 * 128 * 64 + 128 * 128)
    assert flat.live_bytes(q, k, v, tile=(1, 1, 8)) == 2 * (2 * 8 * 64 + 2 * 128 * 64 + 8 * 128)
    found = flat.choose_tile(q, k, v, 2 * (4 * 128 * 64 + 128 * 128))
    assert found.granularity is flat.Granularity.HEAD and found.tile == flat.Tile(1, 1, 128)
    with pytest.raises(PlanError, match="smallest that works is 33280 bytes"):
        flat.choose_tile(q, k, v, 1000)


RESIDENT = """
import sys, torch, fuser
from pathlib import Path
torch.set_num_threads(1)
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
q, k, v = (torch.randn(1, 4, 2048, 64) for _ in range(3))
fuser.flat.attention(*(t[:, :, :64] for t in (q, k, v)), granularity="row", tile=(1, 1, 8))
before = peak()
fuser.flat.attention(q, k, v, granularity=sys.argv[1], tile=(1, 1, 64) if sys.argv[1] == "row" else None)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_resident_memory() -> None:
    found = {}
    for granularity in ("batch", "row"):
        run = [sys.executable, "-c", RESIDENT, granularity]
        found[granularity] = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout) / 2**20
    # MiB: the logits of four heads 64, of 64 rows 0.5; the output 2, and scratch memory of the products.
    assert 60 < found["batch"] < 90 and found["row"] < 14


def test_bad_input() -> None:
    q, k, v = inputs()
    with pytest.raises(PlanError, match="no granularity"):
        flat.attention(q, k, v, granularity="column")
    with pytest.raises(PlanError, match="a tile of batch granularity has all 4 heads, got 2"):
        flat.attention(q, k, v, granularity="batch", tile=(1, 2, 70))
    with pytest.raises(PlanError, match="three extents"):
        flat.attention(q, k, v, tile=(1, 2))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="leave the tile out"):
        flat.attention(q, k, v, granularity="flash", tile=(1, 1, 1))
    with pytest.raises(MaskError, match="has 3 heads and q 4"):
        flat.attention(q, k, v, mask=masks.per_head([masks.Causal()] * 3))
    with pytest.raises(MaskError, match="does not broadcast"):
        flat.attention(q, k, v, mask=torch.ones(71, 90, dtype=torch.bool))
    with pytest.raises(MaskError, match="got str"):
        flat.attention(q, k, v, mask="causal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple"):
        flat.attention(q[:, :3], k[:, :2], v[:, :2])


def test_no_keys() -> None:
    q, k, v = inputs()
    out, lse = flat.attention(q, k[:, :, :0], v[:, :, :0], return_lse=True)
    assert not out.any() and bool(torch.isneginf(lse).all()) and fuser.flat is flat


def test_bench_writes_table_and_plot(tmp_path: Path) -> None:
    arguments = ["bench", "flat", "--from", "32", "--to", "64", "--heads", "2", "--head-dim", "16", "--rounds", "1"]
    result = CliRunner().invoke(fuser.cli.app, [*arguments, "--rows", "8", "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "flat.json").read_text())
    assert report["benchmark"] == "flat" and report["machine"]["threads"] == torch.get_num_threads()
    found = {(r["granularity"], r["length"]): r for r in report["results"]}
    assert set(found) == {(name, n) for name in ("batch", "head", "row", "flash") for n in (32, 64)}
    assert all(r["median_ms"] > 0 for r in found.values())
    for name, logits in (("batch", 2 * 64 * 64), ("head", 64 * 64), ("row", 8 * 64)):
        assert found[name, 64]["predicted_bytes"] == found[name, 64]["extra_bytes"] == 4 * logits
    assert found["row", 64]["tile"] == [1, 1, 8]
    with (tmp_path / "flat.csv").open() as file:
        assert [row["granularity"] for row in csv.DictReader(file)] == ["batch", "head", "row", "flash"] * 2
    assert (tmp_path / "flat.png").read_bytes().startswith(b"\x89PNG")


def test_bench_skips_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_available_bytes", lambda: 40_000)
    arguments = ["bench", "flat", "--from", "64", "--to", "64", "--heads", "2", "--head-dim", "16", "--rounds", "1"]
    result = CliRunner().invoke(fuser.cli.app, [*arguments, "--rows", "8", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "skipped batch at 64: needs 0.0 GB" in result.output and "skipped row" not in result.output
    result = CliRunner().invoke(fuser.cli.app, [*arguments, "--batch", "1000", "--out", str(tmp_path)])
    assert result.exit_code == 0 and "skipped flash at 64: its inputs need 0.0 GB" in result.output
    result = CliRunner().invoke(fuser.cli.app, [*arguments, "--max-seconds", "0", "--out", str(tmp_path)])
    assert "above --max-seconds 0" in result.output
    assert all("median_ms" not in r for r in json.loads((tmp_path / "flat.json").read_text())["results"])
