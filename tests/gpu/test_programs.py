"""Models and kernels on a GPU: right answers, streams, CUDA graphs, several devices, errors."""

from __future__ import annotations

import copy
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuser
from fuser.ir.errors import DeviceMemoryError
from fuser.ir.score_quantization import ScoreQuantization
from fuser.runtime.cuda import gpu_target
from fuser.runtime.cuda_program import CudaProgram

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
VOCABULARY = 1000


def bert(dtype: torch.dtype, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.BertModel(transformers.BertConfig(vocab_size=VOCABULARY, **SIZES))
    return model.eval().to(dtype).to(device)


def gpt2(dtype: torch.dtype, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=256, n_layer=2, n_head=4, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    model: nn.Module = transformers.GPT2Model(config)
    return model.eval().to(dtype).to(device)


def ids(device: torch.device, batch: int = 2, length: int = 128, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator).to(device)


def hidden(output: Any) -> Tensor:
    tensor: Tensor = output[0]
    return tensor


def programs(module: fuser.OptimizedModule) -> list[CudaProgram]:
    found = [c.program for c in module.programs]
    assert all(isinstance(p, CudaProgram) for p in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [bert, gpt2])
def test_models(make: Any, dtype: torch.dtype, device: torch.device) -> None:
    model = make(dtype, device)
    exact, fast = copy.deepcopy(model).double(), fuser.optimize(model)
    with torch.no_grad():
        for length in (128, 61):
            x = ids(device, length=length)
            truth, eager = hidden(exact(x)), hidden(model(x)).double()
            for _ in range(3):  # launched, captured, replayed
                ours = hidden(fast(x)).double()
                assert float((ours - truth).norm()) <= 2 * float((eager - truth).norm()) + 1e-6 * float(truth.norm())
    assert fast.unfused == () and fast.fallbacks == ()
    assert all(p.graph_error == "" for p in programs(fast))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "how",
    [fuser.Int8Attention(), fuser.DEQ(), fuser.Sanger(), fuser.DEQ.from_config("adamax_nb80")],
    ids=lambda how: type(how).__name__,
)
def test_attention_of_few_bits(how: ScoreQuantization, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 1500, 64, generator=generator).to(dtype) for heads in (4, 2, 2))
    mask = fuser.masks.Longformer(200, 8)
    out = fuser.sparse_attention(*(t.to(device) for t in (q, k, v)), mask, quantize=how)
    added = torch.zeros(1500, 1500).masked_fill(~mask.dense(1500), -math.inf)
    want, _ = how.reference(q, k, v, additive_mask=added)
    rounding = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.cpu(), want, rtol=0, atol=rounding)


def test_replays_take_new_inputs_and_give_results_of_their_own(device: torch.device) -> None:
    model = bert(torch.float16, device)
    fast, plain = fuser.optimize(model), fuser.optimize(model, cuda_graphs=False)
    with torch.no_grad():
        kept = [(hidden(fast(ids(device, seed=i))), hidden(plain(ids(device, seed=i)))) for i in range(5)]
    assert all(torch.equal(a, b) for a, b in kept)
    assert programs(fast)[0]._graph is not None and programs(plain)[0]._graph is None


def test_new_weights(device: torch.device) -> None:
    model = bert(torch.float32, device)
    fast = fuser.optimize(model)
    with torch.no_grad():
        for _ in range(3):
            fast(ids(device))
        for parameter in model.parameters():
            parameter.mul_(1.1)
        assert torch.allclose(hidden(fast(ids(device))), hidden(model(ids(device))), atol=1e-3)


def test_streams_and_threads(device: torch.device) -> None:
    model = bert(torch.float16, device)
    fast = fuser.optimize(model, (ids(device),))
    with torch.no_grad():
        expected = [hidden(fast(ids(device, seed=i))) for i in range(4)]
    torch.cuda.synchronize()
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        stream = torch.cuda.Stream(device)
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(10):
                found[i] = hidden(fast(ids(device, seed=i)))
            stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(4))


def test_inside_of_a_capture(device: torch.device) -> None:
    model = bert(torch.float16, device)
    fast, x = fuser.optimize(model), ids(device)
    with torch.no_grad():
        expected = hidden(fast(x))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = hidden(fast(x))
        # More memory for other work must not take the graph's.
        large = ids(device, batch=16)
        assert torch.allclose(hidden(fast(large)), hidden(model(large)), atol=2e-2)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_an_index_outside_its_table(device: torch.device) -> None:
    fast = fuser.optimize(bert(torch.float16, device))
    with torch.no_grad():
        for _ in range(2):
            good = hidden(fast(ids(device)))
            wrong = ids(device)
            wrong[1, 5] = VOCABULARY
            assert hidden(fast(wrong))[1].isnan().any()
            torch.cuda.synchronize()
            with pytest.raises(IndexError, match="earlier call"):
                fast(ids(device))
            assert torch.equal(hidden(fast(ids(device))), good)


def test_a_device_that_is_not_current(device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    other = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    model = bert(torch.float16, other)
    fast = fuser.optimize(model)
    with torch.no_grad(), torch.cuda.device(device):
        for _ in range(3):
            assert hidden(fast(ids(other))).device == other
            assert torch.cuda.current_device() == device.index
        assert torch.allclose(hidden(fast(ids(other))), hidden(model(ids(other))), atol=2e-2)


def test_without_memory_the_error_is_clean(device: torch.device) -> None:
    model = bert(torch.float16, device)
    fast = fuser.optimize(model)
    with torch.no_grad():
        expected = hidden(fast(ids(device)))
        torch.cuda.synchronize()
        free = torch.cuda.mem_get_info(device)[0]
        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_reserved(device) + (64 << 20)) / torch.cuda.get_device_properties(device).total_memory
        )
        try:
            with pytest.raises((DeviceMemoryError, torch.OutOfMemoryError)):
                fast(ids(device, batch=max(int(free >> 24), 4096), length=512))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert torch.equal(hidden(fast(ids(device))), expected)


def test_saved_programs(device: torch.device, tmp_path: Path) -> None:
    model = bert(torch.float16, device)
    fast = fuser.optimize(model, (ids(device),))
    fast.save(tmp_path / "model.fuser")
    loaded = fuser.load(tmp_path / "model.fuser")
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(hidden(loaded(ids(device))), hidden(fast(ids(device))))


def test_misaligned_inputs(device: torch.device) -> None:
    model = nn.Sequential(nn.LayerNorm(83), nn.GELU()).eval().half().to(device)
    fast = fuser.optimize(model)
    room = torch.randn(5 * 83 + 1, device=device).half()
    with torch.no_grad():
        x = room[1:].view(5, 83)
        assert torch.allclose(fast(x), model(x), atol=1e-2)


def test_more_elements_than_an_int_counts(device: torch.device) -> None:
    if torch.cuda.mem_get_info(device)[0] < 20 << 30:
        pytest.skip("less than 20 GiB of memory are free")
    fast = fuser.optimize(nn.Sequential(nn.GELU(), nn.ReLU()).eval())
    x = torch.randn(1 << 21, 1030, device=device, dtype=torch.float16)
    with torch.no_grad():
        out = fast(x)
    assert x.numel() > 2**31 and torch.allclose(out[-1], torch.relu(torch.nn.functional.gelu(x[-1])), atol=1e-2)


def test_the_target_is_measured(device: torch.device) -> None:
    target = gpu_target(device)
    known = torch.cuda.get_device_properties(device)
    assert target.cores == known.multi_processor_count
    assert 1e11 < target.bandwidth < 2e13 and target.tensor_flops > target.peak_flops > 0
