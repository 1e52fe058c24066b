"""Saving and loading: bit for bit, without a compiler, and one clear error for whatever a file has wrong."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import fuser
from fuser import masks, saved
from fuser.ir.errors import FuserError, KernelError
from fuser.runtime import device

X = torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(0))


@dataclass
class Output:
    hidden: Tensor
    pooled: Tensor | None = None
    name: str = "encoder"


class Pair(NamedTuple):
    first: Tensor
    second: Any


class Encoder(nn.Module):
    """Attention, a perceptron, an extern step, weights that are tied, transposed and used as they are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.norm = nn.LayerNorm(64)
        self.table = nn.Parameter(torch.randn(64, 40).t()[:20])
        self.tied = self.norm.weight
        self.mask = masks.SlidingWindow(4, 4)

    def forward(self, x: Tensor, pad: Tensor | None = None, *, form: str = "tensor") -> Any:
        q, k, v = (
            t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.qkv(x + self.table[: x.shape[1]]).chunk(3, -1)
        )
        y = fuser.sparse_attention(q, k, v, self.mask if pad is None else pad[:, None, None, :])
        x = self.norm(x + self.out(y.transpose(1, 2).flatten(2)))  # type: ignore[union-attr]
        x = self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))
        if form == "dict":
            return {"hidden": x, "sizes": [x.shape[1], None, (x.cumsum(1), "text")]}
        if form == "dataclass":
            return Output(x * self.tied)
        if form == "tuple":
            return Pair(x, x.argmax(-1))
        return x


@pytest.fixture(scope="module")
def optimized() -> fuser.OptimizedModule:
    fast = fuser.optimize(Encoder().eval(), search="model")
    pad = torch.arange(20) < torch.tensor([20, 11, 1])[:, None]
    fast(X), fast(X[:1]), fast(X, pad), fast(X, form="dict")
    return fast


@pytest.fixture
def path(optimized: fuser.OptimizedModule, tmp_path: Path) -> Path:
    target = tmp_path / "encoder.fuser"
    optimized.save(target)
    return target


def test_bit_for_bit(optimized: fuser.OptimizedModule, path: Path) -> None:
    loaded = fuser.load(path)
    pad = torch.arange(20) < torch.tensor([20, 11, 1])[:, None]
    for _ in range(2):
        assert torch.equal(loaded(X), optimized(X))
        assert torch.equal(loaded(X[:1]), optimized(X[:1]))
        assert torch.equal(loaded(X, pad), optimized(X, pad))
        assert torch.equal(loaded(X.transpose(0, 1).contiguous().transpose(0, 1)), optimized(X))
    got, want = loaded(X, form="dict"), optimized(X, form="dict")
    assert list(got) == ["hidden", "sizes"] and got["sizes"][:2] == [20, None] and got["sizes"][2][1] == "text"
    assert torch.equal(got["hidden"], want["hidden"]) and torch.equal(got["sizes"][2][0], want["sizes"][2][0])
    right = Encoder().double().eval()(X.double())
    eager = Encoder().eval()(X)
    assert (loaded(X).double() - right).norm() <= 2 * (eager.double() - right).norm()


@pytest.mark.parametrize("form", ["dataclass", "tuple"])
def test_structures(form: str, tmp_path: Path) -> None:
    fast = fuser.optimize(Encoder().eval(), search="model")
    want = fast(X, form=form)
    fast.save(tmp_path / "x.fuser")
    got = fuser.load(tmp_path / "x.fuser")(X, form=form)
    assert type(got) is type(want)
    if form == "tuple":
        assert torch.equal(got.first, want.first) and torch.equal(got.second, want.second)
    else:
        assert torch.equal(got.hidden, want.hidden) and got.pooled is None and got.name == "encoder"


