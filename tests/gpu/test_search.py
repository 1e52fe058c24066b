"""Searching on a GPU: kernels are measured there, what is found is compiled, and a fatal kernel ends only its trial."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from caches import with_own_records
from torch import nn

import fuser
from fuser.codegen.assemble import assemble
from fuser.codegen.render import header_folder
from fuser.module.options import Options
from fuser.runtime.build import Source, build
from fuser.runtime.cache import KernelCache
from fuser.runtime.targets import target_of
from fuser.search import records
from fuser.search.space import Space
from fuser.search.standalone import subgraph
from fuser.search.worker import Unit, Worker
from fuser.searching import graph_of, search_model

FATAL = """
__global__ void fatal(volatile int* nowhere) {{ *nowhere = 1; }}
extern "C" __attribute__((visibility("default"))) int {symbol}(const void*, void* stream) {{
    fatal<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(nullptr);
    return 0;
}}
"""


def mlp(device: torch.device) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512), nn.LayerNorm(512))
    return model.eval().half().to(device), torch.randn(256, 512, device=device).half()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelCache:
    return with_own_records(tmp_path, monkeypatch)


def test_what_a_search_finds_is_what_is_compiled(device: torch.device, cache: KernelCache, tmp_path: Path) -> None:
    model, x = mlp(device)
    found = search_model(model, (x,), trials=6, storage=str(tmp_path / "s.journal"))
    assert not found.failures and found.measured >= 2
    assert 1e-6 < found.seconds <= 1.5 * found.default_seconds < 1e-3
    (record,) = cache.records(records.RECORD)
    assert record["target"] == target_of(device).key
    fast = fuser.optimize(model, (x,))
    (choice,) = fast.programs[0].choices.values()
    (best,) = found.choices.values()
    assert choice.scheme == best.scheme
    assert [g.parameters for g in choice.groups] == [g.parameters for g in best.groups]
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        assert float((fast(x).double() - exact).norm() / exact.norm()) < 2e-3


def test_a_fatal_kernel_ends_its_trial_alone(device: torch.device) -> None:
    model, x = mlp(device)
    target = target_of(device)
    (region,) = Space.of(graph_of(model, (x,), options=Options(target=target)), target, target.cores).regions
    (first, second, *_) = max(region.kernels.items(), key=lambda item: item[0].bit_count())[1]
    units = []
    for key, choice in (("fatal", first), ("good", second)):
        sources = assemble(subgraph([choice]), [choice], target, target.cores).sources
        paths = dict(build(list(sources), target, headers=header_folder(target)))
        if key == "fatal":
            symbol = choice.call(target, target.cores).spec.symbol
            spoilt = Source(symbol, FATAL.format(symbol=symbol), ".cu")
            paths |= build([spoilt], target, headers=header_folder(target))
        units.append(Unit(key, "region", (choice,), paths, 1))
    worker = Worker(target, target.cores)
    try:
        fatal, good = worker.time(units, 0.05)
        assert fatal.seconds is None and "illegal memory access" in fatal.failure
        assert good.seconds is not None and 1e-6 < good.seconds < 1e-3
        assert worker.starts == 2
    finally:
        worker.close()
    # This process has its own context.
    assert float(x.abs().max()) > 0
