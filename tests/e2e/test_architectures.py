"""The architectures of transformers, small, as users call them: right, without an exception, and left as they were."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuser
from fuser.architectures import ARCHITECTURES, Scale
from fuser.kernels.families import IMPLEMENTATIONS
from fuser.module import compiler
from fuser.runtime.targets import named_target
from fuser.search.partition import default_scheme

transformers = pytest.importorskip("transformers")

SCALE = Scale()
SHORTER = Scale(length=9)
ONE_LENGTH = ("whisper",)
"""Architectures that take one length only."""
TOLERANCE = 2e-5
"""Relative L2 distance from eager: rounding of fp32, through layers whose norms divide by small numbers."""
_EXPERTS = (
    *("aten::_to_copy", "aten::cumsum", "aten::empty_like", "aten::floor_divide", "aten::histc", "aten::index.Tensor"),
    *("aten::index_put", "aten::sort", "aten::topk"),
)
LEFT: Mapping[str, Collection[str]] = {
    "big-bird": ("aten::index_copy", "aten::index_select"),
    "fnet": ("aten::fft_fftn", "aten::view_as_real", "residual"),
    "mixtral": _EXPERTS,
    "qwen2-moe": _EXPERTS,
    "wav2vec2": ("_strided_copy", "aten::conv1d", "norm", "residual"),
}
"""What is left to PyTorch between the first and the last kernel of an architecture, by its kind or call: nothing of
those that are not here."""
ROTATED = (
    *("cohere", "eurobert", "falcon", "gemma", "gemma2", "gemma3", "gpt-neox", "gptj", "granite", "llama", "mistral"),
    *("mixtral", "modernbert", "nomic-bert", "olmo", "phi", "phi3", "qwen2", "qwen2-moe", "qwen3", "roformer"),
    *("stablelm", "starcoder2"),
)
"""Architectures whose queries and keys get rotary embeddings."""
DETAILED = ("albert", "bart", "bert", "distilbert", "gpt2", "llama", "modernbert", "qwen3", "t5", "vit", "whisper")
"""Architectures that are called once more with all hidden states and attention weights."""


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """All tensors of an output by where they are: in mappings, sequences, and the caches of transformers."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, Mapping):
        inner = dict(value)
    elif isinstance(value, (tuple, list)):
        inner = dict(enumerate(value))
    elif type(value).__module__.startswith("transformers."):
        inner = vars(value)
    else:
        return {}
    return {key: t for part, item in inner.items() for key, t in tensors(item, f"{name}.{part}").items()}


def agree(ours: Any, theirs: Any) -> None:
    """Same class and tensors of the same names, shapes and dtypes, finite numbers within rounding."""
    assert type(ours) is type(theirs)
    mine, eager = tensors(ours), tensors(theirs)
    assert list(mine) == list(eager) and eager
    for name, expected in eager.items():
        found = mine[name]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
        if expected.is_floating_point():
            scale = expected.double().norm()
            assert (found.double() - expected.double()).norm() <= TOLERANCE * scale, name
        else:
            assert torch.equal(found, expected), name


def left(fast: fuser.OptimizedModule) -> frozenset[str]:
    """Kinds and calls of the operators inside of the last program's blocks that no kernel for this CPU runs."""
    graph = fast.programs[-1].graph
    target = named_target("cpu")
    regions = {region.hash: region for region in graph.regions}
    groups = [group for r in regions.values() for group in default_scheme(r, IMPLEMENTATIONS, target).groups]
    found = [group.group.operators[0].kind for group in groups if group.kernel is None]
    at = [graph.position[op.name] for region in graph.regions for op in region.operators]
    inside = (op for op in graph.compute if min(at) <= graph.position[op.name] <= max(at))
    return frozenset([*found, *(str(op.semantics) for op in inside if not op.semantics.fusible)])


