"""Finding nvcc, what it must be able to do, and reading what ptxas says."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fuser.ir.errors import BuildError, FuserError, ToolchainError
from fuser.ir.target import CUDA_ARCHS, cuda_target, emulated_target
from fuser.runtime import cuda, nvcc, toolchain
from fuser.runtime.build import CompilationError, Source, build
from fuser.runtime.cache import KernelCache
from fuser.runtime.compilers import find_toolchain
from fuser.runtime.nvcc import (
    InstructionMix,
    Resources,
    find_disassembler,
    find_nvcc,
    parse_instructions,
    parse_resources,
    resources,
)

Fake = Callable[..., Path]
TARGET = cuda_target("sm_90a")
COMPILERS = {
    "works": "#!{python}\nimport sys\nif '--version' in sys.argv:\n    print('nvcc: a compiler\\nCuda compilation "
    "tools, release {release}, V{release}.1')\nelif '-o' in sys.argv:\n    open(sys.argv[sys.argv.index('-o') + 1], "
    "'w').close()\n",
    "fails": "#!{python}\nimport sys\nif '--version' in sys.argv:\n    print('release {release}')\nelse:\n    "
    "sys.exit('error: unsupported GNU version')\n",
    "other": "#!{python}\nprint('gcc 12')\n",
}


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(nvcc, "_PACKAGES", ())
    monkeypatch.setattr(nvcc, "_DISASSEMBLER_PACKAGES", ())
    monkeypatch.setattr(nvcc, "_DEFAULT", tmp_path / "nowhere" / "nvcc")
    monkeypatch.setattr(cuda, "driver_version", lambda: None)
    monkeypatch.setattr(toolchain, "_checked", set())


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    def make(kind: str = "works", release: str = "13.0", folder: str = "cuda") -> Path:
        path = tmp_path / folder / "bin" / "nvcc"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(COMPILERS[kind].format(python=sys.executable, release=release))
        path.chmod(0o755)
        return path

    return make


def test_no_nvcc_says_how_to_get_one() -> None:
    with pytest.raises(ToolchainError, match="nvidia-cuda-nvcc") as caught:
        find_nvcc(TARGET)
    assert "CUDA_HOME" in str(caught.value) and "fuserc cache import" in str(caught.value)


def test_variables_come_first_then_path_and_packages(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    default = fake(folder="default")
    monkeypatch.setattr(nvcc, "_DEFAULT", default)
    assert find_nvcc(TARGET).command == (str(default),)
    package = fake(folder="package")
    (package.parent.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(package.parent.parent.parent))
    monkeypatch.setattr(nvcc, "_PACKAGES", ("package",))
    assert find_nvcc(TARGET).command == (str(package),)
    on_path = fake(folder="path")
    monkeypatch.setenv("PATH", f"{on_path.parent}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert find_nvcc(TARGET).command == (str(on_path),)
    home = fake(folder="home")
    monkeypatch.setenv("CUDA_HOME", str(home.parent.parent))
    assert find_nvcc(TARGET).command == (str(home),)
    chosen = fake(folder="chosen")
    monkeypatch.setenv("CUDACXX", str(chosen))
    assert find_nvcc(TARGET).command == (str(chosen),)


def test_a_chosen_nvcc_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", "/no/such/nvcc")
    with pytest.raises(ToolchainError, match="CUDACXX"):
        find_nvcc(TARGET)


def test_an_old_nvcc_is_passed_over(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = fake(release="11.4", folder="old"), fake(release="12.4", folder="new")
    monkeypatch.setenv("CUDA_HOME", str(old.parent.parent))
    with pytest.raises(ToolchainError, match=r"CUDA 11\.4 is too old for sm_90a, which needs 12\.0"):
        find_nvcc(TARGET)
    monkeypatch.setenv("PATH", f"{new.parent}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert find_nvcc(TARGET).command == (str(new),)


def test_nvcc_must_not_be_newer_than_the_driver(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", str(fake(release="13.0")))
    monkeypatch.setattr(cuda, "driver_version", lambda: (12, 8))
    with pytest.raises(ToolchainError, match=r"need a newer driver .* up to CUDA 12\.8"):
        find_nvcc(TARGET)
    # Within a major release, older drivers run newer kernels.
    monkeypatch.setenv("CUDACXX", str(fake(release="12.9")))
    assert find_nvcc(TARGET)


@pytest.mark.parametrize(("kind", "message"), [("fails", "unsupported GNU version"), ("other", "this is not nvcc")])
def test_an_nvcc_that_does_not_work_shows_its_message(
    kind: str, message: str, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDACXX", str(fake(kind)))
    with pytest.raises(ToolchainError, match=message):
        find_nvcc(TARGET)


def test_it_is_tried_once(fake: Fake, monkeypatch: pytest.MonkeyPatch, cache: KernelCache) -> None:
    monkeypatch.setenv("CUDACXX", str(fake()))
    tried = []
    monkeypatch.setattr(nvcc, "_check", lambda toolchain: tried.append(toolchain.command))
    find_nvcc(TARGET, cache)
    find_nvcc(TARGET, cache)
    monkeypatch.setattr(toolchain, "_checked", set())
    find_nvcc(TARGET, cache)
    assert len(tried) == 1
    find_nvcc(cuda_target("sm_80"), cache)
    assert len(tried) == 2


def test_flags_name_the_architecture_and_the_host_compiler(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake()
    (path.parent.parent / "lib64").mkdir()
    (path.parent.parent / "lib64" / "libcudart_static.a").touch()
    monkeypatch.setenv("CUDACXX", str(path))
    monkeypatch.setenv("CXX", "g++-12 -v")
    found = find_nvcc(TARGET)
    assert "arch=compute_90a,code=sm_90a" in found.compile_flags
    assert found.compile_flags[found.compile_flags.index("-ccbin") + 1] == "g++-12"
    assert f"-L{path.parent.parent / 'lib64'}" in found.link_flags
    # Another architecture is another kernel.
    assert find_nvcc(cuda_target("sm_80")).flags != found.flags
    assert found.name.endswith("release 13.0, V13.0.1")


def test_every_architecture_has_a_first_toolkit() -> None:
    assert set(nvcc._SINCE) == set(CUDA_ARCHS)
    for arch in CUDA_ARCHS:
        target = cuda_target(arch)
        assert target.kind == "cuda" and target.shared_bytes > 48 << 10
        assert target.tensor_flops > target.peak_flops > 1e10
    with pytest.raises(FuserError, match="sm_70"):
        cuda_target("sm_70")


def test_the_emulator_is_another_target_than_its_gpu() -> None:
    emulated = emulated_target()
    assert emulated.emulated and emulated.device == "cpu" and cuda_target("sm_80").device == "cuda"
    assert emulated.key != cuda_target("sm_80").key
    found = find_toolchain(emulated)
    assert "-DFUSER_EMULATED" in found.compile_flags


REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstPf' for 'sm_90a'
ptxas info    : Function properties for _Z5firstPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
ptxas info    : Compiling entry function '_Z6secondPf' for 'sm_90a'
ptxas info    : Function properties for _Z6secondPf
    64 bytes stack frame, 32 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 64 bytes cumulative stack size, 1040 bytes smem
ptxas info    : Compile time = 1.779 ms
"""


