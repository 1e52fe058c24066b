"""Weights that change, move, are shared, replaced, parametrized or kept in files: programs follow them."""

from __future__ import annotations

import copy
import errno
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fuser
from fuser.module import weights
from fuser.module.optimized import OptimizedModule

WIDTH = 256
X = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1))
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 3e-2, torch.float16: 3e-3}


class Block(nn.Module):
    """A residual block whose weights are large enough to be kept in files."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(F.gelu(self.up(x))))


def optimized(model: nn.Module) -> OptimizedModule:
    fast = fuser.optimize(model.eval(), search="model")
    with torch.no_grad():
        fast(X)
    assert len(fast.programs) == 1
    return fast


def agree(model: nn.Module, fast: Callable[..., Any], x: Tensor = X) -> bool:
    """Whether both compute the same as the model in float64, within the rounding of the model's dtype."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        ours = fast(x)
        return ours.dtype == x.dtype and bool((ours.double() - exact).norm() <= TOLERANCE[x.dtype] * exact.norm())


@pytest.fixture
def block() -> tuple[Block, OptimizedModule]:
    model = Block()
    return model, optimized(model)


Change = Callable[[Any], object]


@torch.no_grad()
def in_place(model: Block) -> None:
    model.up.weight.mul_(1.5)


def load(model: Block) -> None:
    model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()})


def assign(model: Block) -> None:
    model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()}, assign=True)


def new_parameter(model: Block) -> None:
    model.up.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 16)


def new_module(model: Block) -> None:
    model.up = nn.Linear(WIDTH, WIDTH).eval()


def new_kind_of_module(model: Block) -> None:
    model.norm = nn.RMSNorm(WIDTH).eval()


def no_bias(model: Block) -> None:
    model.up.bias = None


def new_data(model: Block) -> None:
    model.up.weight.data = torch.randn(WIDTH, WIDTH) / 16


def parametrized(model: Block) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(model.up, "weight", Doubled().eval())


def trained(model: Block) -> None:
    model(X).square().sum().backward()
    torch.optim.Adam(model.parameters(), 1e-2).step()


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        load,
        assign,
        new_parameter,
        new_module,
        new_kind_of_module,
        no_bias,
        new_data,
        parametrized,
        trained,
    ],
)
def test_a_change_is_followed(block: tuple[Block, OptimizedModule], change: Change) -> None:
    model, fast = block
    with torch.no_grad():
        before = fast(X)
    change(model)
    assert agree(model, fast)
    assert not torch.allclose(fast(X), before)
    assert fast.fallbacks == ()


@pytest.mark.parametrize("change", [load, new_parameter, new_module])
def test_a_change_through_the_optimized_module_is_one_of_the_model(
    block: tuple[Block, OptimizedModule], change: Change
) -> None:
    model, fast = block
    change(fast)
    assert agree(model, fast)


def test_attributes_are_those_of_the_model() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True), 1).eval()
    fast = fuser.optimize(model, search="model")
    assert fast.norm is None
    # An attribute that was no module becomes one.
    fast.norm = nn.LayerNorm(WIDTH).eval()
    assert isinstance(model.norm, nn.LayerNorm)
    assert agree(model, fast)
    fast.register_buffer("extra", torch.ones(3))
    fast.label = "mine"
    assert model.extra is fast.extra and model.label == fast.label == "mine"
    del fast.label
    assert not hasattr(model, "label") and not hasattr(fast, "label")
    assert list(fast.state_dict()) == list(model.state_dict())
    assert fast.fallbacks == ()


