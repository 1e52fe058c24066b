"""The process that runs kernels: what is wrong or fatal ends one candidate, on CUDA targets too."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fuser.codegen.assemble import assemble
from fuser.codegen.choice import GroupChoice
from fuser.codegen.render import header_folder
from fuser.ir.errors import FuserError
from fuser.ir.evaluation import evaluate
from fuser.ir.target import TF32, Target, cuda_target, emulated_target
from fuser.module.options import Options
from fuser.runtime.build import build
from fuser.runtime.cache import default_cache
from fuser.search.space import Space
from fuser.search.standalone import standalone, subgraph
from fuser.search.worker import TOLERANCES, Unit, Worker, tolerance
from fuser.searching import graph_of

EMULATED = emulated_target()


def kernels(target: Target) -> tuple[GroupChoice, GroupChoice]:
    """Two kernels for one linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 72), nn.GELU()).eval().half()
    space = Space.of(graph_of(model, (torch.randn(9, 40).half(),), options=Options(target=target)), target, 4)
    (region,) = space.regions
    whole = region.kernels[max(region.kernels, key=int.bit_count)]
    return whole[0], whole[1]


def unit(choice: GroupChoice, key: str, library: Path | None = None) -> Unit:
    """The kernel alone, with ``library`` in its place."""
    sources = assemble(subgraph([choice]), [choice], EMULATED, 4).sources
    paths = dict(build(list(sources), EMULATED, headers=header_folder(EMULATED), cache=default_cache()))
    if library is not None:
        (symbol,) = (s for s in paths if s.startswith("fuser_gemm"))
        paths[symbol] = library
    return Unit(key, "region", (choice,), paths, 1)


def spoilt(choice: GroupChoice, body: str, folder: Path) -> Path:
    symbol = choice.call(EMULATED, 4).spec.symbol  # type: ignore[union-attr]
    compiler = shutil.which("g++") or shutil.which("c++")
    text = f'extern "C" int {symbol}(const void*, void*) {{ {body} }}'
    command = [str(compiler), "-x", "c++", "-", "-shared", "-fPIC", "-O0", "-o", str(folder / "spoilt.so")]
    subprocess.run(command, input=text.encode(), check=True)
    return folder / "spoilt.so"


def test_a_wrong_cuda_kernel_is_rejected(tmp_path: Path) -> None:
    good, other = kernels(EMULATED)
    worker = Worker(EMULATED, 1, timeout=170.0)
    try:
        bad = unit(good, "bad", spoilt(good, "return 0;", tmp_path))
        wrong, right = worker.time([bad, unit(other, "good")], 0.01)
        assert wrong.seconds is None and "wrong numbers" in wrong.failure, wrong
        assert right.seconds is not None and right.runs >= 3, right
        assert worker.starts == 1
    finally:
        worker.close()


def test_a_lost_gpu_is_like_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An error of a kernel stands for one that every later call of CUDA in the process would repeat.
    (tmp_path / "sitecustomize.py").write_text(
        "from fuser.search import worker\nworker._Bench.is_lost = lambda self: True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    good, other = kernels(EMULATED)
    worker = Worker(EMULATED, 1, timeout=170.0)
    try:
        bad = unit(good, "bad", spoilt(good, "return 7;", tmp_path))
        fine, lost = worker.time([unit(other, "good"), bad], 0.01)
        assert lost.seconds is None, lost
        assert lost.failure.startswith("made the GPU unusable for its process: KernelError") and "7" in lost.failure
        assert fine.seconds is not None, fine
        assert worker.starts == 2
    finally:
        worker.close()


def test_the_reference_is_computed_on_the_device() -> None:
    # The meta device is, as a GPU is, one that PyTorch mixes with no other.
    model = nn.Sequential(nn.Linear(40, 72), nn.GELU(), nn.Linear(72, 24), nn.LayerNorm(24)).eval()
    (region,) = graph_of(model, (torch.randn(9, 40),)).regions
    graph, device = standalone(region).graph, torch.device("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        values = {
            name: torch.empty(graph.values[name].shape, device=device) for name in (*graph.inputs, *graph.constants)
        }
        found = evaluate(graph, values, torch.float64)
        assert {(result.device, result.dtype) for result in found.values()} == {(device, torch.float64)}


def test_a_machine_without_the_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(FuserError, match=r"CUDA|driver|GPU"):
        Worker(cuda_target("sm_80"), 108)


def test_tf32_is_allowed_its_error() -> None:
    exact = {torch.float32, torch.int64}
    assert tolerance(exact, cuda_target("sm_80")) == TOLERANCES[torch.float32]
    assert tolerance(exact, cuda_target("sm_80", features=frozenset({TF32}))) == TOLERANCES[torch.float16]
    assert tolerance({torch.int64}, cuda_target("sm_80")) == 0.0
