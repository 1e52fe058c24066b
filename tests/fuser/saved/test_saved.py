"""Saving and loading: bit for bit, without a compiler, and one clear error for whatever a file has wrong."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import fuser
from fuser import masks
from fuser.ir.errors import FuserError, KernelError
from fuser.runtime import cpuinfo
from fuser.saved import codec, writer
from fuser.saved.writer import checksum

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


@pytest.fixture(scope="module")
def content(optimized: fuser.OptimizedModule, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    target = tmp_path_factory.mktemp("saved") / "encoder.fuser"
    optimized.save(target)
    return target.read_bytes()


@pytest.fixture
def path(content: bytes, tmp_path: Path) -> Path:
    target = tmp_path / "encoder.fuser"
    target.write_bytes(content)
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


class Finite(nn.Module):
    """Attention that fills in a finite minimum at run time: a step of PyTorch makes numbers of the mask."""

    def forward(self, q: Tensor, allowed: Tensor) -> Tensor:
        scores = (q @ q.transpose(-1, -2) * 0.25).masked_fill(~allowed[:, None, None, :], torch.finfo(q.dtype).min)
        return scores.softmax(-1) @ q


def test_masks_of_finite_numbers(tmp_path: Path) -> None:
    fast = fuser.optimize(Finite().eval())
    q, allowed = torch.randn(2, 2, 12, 16), torch.arange(12) < torch.tensor([12, 0])[:, None]
    expected = fast(q, allowed)
    torch.testing.assert_close(expected, Finite()(q, allowed))
    fast.save(tmp_path / "finite.fuser")
    assert torch.equal(fuser.load(tmp_path / "finite.fuser")(q, allowed), expected)


def test_records(optimized: fuser.OptimizedModule, path: Path, tmp_path: Path) -> None:
    loaded = fuser.load(path)
    loaded(X, form="dict")
    optimized(X, form="dict")
    assert loaded.kernels == optimized.kernels and loaded.unfused == optimized.unfused
    assert loaded.outside == optimized.outside
    assert loaded.report(tmp_path / "report.html") == optimized.report()
    assert "<html" in (tmp_path / "report.html").read_text()
    assert loaded.calls[0] == "(float32 (3, 20, 64))" and any("form='dict'" in call for call in loaded.calls)
    assert not list(loaded.parameters()) and not loaded.training


def test_weights_are_stored_once_in_a_standard_format(optimized: fuser.OptimizedModule, path: Path) -> None:
    size = sum(t.nbytes for name, t in safetensors.torch.load_file(path).items() if name.startswith("weights/"))
    constants = {t.data_ptr(): t.nbytes for call in optimized._engine.saved_calls() for t in call.constants}
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
    with pytest.raises(KernelError, match=r"no program was saved for the call \(float32 \(3, 20, 32\)\)") as error:
        loaded(X[..., :32])
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


class Causal(nn.Module):
    """Blocks whose masks and positions are made of index ranges, and a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.places = nn.Embedding(50, 32), nn.Embedding(64, 32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        b, s = ids.shape
        at = torch.arange(s)
        x = self.embed(ids) + self.places(at)
        q, k, v = self.qkv(x).view(b, s, 3, 2, 16).permute(2, 0, 3, 1, 4)
        allowed = (at[None] <= at[:, None]) & ((at[:, None] - at) < 9) & padding[:, None, None]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, allowed)
        return x + self.out(mixed.transpose(1, 2).reshape(b, s, 32))


