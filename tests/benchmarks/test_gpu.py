"""What the GPU benchmarks can show without a GPU: they run on the emulator, and the table of kernels is right."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from scripts import load_script
from torch import Tensor

from fuser.ir.errors import ToolchainError
from fuser.ir.target import cuda_target
from fuser.kernels.base import Cost
from fuser.runtime.nvcc import InstructionMix, Resources, find_nvcc

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return load_script("gpu_kernels")


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return load_script("gpu")


@pytest.fixture
def parse(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., argparse.Namespace]:
    def parsed(*arguments: str) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
        options: argparse.Namespace = gpu.parse()
        return options

    return parsed


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
    counted = [dataclasses.replace(row.resources, instructions=InstructionMix(fma=7, alu=5)) for row in rows]
    mixed = [dataclasses.replace(row, resources=found) for row, found in zip(rows, counted, strict=True)]
    for text in (kernels.table(rows), kernels.mix_table(mixed)):
        assert len(text.splitlines()) == 2 + len(rows)
        assert len({line.count("|") for line in text.splitlines()}) == 1
    assert kernels.mix_table(mixed).endswith("| 12 | 0 | 7 | 5 | 0 | 0 | 0 | 0 | 0 |")


def test_the_page_says_when_there_is_no_disassembler(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_nvcc", lambda target: SimpleNamespace(name="release 13.0"))
    monkeypatch.setattr(kernels, "rows_of", lambda case, arch: [])
    for found, said in ((None, True), (Path("nvdisasm"), False)):
        monkeypatch.setattr(kernels, "find_disassembler", lambda toolchain, found=found: found)
        page = kernels.document(["bert-tiny:1x8:float16"], ["sm_80"], False)
        assert ("No disassembler was found" in page) == said
        assert ("instructions of the machine code" in page) != said


def test_every_tile_is_compiled_and_counted(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def reports(texts: Sequence[str], target: object) -> list[tuple[Resources, ...]]:
        compiled.extend(texts)
        spilling = Resources("gemm", 128, 0, 8, 4, 8)
        return [(spilling,), *((Resources("gemm", 90, 0, 0, 0, 0),) for _ in texts[1:])]

    monkeypatch.setattr(kernels, "_compile", reports)
    lines = kernels.tile_table(["sm_80"]).splitlines()
    assert len(lines) == 2 + len(kernels.PRODUCTS) and len(set(compiled)) == len(compiled)
    # 9 shapes in 2 depths and 3 numbers of stages, each with one block and with two for a sum.
    assert lines[-1] == "| sm_80 | exact fp32 | 54 | 108 | 128 | 1 | 12 |"


@pytest.mark.parametrize("length", [24, 600])
def test_rules_of_flex_attention_are_the_masks(length: int, gpu: ModuleType) -> None:
    cpu = torch.device("cpu")
    for name, mask in gpu.masks(length).items():
        allowed, causal = gpu.entries(mask, length, cpu)
        assert causal == (name == "causal") and (allowed is None) == (name in ("dense", "causal"))
        if name != "dense":
            i, j = torch.arange(length)[:, None], torch.arange(length)
            assert torch.equal(gpu.rule(mask, length, cpu)(None, None, i, j), mask.dense(length)), name
        if allowed is not None:
            assert torch.equal(allowed, mask.dense(length)), name


def test_references_of_long_sequences_are_of_some_rows(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case, cpu = gpu.Case(None, 1, 600, "longformer", "fp32", 3, 16), torch.device("cpu")
    whole, rows = gpu.reference(case, cpu)
    assert torch.equal(rows, torch.arange(600))
    monkeypatch.setattr(gpu, "ROWS", 256)
    part, rows = gpu.reference(case, cpu)
    assert len(rows) < 300 and rows.min() == 0 and rows.max() > 300
    assert torch.allclose(part, whole[:, :, rows], rtol=0, atol=1e-14)
    eager = gpu.arms_of(case, ("eager",), cpu, "cuda:emulated")["eager"]()()
    assert gpu.distance(eager, part, rows) < 1e-6 < gpu.distance(eager.roll(1, -2), part, rows)


def test_telling_cases_come_first(gpu: ModuleType, parse: Callable[..., argparse.Namespace]) -> None:
    options = parse()
    found = gpu.cases(options)
    assert [str(case) for case in found[:2]] == ["bert-base 8x512 dense fp16", "attention 16x64 4x4096 dense fp16"]
    assert len(set(map(str, found))) == len(found)
    encoders, alone = ([c for c in found if (c.model is None) == x] for x in (False, True))
    assert {c.model for c in encoders} == {"bert-base", "bert-large"} and {c.batch for c in encoders} == {1, 8, 16}
    assert {c.dtype for c in encoders} == {c.dtype for c in alone} == {"fp16", "bf16", "fp32"}
    assert min(c.length for c in encoders) == 64 and max(c.length for c in encoders) == 4096
    assert min(c.length for c in alone) == 1024 and max(c.length for c in alone) == 32768
    assert {c.mask for c in alone} == {c.mask for c in encoders} == set(gpu.masks(512))
    assert all(c.mask == "dense" or c.length >= 1024 for c in encoders)
    # Each of these is in the first twentieth of its kind.
    for case in ("bert-large 8x512 dense fp16", "bert-base 8x512 dense bf16", "bert-base 1x4096 longformer fp16"):
        assert case in map(str, encoders[: len(encoders) // 20])
    # max-autotune takes minutes.
    assert len(gpu.autotuned(options)) == 2 and str(found[0]) in gpu.autotuned(options)
    assert gpu.autotuned(options) <= set(map(str, encoders[:3]))


def test_arms_suit_their_case(gpu: ModuleType) -> None:
    def arms(*case: object, autotuned: bool = False) -> set[str]:
        return set(gpu.peers_of(gpu.Case(*case), gpu.PEERS, autotuned))

    compiled = {"compile", "compile reduce-overhead"}
    dense = {"eager", "cudnn", "flash"}
    assert arms("bert-base", 8, 512, "dense", "fp16") == dense | compiled
    assert arms("bert-base", 8, 512, "dense", "fp16", autotuned=True) == dense | compiled | {"compile max-autotune"}
    assert arms("bert-base", 1, 4096, "strided", "fp32") == {"eager", "flex"} | compiled
    assert arms(None, 1, 4096, "causal", "bf16") == dense | {"flex"}
    assert arms(None, 1, 4096, "dense", "fp32") == {"eager"}
    assert gpu.peers_of(gpu.Case(None, 1, 4096, "causal", "bf16"), ("flex",), False) == ("flex",)


def _about(gpu_name: str, commit: str) -> dict[str, object]:
    return {"gpu": f"{gpu_name}, 580.1", "cpu": "x", "commit": commit, "date": "d", "versions": {"torch": "2.11"}}


def test_another_run_goes_on(gpu: ModuleType, parse: Callable[..., argparse.Namespace], tmp_path: Path) -> None:
    wanted, path = gpu.cases(parse())[:4], tmp_path / "results" / "gpu.json"
    stored = gpu.Stored.read(path)
    here = stored.join(_about("NVIDIA H200", "abc"))
    assert stored.todo(wanted, here) == wanted
    line = {"times": {}, "speedup": {}, "distance": {}, "missing": {}, "machine": here}
    stored.results[str(wanted[0])] = {**gpu._head(wanted[0]), **line, "skipped": "it takes longer than 240 s"}
    stored.results[str(wanted[1])] = {**gpu._head(wanted[1]), **line}
    stored.write(path)
    again = gpu.Stored.read(path)
    assert again == stored
    # A machine of the same kind, with what took too long at the end; another commit or GPU measures everything.
    other = again.join({**_about("NVIDIA H200", "abc"), "bandwidth_gb_s": 4321.0})
    assert again.todo(wanted, other) == [wanted[2], wanted[3], wanted[0]]
    for about in (_about("NVIDIA H200", "def"), _about("NVIDIA A100", "abc")):
        assert again.todo(wanted, again.join(about)) == wanted
    assert len(again.machines) == 4 and again.join(_about("NVIDIA H200", "abc")) == here
    page = gpu.document(again)
    assert f"{wanted[0]}: skipped, it takes longer than 240 s" in page and "commit def" in page


def test_time_runs_out_even_where_errors_are_caught(gpu: ModuleType) -> None:
    begun = time.perf_counter()
    with pytest.raises(gpu.OutOfTime), gpu.limited(0.05):
        while True:
            with contextlib.suppress(Exception):
                time.sleep(1)
    assert time.perf_counter() - begun < 1
    with gpu.limited(10):
        pass


def test_slow_arms_are_left_out_and_slow_cases_skipped(
    gpu: ModuleType, parse: Callable[..., argparse.Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, cpu, answer = gpu.Case(None, 1, 24, "dense", "fp32", 2, 16), torch.device("cpu"), torch.ones(1, 2, 24, 16)

    def fast() -> Callable[[], Tensor]:
        return lambda: answer

    def slow() -> Callable[[], Tensor]:
        time.sleep(5)
        return fast()

    def broken() -> Callable[[], Tensor]:
        raise ValueError("no such kernel")

    def wrong() -> Callable[[], Tensor]:
        return lambda: answer + 1

    makers = {"fuser": fast, "eager": slow, "flex": broken, "flash": wrong}
    monkeypatch.setattr(gpu, "reference", lambda case, device: (answer, torch.arange(24)))
    monkeypatch.setattr(gpu, "arms_of", lambda *_: makers)
    options = parse("--emulated", "--arm-seconds", "0.1")
    result = gpu.run(case, options, cpu, "cuda:emulated", time.perf_counter() + 60)
    assert set(result["times"]) == {"fuser"}
    assert result["missing"] == {
        "eager": "not ready after 0.1 s",
        "flex": "ValueError: no such kernel",
        "flash": "disagrees by 1.0e+00",
    }
    with pytest.raises(gpu.OutOfTime):
        gpu.run(case, parse("--emulated"), cpu, "cuda:emulated", time.perf_counter() + 0.1)


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
    again = run(str(BENCHMARKS / "gpu.py"), *options, "--output", str(output))
    assert again.returncode == 0, again.stderr
    assert "0 of 2 cases are left" in again.stdout and json.loads(output.read_text()) == found


def test_stored_results_become_a_page(
    gpu: ModuleType, parse: Callable[..., argparse.Namespace], tmp_path: Path
) -> None:
    stored, case = gpu.Stored([_about("NVIDIA H200", "abc")], {}), gpu.Case(None, 4, 4096, "window", "fp16")
    times = {name: {"median_ms": value} for name, value in (("flex", 0.5), ("fuser", 0.25))}
    stored.results[str(case)] = {
        **gpu._head(case),
        "times": times,
        "speedup": {"flex": 2.0},
        "missing": {"eager": "RuntimeError: a|b\nc"},
        "machine": 0,
    }
    stored.write(tmp_path / "gpu.json")
    files = ["--output", str(tmp_path / "gpu.json"), "--document", str(tmp_path / "gpu.md")]
    parse("--tables", *files)
    gpu.main()
    page = (tmp_path / "gpu.md").read_text()
    assert "| case | fuser | eager | flex |" in page
    assert "| attention 16x64 4x4096 window fp16 | 0.250 | RuntimeError: a/b c | 0.500 (2.00×) |" in page
    parse("--tables", "--output", str(tmp_path / "none.json"))
    with pytest.raises(SystemExit, match="there are no results"):
        gpu.main()


def test_benchmark_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = run(str(BENCHMARKS / "gpu.py"))
    assert result.returncode == 1
    assert "there is no usable GPU" in result.stderr