_OWN = ("_parameters", "_buffers", "_modules")


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a call could leave changed; what is compared by identity is kept alive."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name}: class"] = type(module)
        for key, value in vars(module).items():
            if key in _OWN:
                found[f"{name}.{key}"] = {k: _Same(v) for k, v in value.items()}
            elif isinstance(value, (dict, list, tuple, set)):
                found[f"{name}.{key}"] = (_Same(value), [_Same(v) for v in value], len(value))
                if isinstance(value, dict):
                    found[f"{name}.{key}: values"] = [_Same(v) for v in value.values()]
            else:
                found[f"{name}.{key}"] = _Same(value)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        form = (tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad, type(tensor))
        found[f"{name}: content"] = (form, tensor.detach().cpu().numpy().tobytes())
    return found


class _Same:
    """Equal to the same object, or to an equal plain value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same):
            return False
        plain = isinstance(self.value, (bool, int, float, str, bytes, type(None)))
        return self.value is other.value or (
            plain and type(self.value) is type(other.value) and self.value == other.value
        )

    __hash__ = None  # type: ignore[assignment]


def check(model: nn.Module, **call: Any) -> fuser.OptimizedModule:
    """The optimized model agrees with the model, twice, and leaves it as it was."""
    expected = model(**call)
    before = state(model)
    fast = fuser.optimize(model, search="model")
    for _ in range(2):
        agree(fast(**call), expected)
    after = state(model)
    changed = [key for key in {**before, **after} if key not in before or key not in after or before[key] != after[key]]
    assert changed == []
    agree(model(**call), expected)
    return fast


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operator of a program is PyTorch's: what is tried is capture, raising and outputs, and nothing is built."""
    monkeypatch.setattr(compiler, "IMPLEMENTATIONS", {})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_called_plainly(without_kernels: None, name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build(SCALE)
    fast = check(model, **architecture.call(SCALE))
    if name not in ONE_LENGTH:
        shorter = architecture.call(SHORTER)
        agree(fast(**shorter), model(**shorter))
    assert fast.specialized == () and fast.fallbacks == ()
    assert left(fast) <= set(LEFT.get(name, ()))
    rotations = [reason for _, reason in fast.unfused if "takes this rotary" in reason]
    assert len(rotations) == (2 * SCALE.layers if name in ROTATED else 0)


@pytest.mark.parametrize("name", DETAILED)
def test_an_architecture_with_all_of_its_outputs(without_kernels: None, name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build(SCALE)
    model.set_attn_implementation("eager")
    check(model, **architecture.call(SCALE), output_hidden_states=True, output_attentions=True)


@pytest.mark.parametrize("name", ["llama", "modernbert", "t5", "deberta-v2"])
def test_an_architecture_on_kernels_saved_and_loaded(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model, call = architecture.build(SCALE), architecture.call(SCALE)
    fast = check(model, **call)
    assert fast.kernels
    assert ("rotary" in {kernel.family for kernel in fast.kernels}) == (name in ROTATED)
    assert not any("takes this rotary" in reason for _, reason in fast.unfused)
    fast.save(tmp_path / "model.fuser")
    loaded, shorter = fuser.load(tmp_path / "model.fuser"), architecture.call(SHORTER)
    agree(loaded(**call), model(**call))
    agree(loaded(**shorter), model(**shorter))


def test_a_cache_that_is_passed_in_is_filled() -> None:
    architecture = ARCHITECTURES["llama"]
    model, call = architecture.build(SCALE), architecture.call(SCALE)
    fast = fuser.optimize(model, search="model")
    results = []
    for run in (model, fast):
        first = run(**call)
        name = next(key for key in first if key in ("cache", "past_key_values"))
        second = run(input_ids=call["input_ids"][:, :1], **{name: first[name]})
        results.append((second, first[name]))
    agree(results[1][0], results[0][0])
    assert tensors(results[1][1]).keys() == tensors(results[0][1]).keys()
    assert not fast.fallbacks


def test_an_optimized_causal_model_generates_what_the_model_does() -> None:
    architecture = ARCHITECTURES["llama"]
    model, call = architecture.build(SCALE), architecture.call(SCALE)
    ids = call["input_ids"]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    assert torch.equal(fuser.optimize(model, search="model").generate(ids, **settings), expected)