@pytest.mark.parametrize("name", ["_options", "_target", "_store", "_lock", "_programs", "programs", "kernels"])
def test_members_may_have_the_names_of_our_attributes(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(getattr(self, name)(x))

    model = Model()
    keys = list(model.state_dict())
    fast = optimized(model)
    assert agree(model, fast)
    setattr(model, name, nn.Linear(WIDTH, WIDTH).eval())
    assert agree(model, fast)
    fast.refresh()
    assert agree(model, fast) and list(fast.state_dict()) == list(model.state_dict()) == keys
    assert fast.fallbacks == ()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_fused_optimizers_are_followed(
    block: tuple[Block, OptimizedModule], optimizer: type[torch.optim.Optimizer]
) -> None:
    model, fast = block
    (model(X) * torch.randn(WIDTH)).sum().backward()
    before = model.up.weight.detach().clone()
    optimizer(model.parameters(), lr=1e-2, fused=True).step()  # type: ignore[call-arg]
    assert not torch.equal(model.up.weight, before) and agree(model, fast)


def test_weights_of_modules_in_a_list_are_followed() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = [nn.Linear(WIDTH, WIDTH)]

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.members[0](x))

    model = Hidden()
    fast = optimized(model)
    with torch.no_grad():
        model.members[0].weight.mul_(2)
        exact = copy.deepcopy(model.members[0]).double()(X.double())
        torch.testing.assert_close(fast(X).double(), F.gelu(exact), rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_followed_there_and_back(block: tuple[Block, OptimizedModule], dtype: torch.dtype) -> None:
    model, fast = block
    model.to(dtype)
    assert agree(model, fast, X.to(dtype))
    fast.to(torch.float32)
    assert agree(model, fast)


def test_a_model_on_another_device_is_not_run_by_kernels(block: tuple[Block, OptimizedModule]) -> None:
    model, fast = block
    model.to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        model(X)
    with pytest.raises(RuntimeError, match="meta"):
        fast(X)


def test_what_pytorch_keeps_no_record_of_needs_a_refresh(block: tuple[Block, OptimizedModule]) -> None:
    model, fast = block
    model.up.weight.data.mul_(3)
    fast.refresh()
    assert agree(model, fast)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(300, WIDTH)
        self.head = nn.Linear(WIDTH, 300, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding((x.sum(-1).abs() * 3).long()))


@pytest.mark.parametrize("name", ["embedding", "head"])
def test_tied_weights_are_followed_at_both_ends(name: str) -> None:
    model = Tied()
    fast = optimized(model)
    with torch.no_grad():
        model.embedding.weight.mul_(2)
    assert agree(model, fast)
    getattr(model, name).weight = nn.Parameter(torch.randn(300, WIDTH))
    assert agree(model, fast)
    with torch.no_grad():
        model.head.weight.add_(1)
    assert agree(model, fast)


class Decided(nn.Module):
    """Values that end up in the graph itself: a scale, a mask, and constants that are no buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("mask", torch.ones(8, 8, dtype=torch.bool).tril())
        self.factor, self.shift = torch.tensor(3.0), torch.randn(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = x[:, None]
        y = F.scaled_dot_product_attention(self.linear(x)[:, None], heads, heads, self.mask)
        return y[:, 0] * self.scale * self.factor + self.shift


@pytest.mark.parametrize("name", ["scale", "mask", "factor", "shift"])
def test_values_that_made_the_graph_are_followed(name: str) -> None:
    model = Decided()
    fast = optimized(model)
    with torch.no_grad():
        getattr(model, name).fill_(1)
    assert agree(model, fast)
    value = getattr(model, name)
    torch.manual_seed(3)
    new = torch.rand(8, 8) > 0.3 if name == "mask" else torch.randn(value.shape)
    if name == "mask":
        new.fill_diagonal_(True)
    setattr(model, name, nn.Parameter(new) if name == "scale" else new)
    assert agree(model, fast)
    assert fast.fallbacks == ()


@pytest.mark.parametrize("make", [parametrizations.weight_norm, parametrizations.orthogonal, nn.utils.weight_norm])
def test_weights_that_are_computed(make: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make(nn.Linear(WIDTH, WIDTH)), nn.ReLU()).eval()
    fast = fuser.optimize(model, search="model")
    for _ in range(2):
        with torch.no_grad():
            assert torch.allclose(fast(X), model(X), atol=1e-5)
            for parameter in model.parameters():
                parameter.mul_(1.1)


# ---- modes


class Distances(Block):
    """One operator of PyTorch's reads weights with other strides than theirs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cdist(x, self.up.weight.t()))


def test_weights_that_are_laid_out_anew(tmp_path: Path) -> None:
    model = Distances().eval()
    fast = optimized(model)
    assert agree(model, fast)
    fast.save(tmp_path / "model.fuser")
    assert agree(model, fuser.load(tmp_path / "model.fuser"))
    in_place(model)
    assert agree(model, fast)


def test_a_model_compiled_in_inference_mode_can_be_trained_afterwards() -> None:
    model = Block().eval()
    fast = fuser.optimize(model, search="model")
    with torch.inference_mode():
        fast(X)
    assert fast._engine.store.offloaded_bytes > 0
    assert agree(model, fast)
    trained(model)
    assert agree(model, fast)


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = Block()
        fast = optimized(model)
        out = fast(X)
    with torch.no_grad():
        assert torch.allclose(fast(X), model(X), atol=1e-5)
        assert torch.equal(fast(X), out)


def test_a_layer_in_training_mode_trains() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)).eval()
    fast = optimized(model)
    model[1].train()
    with torch.no_grad():
        assert not torch.equal(fast(X), fast(X))
        model.eval()
        assert torch.equal(fast(X), fast(X))