def test_reports_of_ptxas() -> None:
    assert parse_resources(REPORT) == (
        Resources("_Z5firstPf", 10, 0, 0, 0, 0),
        Resources("_Z6secondPf", 255, 1040, 64, 32, 40),
    )


# nvdisasm -c, for sm_80, of a kernel that copies, waits and multiplies, and of one with tensor cores and an array that
# it indexes by a number of run time; without the lines that say nothing about instructions.
LISTING = """
	.target	sm_80
//--------------------- .text._Z7productPfPKji    --------------------------
	.section	.text._Z7productPfPKji,"ax",@progbits
        .global         _Z7productPfPKji
        .type           _Z7productPfPKji,@function
_Z7productPfPKji:
.text._Z7productPfPKji:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/                   S2R R12, SR_TID.X ;
        /*0020*/                   IMAD.MOV.U32 R0, RZ, RZ, 0x4 ;
        /*0030*/                   ULDC.64 UR4, c[0x0][0x118] ;
        /*0040*/                   IADD3 R1, R1, -0x100, RZ ;
        /*0050*/                   IMAD.WIDE.U32 R2, R12, R0, c[0x0][0x168] ;
        /*0060*/                   LDG.E R4, [R2.64] ;
        /*0070*/                   ISETP.NE.AND P0, PT, RZ, c[0x0][0x170], PT ;
        /*0080*/                   IMAD R0, R0, c[0x0][0x170], R1 ;
        /*0090*/                   MOV R8, R4.reuse ;
        /*00a0*/                   IMAD.MOV.U32 R9, RZ, RZ, R4.reuse ;
        /*00b0*/                   MOV R5, R4.reuse ;
        /*00c0*/                   IMAD.MOV.U32 R6, RZ, RZ, R4 ;
        /*00d0*/                   MOV R7, R4 ;
        /*00e0*/                   HMMA.16816.F32 R8, R4, R8, RZ ;
        /*00f0*/                   @!UPT UIADD3 URZ, URZ, URZ, URZ ;
        /*0100*/                   @!UPT UIADD3 URZ, URZ, URZ, URZ ;
        /*0110*/                   STL [R0], R8 ;
        /*0120*/                   STL [R0+0x4], R9 ;
.L_x_2:
        /*0130*/              @!P0 EXIT ;
        /*0140*/                   IMAD R4, R4, 0x4, R1 ;
        /*0150*/                   LDL R5, [R4] ;
        /*0160*/                   LEA R2, P0, R12, c[0x0][0x160], 0x2 ;
        /*0170*/                   LEA.HI.X R3, R12, c[0x0][0x164], RZ, 0x2, P0 ;
        /*0180*/                   STG.E [R2.64], R5 ;
.L_x_3:
        /*0190*/                   EXIT ;
.L_x_0:
        /*01a0*/                   BRA `(.L_x_0);
        /*01b0*/                   NOP;
.L_x_5:
//--------------------- .text._Z4copyPfPKf        --------------------------
	.section	.text._Z4copyPfPKf,"ax",@progbits
        .global         _Z4copyPfPKf
        .type           _Z4copyPfPKf,@function
_Z4copyPfPKf:
.text._Z4copyPfPKf:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   S2R R4, SR_TID.X ;
        /*0020*/                   HFMA2.MMA R5, -RZ, RZ, 0, 2.384185791015625e-07 ;
        /*0030*/                   ULDC.64 UR4, c[0x0][0x118] ;
        /*0040*/                   SHF.L.U32 R0, R4.reuse, 0x2, RZ ;
        /*0050*/                   SHF.L.U32 R7, R4, 0x4, RZ ;
        /*0060*/                   IMAD.WIDE.U32 R2, R0, R5, c[0x0][0x168] ;
        /*0070*/                   IMAD.WIDE.U32 R4, R4, R5, c[0x0][0x160] ;
        /*0080*/                   LDGSTS.E.BYPASS.128 [R7], [R2.64] ;
        /*0090*/                   LDGDEPBAR ;
        /*00a0*/                   DEPBAR.LE SB0, 0x0 ;
        /*00b0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00c0*/                   LDG.E R9, [R4.64] ;
        /*00d0*/                   LOP3.LUT R0, R0, 0x4, RZ, 0x3c, !PT ;
        /*00e0*/                   LDS R0, [R0] ;
        /*00f0*/                   FFMA R9, R0, R9, 2 ;
        /*0100*/                   STG.E [R4.64], R9 ;
.L_x_4:
        /*0110*/                   EXIT ;
.L_x_1:
        /*0120*/                   BRA `(.L_x_1);
        /*0130*/                   NOP;
.L_x_6:
"""