def tokens(b: int, s: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(b * 100 + s)
    ids, lengths = torch.randint(50, (b, s), generator=generator), torch.randint(1, s + 1, (b, 1), generator=generator)
    return ids, torch.arange(s) < lengths


@pytest.mark.parametrize("padding", ["keep", "skip"])
def test_lengths_that_were_never_run_on_a_machine_without_a_compiler(padding: str, tmp_path: Path) -> None:
    model = Causal().eval()
    fast = fuser.optimize(model, search="model", padding=padding)
    with torch.inference_mode():
        fast(*tokens(2, 10))
    fast.save(tmp_path / "x.fuser")
    calls = [tokens(b, s) for b, s in ((2, 11), (3, 40), (7, 64), (2, 10))]
    torch.save(calls, tmp_path / "in.pt")
    code = f"""
import torch, fuser
loaded = fuser.load({str(tmp_path / "x.fuser")!r})
torch.save([loaded(*call) for call in torch.load({str(tmp_path / "in.pt")!r})], {str(tmp_path / "out.pt")!r})
"""
    environment = {**os.environ, "FUSER_CACHE_DIR": str(tmp_path / "cache"), "CXX": "false", "PATH": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for call, got in zip(calls, torch.load(tmp_path / "out.pt"), strict=True):
        keep = call[1]
        torch.testing.assert_close(got[keep].double(), copy.deepcopy(model).double()(*call)[keep], rtol=0, atol=1e-5)
        if padding == "skip":
            assert not got[~keep].any()


def test_sizes_that_the_model_does_not_take_are_refused(tmp_path: Path) -> None:
    fast = fuser.optimize(Causal().eval(), search="model")
    with torch.inference_mode():
        fast(*tokens(2, 10))
    fast.save(tmp_path / "x.fuser")
    loaded = fuser.load(tmp_path / "x.fuser", trust="data")
    assert loaded.calls[-1] == "(int64 (batch, sequence), bool (batch, sequence))"
    with pytest.raises(IndexError, match="outside the table"):
        loaded(*tokens(2, 65))
    with pytest.raises(KernelError, match="no program was saved"):
        loaded(tokens(2, 20)[0], tokens(2, 21)[1])


def test_what_of_all_sizes_cannot_be_saved_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = tokens(2, 10)
    fast = fuser.optimize(Causal().eval(), call, search="model")
    monkeypatch.setattr(codec, "_FUNCTIONS", tuple(name for name in codec._FUNCTIONS if "pattern" not in name))
    fast.save(tmp_path / "x.fuser")
    assert any("for the shapes that they had" in record.message for record in caplog.records)
    loaded = fuser.load(tmp_path / "x.fuser")
    assert torch.equal(loaded(*call), fast(*call)) and len(loaded.calls) == 1


def test_copies(path: Path) -> None:
    loaded = fuser.load(path)
    assert torch.equal(copy.deepcopy(loaded)(X), loaded(X))
    with pytest.raises(pickle.PicklingError, match=r"fuser\.load"):
        pickle.dumps(loaded)


# ---- what can be wrong


def rewrite(
    path: Path,
    *,
    parts: Callable[[dict[str, Tensor]], None] = lambda parts: None,
    sums: bool = True,
    metadata: Mapping[str, str] = types.MappingProxyType({}),
    **manifest: Any,
) -> None:
    """Change the parts of a file, entries of its manifest or its metadata, by default with sums that fit."""
    with safetensors.safe_open(path, "pt") as file:
        content = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        found = file.metadata()
    parts(content)
    old = codec.load(found["fuser.manifest"].encode())
    listed = {name: checksum(tensor) for name, tensor in content.items()} if sums else old.parts
    text = codec.dump(dataclasses.replace(old, parts=listed, **manifest))
    found |= {"fuser.manifest": text.decode(), "fuser.sha256": hashlib.sha256(text).hexdigest(), **metadata}
    safetensors.torch.save_file(content, path, found)


def edit_programs(change: Callable[[Any], Any]) -> Callable[[dict[str, Tensor]], None]:
    """Put ``change(programs.json)`` in the place of the programs, with everything written where it stands."""

    def expanded(text: Any, shared: list[Any]) -> Any:
        if isinstance(text, list):
            return expanded(shared[text[1]], shared) if text[:1] == ["shared"] else [expanded(t, shared) for t in text]
        return {k: expanded(t, shared) for k, t in text.items()} if isinstance(text, dict) else text

    def replace(parts: dict[str, Tensor]) -> None:
        _, shared, content = json.loads(parts["programs.json"].numpy().tobytes())
        text = json.dumps(change(expanded(content, shared)))
        parts["programs.json"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    return replace


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated(path: Path, kept: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(FuserError, match=r"encoder\.fuser is damaged"):
        fuser.load(path)


def test_every_part_is_checked(path: Path) -> None:
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    places = [8 + header + sum(entry["data_offsets"]) // 2 for entry in _entries(content).values()]
    for at in [*places, *range(0, 8 + header, 997)]:
        damaged = bytearray(content)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(FuserError, match=r"encoder\.fuser"):
            fuser.load(path)


def _entries(content: bytes) -> dict[str, Any]:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def test_parts_that_do_not_match_the_manifest(path: Path) -> None:
    original = path.read_bytes()

    def other_kernel(parts: dict[str, Tensor]) -> None:
        parts[next(n for n in parts if n.startswith("kernels/"))][-1] ^= 1

    def other_weights(parts: dict[str, Tensor]) -> None:
        parts["weights/0"].view(torch.uint8)[-1] ^= 1

    def missing(parts: dict[str, Tensor]) -> None:
        del parts[next(n for n in parts if n.startswith("kernels/"))]

    def more(parts: dict[str, Tensor]) -> None:
        parts["kernels/more.so"] = torch.zeros(9, dtype=torch.uint8)

    for change in (other_kernel, other_weights, missing, more):
        path.write_bytes(original)
        rewrite(path, parts=change, sums=False)
        with pytest.raises(FuserError, match="damaged"):
            fuser.load(path)
    path.write_bytes(original)
    rewrite(path, parts=missing)
    with pytest.raises(FuserError, match=r"damaged.*lacks kernels/fuser_"):
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
    safetensors.torch.save_file({"a": X}, tmp_path / "weights.fuser")
    with pytest.raises(FuserError, match=r"not a file that.*holds no programs"):
        fuser.load(tmp_path / "weights.fuser")
    os.mkfifo(tmp_path / "pipe.fuser")
    with pytest.raises(FuserError, match=r"cannot read.*not a file"):
        fuser.load(tmp_path / "pipe.fuser")


def test_a_file_of_an_older_version_says_how_to_make_it_anew(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.fuser", "w") as archive:
        archive.writestr("manifest.json", json.dumps({"format": 1, "fuser": "0.1.0"}))
        archive.writestr("programs.pickle", b"\x80\x04N.")
    with pytest.raises(FuserError, match=r"older version of fuser.*optimize the model.*save it again"):
        fuser.load(tmp_path / "old.fuser")


def test_other_formats(path: Path) -> None:
    rewrite(path, metadata={"fuser.format": "99", "fuser.version": "9.9"})
    with pytest.raises(FuserError, match=r"format 99 \(written by fuser 9\.9\)"):
        fuser.load(path)


def test_other_machines(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cpuinfo, "cpu_flags", lambda: frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "popcnt"})
    )
    with safetensors.safe_open(path, "pt") as file:
        target = codec.load(file.metadata()["fuser.manifest"].encode()).target
    if target.arch == "avx512":
        with pytest.raises(FuserError, match=r"saved for \w+ avx512.*this CPU .*has no avx512; its best is avx2"):
            fuser.load(path)
    monkeypatch.undo()
    rewrite(path, target=dataclasses.replace(target, features=frozenset({"amx_tile_of_tomorrow"})))
    with pytest.raises(FuserError, match="has no amx_tile_of_tomorrow"):
        fuser.load(path)
    rewrite(path, machine="sparc64")
    with pytest.raises(FuserError, match="saved for sparc64"):
        fuser.load(path)


def test_with_trust_in_data_alone_kernels_are_built_anew_and_give_the_same(
    optimized: fuser.OptimizedModule, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(parts: dict[str, Tensor]) -> None:
        for name in parts:
            if name.startswith("kernels/"):
                parts[name] = torch.full((64,), 0xCC, dtype=torch.uint8)

    rewrite(path, parts=poison)
    with pytest.raises(FuserError, match="cannot load the kernel library"):
        fuser.load(path)
    loaded = fuser.load(path, trust="data")
    assert torch.equal(loaded(X), optimized(X)) and torch.equal(loaded(X[:1]), optimized(X[:1]))
    with pytest.raises(FuserError, match="'kernels' or 'data'"):
        fuser.load(path, trust="all")  # type: ignore[arg-type]


def _step(program: Any, kind: str) -> Any:
    steps = program["programs"][1]["plan"]["steps"][1:]
    return next(step for step in steps if step["is"].endswith(kind))


def _slots(program: Any) -> Any:
    return _step(program, "NativeStep")["tensors"]


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "brackets": lambda p: None,
    "a list": lambda p: [p],
    "an empty list": lambda p: [],
    "another value": lambda p: {"is": "ir.operators.base.Ref", "index": 0},
    "no programs": lambda p: {**p, "programs": ["tuple"], "captures": ["tuple"]},
    "a negative shape": lambda p: _slots(p)[1].update(shape=["tuple", -1]),
    "a shape of text": lambda p: _slots(p)[1].update(shape="12"),
    "an offset beyond the arena": lambda p: [s.update(offset=1 << 40) for s in _slots(p)[1:]],
    "a negative offset": lambda p: [s.update(offset=-64) for s in _slots(p)[1:]],
    "an input that is not there": lambda p: _slots(p)[1].update(index=99),
    "a state that is not there": lambda p: _slots(p)[1].update(memory=["enum", "runtime.program.Memory", "STATE"]),
    "more strides": lambda p: _slots(p)[1].update(strides=["tuple", 1, 1, 1, 1, 1]),
    "a negative arena": lambda p: p["programs"][1]["plan"].update(arena_bytes=-1),
    "a huge arena": lambda p: p["programs"][1]["plan"].update(arena_bytes=1 << 60),
    "no threads": lambda p: p["programs"][1]["plan"].update(threads=0),
    "no such kernel": lambda p: _step(p, "NativeStep").update(symbol="fuser_gemm_0"),
    "no constants": lambda p: p["programs"][1].update(constants=["tuple"]),
    "no such weights": lambda p: p["programs"][1]["constants"][1].update(name="none"),
    "constants of another size": lambda p: p["programs"][1]["constants"][1].update(shape=["tuple", 1 << 40]),
    "no output": lambda p: p["programs"][1].update(output={"is": "saved.outline.Plain", "value": None}),
    "a key of text": lambda p: p["programs"][1].update(key="key"),
    "an operator that writes": lambda p: p["programs"][1].update(unfused=["operator", "aten::add_", "Tensor"]),
    "a missing field": lambda p: p["programs"][1].pop("plan"),
}


@pytest.mark.parametrize("damage", HOSTILE)
def test_damage_that_no_checksum_shows_is_one_error_that_names_the_file(path: Path, damage: str) -> None:
    def change(program: Any) -> Any:
        changed = HOSTILE[damage](program)
        return changed if damage in ("a list", "an empty list", "another value", "no programs") else program

    def brackets(parts: dict[str, Tensor]) -> None:
        parts["programs.json"] = torch.frombuffer(bytearray(b"[" * 100_000), dtype=torch.uint8)

    rewrite(path, parts=brackets if damage == "brackets" else edit_programs(change))
    for trust in ("kernels", "data"):
        with pytest.raises(FuserError, match=r"encoder\.fuser"):
            fuser.load(path, trust=trust)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(st.data())
def test_whatever_happens_to_a_file_is_one_error(
    optimized: fuser.OptimizedModule, path: Path, data: st.DataObject
) -> None:
    """Or nothing has happened: a blank of safetensors' padding, say, means as much as another."""
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    at = data.draw(st.integers(0, header) | st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "drop"]))
    new = {
        "flip": content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :],
        "cut": content[:at],
        "insert": content[:at] + data.draw(st.binary(min_size=1, max_size=9)) + content[at:],
        "drop": content[:at] + content[at + data.draw(st.integers(1, 99)) :],
    }[kind]
    damaged = path.with_name("damaged.fuser")
    damaged.write_bytes(new)
    try:
        loaded = fuser.load(damaged)
    except FuserError as error:
        assert "damaged.fuser" in str(error)
    else:
        assert kind == "flip" and torch.equal(loaded(X), optimized(X))


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

    monkeypatch.setattr(writer, "write_file", full)
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