# ---- copies


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda fast: pickle.loads(pickle.dumps(fast)),
        lambda fast: torch.load(_saved(fast), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_have_weights_of_their_own(
    block: tuple[Block, OptimizedModule], duplicate: Callable[[OptimizedModule], OptimizedModule]
) -> None:
    model, fast = block
    other = duplicate(fast)
    assert agree(model, other)
    in_place(model)
    assert agree(model, fast)
    assert not agree(model, other)


def _saved(fast: OptimizedModule) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    return buffer


# ---- originals in files


def resident_and_mapped(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_originals_in_files_are_what_they_were() -> None:
    model = Block().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    identities = [id(p) for p in model.parameters()]
    with torch.no_grad():
        expected = model(X)
    fast = optimized(model)
    assert fast._engine.store.offloaded_bytes == 2 * WIDTH * WIDTH * 4
    assert [id(p) for p in model.parameters()] == identities
    resident_and_mapped(model, before)
    with torch.no_grad():
        assert torch.equal(model(X), expected)
        # Writes to them stay private, and count.
        model.up.weight.add_(1)
    assert torch.equal(model.up.weight, before["up.weight"] + 1)
    assert agree(model, fast)
    clone = copy.deepcopy(model)
    assert torch.equal(clone.up.weight, model.up.weight)
    fast.restore()
    assert fast._engine.store.offloaded_bytes == 0
    resident_and_mapped(model, {**before, "up.weight": before["up.weight"] + 1})
    assert agree(model, fast)


def test_a_full_disk_leaves_the_originals_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensor: Tensor, folder: object) -> Tensor:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "_file_backed", full)
    model = Block()
    fast = optimized(model)
    assert fast._engine.store.offloaded_bytes == 0
    assert "No space left" in fast._engine.store.offload_error
    assert agree(model, fast)


def test_memory_that_others_see_stays_where_it_is() -> None:
    model = Block()
    view = model.up.weight.detach()[:3]
    model.down.weight.data = model.up.weight.data
    fast = optimized(model)
    with torch.no_grad():
        model.up.weight.fill_(0.001)
    assert bool((view == 0.001).all())
    assert bool((model.down.weight == 0.001).all())
    assert agree(model, fast)


def test_memory_shared_between_processes_stays_shared() -> None:
    model = Block()
    model.share_memory()
    optimized(model)
    assert all(parameter.is_shared() for parameter in model.parameters())


# ---- many programs


def test_shapes_share_packed_weights(block: tuple[Block, OptimizedModule]) -> None:
    _, fast = block
    made = fast._engine.store.made_bytes
    with torch.no_grad():
        fast(X[:1])
    assert len(fast.programs) == 2
    assert fast._engine.store.made_bytes == made


def test_old_programs_and_what_only_they_use_are_forgotten(
    block: tuple[Block, OptimizedModule],
) -> None:
    model, fast = block
    fast._engine.programs.places = 2
    made, watched = fast._engine.store.made_bytes, len(fast._engine.store._contents.tensors)
    with torch.no_grad():
        for length in (1, 2, 8, 3):
            assert agree(model, fast, X[:, :length])
    kept = {compiled.assembly.plan.inputs[0].shape[1] for compiled in fast.programs}
    assert kept == {8, 3}
    assert fast._engine.store.made_bytes == made
    assert len(fast._engine.store._contents.tensors) == watched
    in_place(model)
    for length in (1, 8, 3):
        assert agree(model, fast, X[:, :length])


class Adapted(Block):
    """A block that adds what its adapters give, of which it has none at first."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        for adapter in self.adapters:
            out = out + adapter(x)
        return out


def test_adapters_that_are_added_later() -> None:
    model = Adapted()
    fast = optimized(model)
    model.adapters.append(nn.Linear(WIDTH, WIDTH))
    assert agree(model, fast)


def test_hooks_that_are_added_and_removed_later(block: tuple[Block, OptimizedModule]) -> None:
    model, fast = block
    before = fast(X)
    handle = model.up.register_forward_hook(lambda module, args, output: 2.0 * output)
    assert agree(model, fast) and not torch.allclose(fast(X), before, atol=1e-2)
    handle.remove()
    assert agree(model, fast) and torch.allclose(fast(X), before, atol=1e-5)