def test_instructions_of_a_listing() -> None:
    assert parse_instructions(LISTING) == {
        # HFMA2.MMA makes a constant, and MOV, IMAD.MOV and idle UIADD3 are no products either.
        "_Z7productPfPKji": InstructionMix(tensor=1, alu=16, global_=2, local=3, control=5),
        "_Z4copyPfPKf": InstructionMix(fma=1, alu=7, shared=1, global_=3, barriers=1, control=6),
    }
    assert [mix.total for mix in parse_instructions(LISTING).values()] == [27, 19]
    assert parse_instructions("") == {}


@pytest.mark.parametrize(
    ("instruction", "kind"),
    [
        ("HGMMA.64x256x16.F32 R24, gdesc[UR4], R24", "tensor"),
        ("IMMA.16832.S8.S8 R4, R4.ROW, R8.COL, RZ", "tensor"),
        ("@P0 FFMA R0, R1, R2, R3", "fma"),
        ("LDSM.16.M88.4 R4, [R9+0x800]", "shared"),
        ("@!P6 STS.128 [R5], R8", "shared"),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R5", "global_"),
        ("@!UP0 UIADD3 UR4, UR4, 0x1, URZ", "alu"),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3", "barriers"),
    ],
)
def test_kinds_of_instructions(instruction: str, kind: str) -> None:
    (mix,) = parse_instructions(f".text.f:\n        /*0a10*/               {instruction} ;").values()
    assert mix == InstructionMix(**{kind: 1})


