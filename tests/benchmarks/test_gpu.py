"""What the GPU benchmarks can show without a GPU: they run on the emulator, and the table of kernels is right."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fuser.ir.errors import ToolchainError
from fuser.ir.target import cuda_target
from fuser.kernels.base import Cost
from fuser.runtime.nvcc import find_nvcc

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_kernels", BENCHMARKS / "gpu_kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_kernels"] = module
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=os.environ.copy())


def test_names_of_both_compilers_are_the_same_kernel(kernels: ModuleType) -> None:
    nvcc = "_ZN41_GLOBAL__N__5d3c34c0_9_kernel_cu_95c56a2911rows_kernelENS_8OperandsEll"
    gcc = "_ZN12_GLOBAL__N_111rows_kernelENS_8OperandsEll"
    assert kernels._unnamed(nvcc) == kernels._unnamed(gcc) == "_ZN*11rows_kernelENS_8OperandsEll"
    assert kernels._unnamed("_Z4gemmPf") == "_Z4gemmPf"
    assert kernels.plain_name(gcc) == "rows_kernel"
    assert kernels.plain_name("_Z4gemmPf") == "gemm"


def test_floor_is_the_slower_of_arithmetic_and_traffic(kernels: ModuleType) -> None:
    target = cuda_target("sm_90a")
    peak = target.tensor_flops * target.cores
    assert kernels.floor(Cost(peak, 1.0), target, 2) == pytest.approx(1.0)
    assert kernels.floor(Cost(1.0, 3 * target.bandwidth), target, 2) == pytest.approx(3.0)
    assert kernels.floor(Cost(target.peak_flops * target.cores, 1.0), target, 4) == pytest.approx(1.0)


def test_every_kernel_of_a_model_has_a_row(kernels: ModuleType) -> None:
    try:
        find_nvcc(cuda_target("sm_90a"))
    except ToolchainError as error:
        pytest.skip(str(error).splitlines()[0])
    case = "bert-tiny:2x37:float16"
    rows = kernels.rows_of(case, "sm_90a")
    assembly = kernels.compiled(case, cuda_target("sm_90a"))
    families = {record.family for record in assembly.kernels if record.name in {s.symbol for s in assembly.sources}}
    assert {row.family for row in rows} == families >= {"attention", "rowwise"}
    for row in rows:
        assert row.occupancy.blocks >= 1
        assert row.launch.threads % 32 == 0 and row.launch.blocks >= 1
        assert 0 < row.floor <= row.predicted
    text = kernels.table(rows)
    assert len(text.splitlines()) == 2 + len(rows)
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_benchmark_runs_on_the_emulator(tmp_path: Path) -> None:
    output, document, profile = tmp_path / "gpu.json", tmp_path / "gpu.md", tmp_path / "profile.txt"
    options = ["--emulated", "--dtypes", "fp16", "--masks", "longformer", "--rounds", "1"]
    files = ["--output", str(output), "--document", str(document), "--profile", str(profile)]
    result = run(str(BENCHMARKS / "gpu.py"), *options, *files)
    assert result.returncode == 0, result.stderr
    found = json.loads(output.read_text())
    assert len(found["results"]) == 2  # an encoder, and attention alone
    for line in found["results"]:
        assert line["missing"] == {}
        assert set(line["times"]) == {"fuser", "eager"}
        assert 0 < line["distance"]["fuser"] < 1e-2
    assert "attention 2x32 1x24 longformer fp16" in document.read_text()
    assert profile.read_text()


def test_benchmark_without_a_gpu_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = run(str(BENCHMARKS / "gpu.py"))
    assert result.returncode == 1
    assert "there is no usable GPU" in result.stderr