def test_transformers_outputs(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    inputs = {"input_ids": torch.arange(14).reshape(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    fast = fuser.optimize(transformers.BertModel(config).eval(), inputs, search="model")
    fast.save(tmp_path / "bert.fuser")
    code = f"""
import sys, torch, fuser
loaded = fuser.load({str(tmp_path / "bert.fuser")!r})
out = loaded(input_ids=torch.arange(14).reshape(2, 7), attention_mask=torch.ones(2, 7, dtype=torch.long))
assert type(out).__name__ == "BaseModelOutputWithPoolingAndCrossAttentions", type(out)
torch.save((out.last_hidden_state, out["pooler_output"]), {str(tmp_path / "out.pt")!r})
"""
    # No compiler, an empty cache, and nothing of the model.
    environment = {**os.environ, "FUSER_CACHE_DIR": str(tmp_path / "cache"), "CXX": "false", "PATH": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    hidden, pooled = torch.load(tmp_path / "out.pt")
    want = fast(**inputs)
    assert torch.equal(hidden, want.last_hidden_state) and torch.equal(pooled, want.pooler_output)


def test_own_operators_bring_their_masks(tmp_path: Path) -> None:
    class WithSums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv = nn.Linear(64, 192)
            self.mask = masks.from_mask_mod(lambda b, h, i, j: (i + j) % 3 < 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            out, lse = fuser.sparse_attention(q, k, v, self.mask, return_lse=True)
            return out, lse

    fast = fuser.optimize(WithSums().eval(), (X,), search="model")
    assert fast.kernels
    fast.save(tmp_path / "x.fuser")
    code = f"""
import torch, fuser
out, lse = fuser.load({str(tmp_path / "x.fuser")!r})(torch.load({str(tmp_path / "in.pt")!r}))
torch.save((out, lse), {str(tmp_path / "out.pt")!r})
"""
    torch.save(X, tmp_path / "in.pt")
    subprocess.run([sys.executable, "-c", code], check=True)
    for got, want in zip(torch.load(tmp_path / "out.pt"), fast(X), strict=True):
        assert torch.equal(got, want)


def test_records(optimized: fuser.OptimizedModule, path: Path, tmp_path: Path) -> None:
    loaded = fuser.load(path)
    loaded(X, form="dict")
    optimized(X, form="dict")
    assert loaded.kernels == optimized.kernels and loaded.unfused == optimized.unfused
    assert loaded.outside == optimized.outside
    assert loaded.report(tmp_path / "report.html") == optimized.report()
    assert "<html" in (tmp_path / "report.html").read_text()
    assert loaded.calls[0] == "(float32 (3, 20, 64))" and "form='dict'" in loaded.calls[-1]
    assert not list(loaded.parameters()) and not loaded.training


def test_weights_are_stored_once_in_a_standard_format(optimized: fuser.OptimizedModule, path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        weights = safetensors.torch.load(archive.read("weights.safetensors"))
        size = archive.getinfo("weights.safetensors").file_size
    assert sum(t.nbytes for t in weights.values()) <= size
    constants = {t.data_ptr(): t.nbytes for _, _, tensors in optimized.snapshot() for t in tensors}
    assert size <= 1.1 * sum(constants.values()) + 4096
    floats = sum(p.numel() for p in Encoder().parameters())
    assert size < 4 * floats * 1.3 + 65536


def test_weights_as_they_are_when_saving(tmp_path: Path) -> None:
    model = Encoder().eval()
    fast = fuser.optimize(model, (X,), search="model")
    before = fast(X)
    with torch.no_grad():
        model.up.weight.mul_(2)
    fast.save(tmp_path / "x.fuser")
    got = fuser.load(tmp_path / "x.fuser")(X)
    assert not torch.equal(got, before) and torch.equal(got, fast(X))


def test_fewer_and_more_threads(optimized: fuser.OptimizedModule, path: Path) -> None:
    loaded = fuser.load(path)
    want = optimized(X)
    before = torch.get_num_threads()
    try:
        for count in (1, before, before + 2):
            torch.set_num_threads(count)
            torch.testing.assert_close(loaded(X), want, rtol=0, atol=1e-6)
            assert {team for _, team, _ in loaded._running} <= {1, before}
    finally:
        torch.set_num_threads(before)


def test_calls_that_were_not_saved(path: Path) -> None:
    loaded = fuser.load(path)
    with pytest.raises(KernelError, match=r"no program was saved for the call \(float32 \(3, 7, 64\)\)") as error:
        loaded(X[:, :7])
    assert all(call in str(error.value) for call in loaded.calls) and str(path) in str(error.value)
    with pytest.raises(KernelError, match="float64"):
        loaded(X.double())
    with pytest.raises(KernelError, match="form='other'"):
        loaded(X, form="other")


class Tagged(torch.Tensor):
    pass


def test_calls_that_kernels_cannot_take(path: Path) -> None:
    loaded = fuser.load(path)
    with pytest.raises(KernelError, match="Tagged"):
        loaded(X.as_subclass(Tagged))
    with pytest.raises(KernelError, match="cannot look into"):
        torch.func.vmap(loaded)(X[None])
    with pytest.raises(KernelError, match="cannot look into"):
        torch.export.export(loaded, (X,))
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(KernelError, match="TorchDispatchMode"):
        loaded(X)
    with pytest.raises(KernelError, match="traced"):
        torch.jit.trace(loaded, X)


def test_copies(path: Path) -> None:
    loaded = fuser.load(path)
    assert torch.equal(copy.deepcopy(loaded)(X), loaded(X))
    with pytest.raises(pickle.PicklingError, match=r"fuser\.load"):
        pickle.dumps(loaded)


# ---- what can be wrong


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def edit_manifest(**changes: Any) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        manifest = json.loads(members["manifest.json"])
        manifest.update(changes)
        members["manifest.json"] = json.dumps(manifest).encode()

    return change


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated(path: Path, kept: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(FuserError, match=r"encoder\.fuser is damaged"):
        fuser.load(path)


def test_every_part_is_checked(path: Path) -> None:
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    for info in infos:
        damaged = bytearray(content)
        damaged[info.header_offset + 60 + info.compress_size // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(FuserError, match=r"damaged|cannot be read"):
            fuser.load(path)


def test_members_that_do_not_match_the_manifest(path: Path) -> None:
    original = path.read_bytes()

    def other_kernel(members: dict[str, bytes]) -> None:
        name = next(n for n in members if n.startswith("kernels/"))
        members[name] = members[name][:-1] + b"\0\1"

    def other_weights(members: dict[str, bytes]) -> None:
        content = bytearray(members["weights.safetensors"])
        content[-1] ^= 1
        members["weights.safetensors"] = bytes(content)

    def missing(members: dict[str, bytes]) -> None:
        del members[next(n for n in members if n.startswith("kernels/"))]

    def no_header(members: dict[str, bytes]) -> None:
        members["weights.safetensors"] = b"\xff" * 100

    for change in (other_kernel, other_weights, missing, no_header):
        path.write_bytes(original)
        rewrite(path, change)
        with pytest.raises(FuserError, match="damaged"):
            fuser.load(path)


def test_not_a_file_of_ours(tmp_path: Path) -> None:
    with pytest.raises(FuserError, match="cannot read"):
        fuser.load(tmp_path / "missing.fuser")
    with pytest.raises(FuserError, match="cannot read"):
        fuser.load(tmp_path)
    (tmp_path / "text.fuser").write_text("hello")
    with pytest.raises(FuserError, match="not a file that"):
        fuser.load(tmp_path / "text.fuser")
    torch.save({"a": X}, tmp_path / "torch.fuser")
    with pytest.raises(FuserError, match="not a file that"):
        fuser.load(tmp_path / "torch.fuser")


def test_other_formats(path: Path) -> None:
    rewrite(path, edit_manifest(format=99, fuser="9.9"))
    with pytest.raises(FuserError, match=r"format 99 \(written by fuser 9\.9\)"):
        fuser.load(path)


def test_other_machines(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        device, "cpu_flags", lambda: frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "popcnt"})
    )
    target = json.loads(zipfile.ZipFile(path).read("manifest.json"))["target"]
    if target["arch"] == "avx512":
        with pytest.raises(FuserError, match=r"saved for \w+ avx512.*this CPU .*has no avx512; its best is avx2"):
            fuser.load(path)
    monkeypatch.undo()
    rewrite(path, edit_manifest(target={**target, "features": ["amx_tile_of_tomorrow"]}))
    with pytest.raises(FuserError, match="has no amx_tile_of_tomorrow"):
        fuser.load(path)
    rewrite(path, edit_manifest(machine="sparc64"))
    with pytest.raises(FuserError, match="saved for sparc64"):
        fuser.load(path)


@pytest.mark.parametrize(
    "value", [print, os.system, subprocess.Popen, torch.load, torch.hub.load, fuser.load, pickle.loads, eval, getattr]
)
def test_pickles_hold_nothing_else(value: Any) -> None:
    content = pickle.dumps(value, protocol=4)
    with pytest.raises((pickle.UnpicklingError, AttributeError)):
        saved._Unpickler(io.BytesIO(content)).load()


def test_pickles_do_not_reach_through_our_modules() -> None:
    for name in ("os.system", "pickle.loads", "torch.load", "zipfile.ZipFile"):
        content = b"\x80\x04\x8c\x0bfuser.saved\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
        with pytest.raises(pickle.UnpicklingError):
            saved._Unpickler(io.BytesIO(content)).load()


def test_saving_nothing() -> None:
    with pytest.raises(FuserError, match="nothing is compiled yet"):
        fuser.optimize(Encoder()).save("never.fuser")
    assert not Path("never.fuser").exists()


def test_a_failed_save_leaves_the_old_file(
    optimized: fuser.OptimizedModule, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved, "_write", full)
    with pytest.raises(FuserError, match="No space left"):
        optimized.save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    with pytest.raises(FuserError, match="cannot write"):
        optimized.save(path.parent / "no" / "such" / "folder.fuser")


# ---- what else may happen to an optimized module


def test_deepcopy_and_pickle_of_an_optimized_module(optimized: fuser.OptimizedModule) -> None:
    for copied in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        assert isinstance(copied, fuser.OptimizedModule) and not copied.programs
        with torch.no_grad():
            for mine, theirs in zip(copied.parameters(), optimized.parameters(), strict=True):
                assert mine is not theirs and torch.equal(mine, theirs)
            copied.norm.bias.add_(1)
        assert not torch.equal(copied(X), optimized(X)) and copied.programs
    holder = nn.ModuleDict({"a": optimized, "b": optimized})
    twice = copy.deepcopy(holder)
    assert twice["a"] is twice["b"]


def test_export_and_compile_of_an_optimized_module(optimized: fuser.OptimizedModule) -> None:
    torch._dynamo.reset()
    want = optimized(X)
    with torch.no_grad():
        exported = torch.export.export(optimized, (X,)).module()(X)
        compiled = torch.compile(optimized, backend="aot_eager")(X)
    torch.testing.assert_close(exported, want, rtol=0, atol=5e-6)
    torch.testing.assert_close(compiled, want, rtol=0, atol=5e-6)


def test_an_optimized_module_inside_of_another() -> None:
    inner = fuser.optimize(Encoder().eval(), search="model")
    outer = fuser.optimize(nn.Sequential(nn.Linear(64, 64), inner).eval(), (X,), search="model")
    with torch.no_grad():
        torch.testing.assert_close(outer(X), inner._model(outer._model[0](X)), rtol=0, atol=5e-6)
    assert {"attention", "gemm"} <= {kernel.family for kernel in outer.kernels} and not inner.programs