def test_a_disassembler_must_not_be_older_than_nvcc(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDACXX", str(fake(release="13.0")))
    toolchain = find_nvcc(TARGET)
    assert find_disassembler(toolchain) is None

    def tool(folder: str, release: str) -> Path:
        return fake(release=release, folder=folder).rename(tmp_path / folder / "bin" / "nvdisasm")

    package = tool("package", "13.2")
    (package.parent.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(nvcc, "_DISASSEMBLER_PACKAGES", ("package", "no.such"))
    old = tool("old", "12.8")
    monkeypatch.setenv("PATH", f"{old.parent}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert find_disassembler(toolchain) == package
    beside = tool("cuda", "13.0")
    assert find_disassembler(toolchain) == beside


# ---- with the nvcc of this machine


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("CXX", raising=False)
    try:
        find_nvcc(TARGET)
    except ToolchainError as error:
        pytest.skip(str(error).splitlines()[0])


SOURCE = """
#include "cuda/device.cuh"
__global__ void twice(float* x) {{ x[threadIdx.x] *= 2.0f{broken} }}
FUSER_EXPORT int {symbol}(const FuserArgs* args, void* stream) {{
    return device::launch(twice, 1, 32, 0, stream, static_cast<float*>(args->tensors[0]));
}}
"""


def test_a_kernel_is_built_cached_and_small(real: None, headers: Path, cache: KernelCache) -> None:
    source = Source("fuser_twice", SOURCE.format(broken=";", symbol="fuser_twice"), ".cu")
    path = build([source], TARGET, headers=headers.parent, cache=cache)["fuser_twice"]
    # The CUDA runtime is in it: no more is needed than a driver.
    assert 100_000 < path.stat().st_size < 3_000_000
    assert build([source], TARGET, headers=headers.parent, cache=cache)["fuser_twice"] == path
    other = build([source], cuda_target("sm_80"), headers=headers.parent, cache=cache)["fuser_twice"]
    assert other != path
    (found,) = resources(source.text, TARGET, headers=headers.parent)
    assert found.registers > 0 and found.spill_store_bytes == 0 and found.instructions is None


def test_instructions_of_a_kernel(real: None, headers: Path) -> None:
    disassembler = find_disassembler(find_nvcc(TARGET))
    if disassembler is None:
        pytest.skip("there is no nvdisasm of this nvcc's release")
    text = SOURCE.format(broken=";", symbol="fuser_twice")
    (found,) = resources(text, TARGET, headers=headers.parent, disassembler=disassembler)
    assert found.instructions is not None
    mix = found.instructions
    assert mix.global_ == 2 and mix.tensor == mix.fma == mix.shared == mix.local == mix.barriers == 0 < mix.alu


def test_an_exported_kernel_needs_no_nvcc(
    real: None, headers: Path, cache: KernelCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = Source("fuser_twice", SOURCE.format(broken=";", symbol="fuser_twice"), ".cu")
    build([source], TARGET, headers=headers.parent, cache=cache)
    cache.export(tmp_path / "kernels.zip")
    elsewhere = KernelCache(tmp_path / "elsewhere")
    elsewhere.import_(tmp_path / "kernels.zip")
    monkeypatch.setenv("CUDACXX", "/no/such/nvcc")
    assert build([source], TARGET, headers=headers.parent, cache=elsewhere)["fuser_twice"].exists()
    with pytest.raises(ToolchainError, match="is not in the cache"):
        build([source], cuda_target("sm_80"), headers=headers.parent, cache=elsewhere)


def test_what_nvcc_refuses_is_shown_with_its_source(real: None, headers: Path, cache: KernelCache) -> None:
    source = Source("fuser_broken", SOURCE.format(broken="", symbol="fuser_broken"), ".cu")
    with pytest.raises(CompilationError) as caught:
        build([source], TARGET, headers=headers.parent, cache=cache)
    (failure,) = caught.value.failures
    assert "expected a" in failure.output and failure.source.read_text() == source.text
    assert shutil.which(failure.command.split()[0])
    with pytest.raises(BuildError, match="sm_90a"):
        resources(source.text, TARGET, headers=headers.parent)


def test_suffixes_belong_to_targets(headers: Path, cache: KernelCache) -> None:
    with pytest.raises(BuildError, match=r"only '\.cu'"):
        build([Source("x", "", ".cpp")], TARGET, headers=headers.parent, cache=cache)
