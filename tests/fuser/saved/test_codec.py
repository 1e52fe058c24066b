"""Values as data: every type that may be saved comes back as it was, and nothing else comes in."""

from __future__ import annotations

import ast
import collections
import dataclasses
import enum
import importlib
import json
import math
import pkgutil
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuser import masks
from fuser.frontend.sizes import Guard
from fuser.ir.int8_attention import Int8Attention
from fuser.ir.masks import Mask
from fuser.ir.operators import Ref, TorchCall
from fuser.ir.prediction import DEQ, Prediction, Sanger
from fuser.ir.scheme import Scheme
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.scores import ScoreRule, SoftCap
from fuser.ir.size import Name, Size
from fuser.kernels.base import DType, Layout
from fuser.kernels.gemm import PanelLayout, PrepackedLinear
from fuser.kernels.gemm_cuda import RowLayout
from fuser.saved import codec
from fuser.saved.outline import Outline, outline_of


def _modules() -> Iterator[Any]:
    for root in codec._ROOTS:
        module = importlib.import_module(f"fuser.{root}")
        yield module
        for found in pkgutil.walk_packages(getattr(module, "__path__", ()), f"fuser.{root}."):
            yield importlib.import_module(found.name)


def _holds_graph(cls: type) -> bool:
    """Whether a class is of the compiler's inside: no program has such values."""
    return dataclasses.is_dataclass(cls) and any(
        word in str(field.type)
        for field in dataclasses.fields(cls)
        for word in ("Group", "Graph", "Region", "Match", "Kernel]", "Operator", "Kind")
    )


CLASSES = sorted(
    {
        found
        for module in _modules()
        for found in vars(module).values()
        if codec.is_saved(found)
        and found.__module__ == module.__name__
        and not getattr(found, "__abstractmethods__", None)
        and not issubclass(found, (Mask, Scheme))
        and not _holds_graph(found)
        and found.__name__ not in ("OperatorGraph", "Operator", "_Unit", "Unfused", "Guard", "Evaluation")
    },
    key=lambda cls: (cls.__module__, cls.__qualname__),
)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.builds(Ref, st.integers()),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.lists(inner, max_size=3),
    max_leaves=4,
)
MASKS = [
    masks.Dense(),
    masks.Causal(),
    masks.Causal() & masks.SlidingWindow(4, 2),
    ~masks.Strided(3) | masks.Fixed(2),
    masks.per_head([masks.Causal(), masks.BigBird(4, 1, 1, 1, 0)]),
    masks.from_dense(torch.eye(5, dtype=torch.bool)),
    masks.Dilated(3, 2).shift(7),
    masks.Longformer(4, 1),
]

CALLS = st.sampled_from(
    [
        TorchCall(torch.ops.aten.cat.default, ([Ref(0), Ref(1)], -1)),
        TorchCall(torch.clone, (Ref(0),)),
        PrepackedLinear(True, False),
    ]
)
PREDICTIONS = st.sampled_from(
    [DEQ(), DEQ.from_config("adamax_nb80"), Sanger(calibration="static", thresholds=(0.5, 0.5))]
)
ROOT = Path(__file__).parents[3]
CALLING = ("decided", "assumed", "evaluated", "TorchCall")
LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    Any: PLAIN,
    int: st.integers(-3, 64),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=4),
    bool: st.booleans(),
    type(None): st.none(),
    torch.dtype: st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    # Those that are small are tested by themselves: a value that holds one has no equality.
    torch.Tensor: st.nothing(),
    Guard: st.nothing(),
    Mask: st.sampled_from(MASKS),
    Size: st.sampled_from([Size({(Name("S"),): 3, (): 1})]),
    np.ndarray: st.lists(st.integers(0, 9), max_size=3).map(lambda x: np.array(x, np.int32)),
    collections.abc.Callable: CALLS,
    ScoreRule: st.just(SoftCap(30.0)),
    ScoreQuantization: PREDICTIONS | st.builds(Int8Attention, st.booleans(), st.floats(0, 0.5)),
    Prediction: PREDICTIONS,
    DEQ: PREDICTIONS.filter(lambda p: isinstance(p, DEQ)),
    Sanger: PREDICTIONS.filter(lambda p: isinstance(p, Sanger)),
    Layout: st.sampled_from([PanelLayout(8, True, DType.F32, False), RowLayout(False, DType.BF16)]),
    Outline: st.sampled_from([outline_of((torch.ones(1), "text", {"a": None})), outline_of(torch.ones(1))]),
}


def _of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(_of, args))
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(_of(args[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*map(_of, args))
    if origin is collections.abc.Sequence:
        return st.lists(_of(args[0]), max_size=2).map(tuple)
    if origin is frozenset:
        return st.frozensets(_of(args[0]), max_size=2)
    if origin is not None and issubclass(origin, collections.abc.Mapping):
        return st.dictionaries(_of(args[0]), _of(args[1]), max_size=2)
    if (found := LEAVES.get(hint, LEAVES.get(origin))) is not None:
        return found
    if issubclass(hint, enum.Enum):
        return st.sampled_from(hint)
    return _strategy(hint)


def _strategy(cls: type) -> st.SearchStrategy[Any]:
    parts = {name: _of(hint) for name, hint in codec._hints(cls).items()}

    def make(values: dict[str, Any]) -> Any:
        try:
            return cls(**values)
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
            return None

    return st.fixed_dictionaries(parts).map(make).filter(lambda value: value is not None)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.__module__.removeprefix('fuser.')}.{cls.__qualname__}")
def test_every_type_comes_back_as_it_was(cls: type) -> None:
    assert codec.type_of(codec._name(cls)) is cls
    if issubclass(cls, enum.Enum):
        assert [codec.load(codec.dump(member)) for member in cls] == list(cls)
        return

    @settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(_of(cls))
    def check(value: Any) -> None:
        text = codec.dump(value)
        back = codec.load(text)
        assert type(back) is cls and codec.dump(back) == text

    check()


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.name)
def test_masks_come_back_equal(mask: Mask) -> None:
    assert codec.load(codec.dump(mask)) == mask


def test_what_several_values_share_is_written_once_and_shared_again() -> None:
    part = Ref(3)
    text = codec.dump((part, [part, Ref(4)]))
    assert text.count(b"ir.operators.base.Ref") == 2
    first, (second, other) = codec.load(text)
    assert first is second and (first, other) == (Ref(3), Ref(4))
    with pytest.raises(IndexError):
        codec.load(b'["sharing",[],["shared",0]]')
    with pytest.raises(IndexError):
        codec.load(b'["sharing",[1],["shared",-1]]')


def test_plain_values_come_back_equal() -> None:
    value = {
        "numbers": (1, -(1 << 70), 0.1, math.inf, -0.0, 2 + 3j, True, None),
        "torch": [torch.bfloat16, torch.device("cuda:1"), torch.strided, torch.channels_last, torch.Size([2, 3])],
        ("key", 3): frozenset({"a", "b"}),
        "types": (int, float, type(None), torch.dtype),
        "operators": (torch.ops.aten.add.Tensor, torch.cat, DType.F32),
    }
    back = codec.load(codec.dump(value))
    assert back == value and str(back["numbers"]) == str(value["numbers"])
    assert math.isnan(codec.load(codec.dump(math.nan)))
    array = np.arange(6, dtype=np.int16).reshape(2, 3).T
    assert np.array_equal(codec.load(codec.dump(array)), array)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_small_tensors(dtype: torch.dtype) -> None:
    for tensor in (torch.tensor(3.0), torch.arange(6.0).reshape(2, 3).T, torch.empty(0, 2)):
        tensor = tensor.to(dtype)
        read = codec.load(codec.dump(tensor))
        assert read.dtype == dtype and torch.equal(read, tensor)
    for other in (torch.zeros(1 << 15, 3), torch.zeros(2, device="meta"), torch.eye(2).to_sparse()):
        with pytest.raises(TypeError, match="no plain data"):
            codec.dump(other)


@pytest.mark.parametrize(
    "text",
    [
        '["tensor", ["dtype", "float32"], [2], ["array", "|u1", [4], "AAAAAA=="]]',
        '["tensor", ["dtype", "float32"], [1], ["array", "<i4", [1], "AAAAAA=="]]',
        '["tensor", 3, [1], ["array", "|u1", [4], "AAAAAA=="]]',
    ],
)
def test_what_is_no_tensor(text: str) -> None:
    with pytest.raises((TypeError, RuntimeError)):
        codec.load(text.encode())


@pytest.mark.parametrize(
    "value",
    [
        print,
        eval,
        object(),
        lambda: 0,
        {1, 2},
        torch.zeros(1 << 15),
        torch.nn.Linear(1, 1),
        torch.load,
        Any,
        dataclasses,
    ],
)
def test_what_is_no_plain_data_is_not_written(value: Any) -> None:
    with pytest.raises(TypeError):
        codec.dump(value)


@pytest.mark.parametrize(
    "text",
    [
        *("1.5", "NaN", "[]", "{}", "[1]", '["eval", "1"]', '["tuple", 1.5]', '["list"', "[" * 100_000, '{"is": 3}'),
        *(
            '{"is": "os.system"}',
            '{"is": "ir.errors.FuserError"}',
            '{"is": "ir.operators.base.Ref"}',
            '{"is": "ir.operators.base.dataclass"}',
        ),
        *('{"is": "ir.operators.base.Ref", "index": "0"}', '{"is": "ir.operators.base.Ref", "index": 0, "more": 1}'),
        *('{"is": "ir..operators.Ref", "index": 0}', '{"is": "runtime.build.Source", "symbol": "a", "text": "b"}'),
        *(
            '["enum", "kernels.base.DType", "F31"]',
            '["enum", "ir.operators.base.Ref", "index"]',
            '["enum", "enum.Enum", "a"]',
        ),
        *('["operator", "aten::add_", "Tensor"]', '["operator", "aten::from_file", "default"]'),
        *(
            '["operator", "aten::add", "out"]',
            '["operator", "prims::add", "default"]',
            '["operator", "aten::name", ""]',
        ),
        *('["torch", "load"]', '["torch", "from_file"]', '["torch", "set_num_threads"]', '["torch", "hub"]'),
        *('["function", "os.system"]', '["function", "fuser.saved.load"]', '["dtype", "float33"]', '["dtype", "load"]'),
        *(
            '["type", "Module"]',
            '["array", "|O8", ["list"], ""]',
            '["array", "<i4", [-1], "AAAA"]',
            '["device", "disk"]',
        ),
        *('["structure", 3]', '["float", "one"]', '["complex", "0x1p0"]', '["dict", [["list"], 1]]', '["dict", 1]'),
    ],
    ids=lambda text: text[:60],
)
def test_nothing_else_is_read(text: str) -> None:
    with pytest.raises((ValueError, TypeError, LookupError, AttributeError, RuntimeError)):
        codec.load(text.encode())


# ---- structures


@dataclasses.dataclass
class Result:
    hidden: Any
    more: Any = None
    made: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.made.append("by its constructor")


class Pair(NamedTuple):
    first: Any
    second: Any


def test_structures_come_back_and_take_other_tensors() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    value = {"x": [a, (1, "text")], "y": collections.OrderedDict(z=Pair(b, None)), 3: Result(c, 0.5)}
    outline = codec.load(codec.dump(outline_of(value)))
    assert outline.check() == {0, 1, 2}
    back = outline.fill([c, a, b])
    assert back["x"][0] is c and back["x"][1] == (1, "text") and list(back) == ["x", "y", 3]
    assert type(back["y"]) is collections.OrderedDict and type(back["y"]["z"]) is Pair and back["y"]["z"].first is a
    assert type(back[3]) is Result and back[3].hidden is b and back[3].more == 0.5


def test_the_constructors_of_a_dataclass_are_not_run() -> None:
    value = Result(torch.ones(1))
    back = codec.load(codec.dump(outline_of(value))).fill([torch.zeros(1)])
    assert back.made == value.made == ["by its constructor"]


def test_pytree_structures_come_back_equal() -> None:
    value = ((torch.ones(1), {"a": [1, None]}), {"mask": Pair(1, 2)})
    spec = pytree.tree_structure(value)
    assert codec.load(codec.dump((spec, "key"))) == (spec, "key")


def test_outputs_of_transformers_come_back() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    value = outputs.BaseModelOutputWithPast(
        last_hidden_state=torch.ones(2), hidden_states=(torch.ones(3), torch.ones(4))
    )
    back = codec.load(codec.dump(outline_of(value))).fill([torch.zeros(2), torch.zeros(3), torch.zeros(4)])
    assert type(back) is type(value) and back.hidden_states[1].shape == (4,) and list(back) == list(value)
    assert back["last_hidden_state"] is back.last_hidden_state and back.past_key_values is None


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("subprocess", "Popen"),
        ("os", "system"),
        ("no_such_module", "A"),
        ("transformers.no_such", "A"),
        ("antigravity", "A"),
    ],
)
def test_classes_of_other_kinds_or_modules_that_nobody_imported_are_refused(module: str, name: str) -> None:
    head = {"items": ["tuple"], "module": module, "name": name}
    for kind, more in (("Record", {"fields": ["tuple"]}), ("NamedTuple", {}), ("Node", {"context": None})):
        outline = codec.load(json.dumps({"is": f"saved.outline.{kind}", **head, **more}).encode())
        with pytest.raises(TypeError):
            outline.check()
    assert "antigravity" not in sys.modules


def _defined(module: str, name: str) -> str:
    """Where what a module has by this name is defined."""
    found = getattr(importlib.import_module(module), name)
    return f"{found.__module__}.{found.__qualname__}"


def test_functions_that_programs_call_are_saved() -> None:
    """Those that the frontend hands to what decides, assumes and computes when sizes are known, or that it has PyTorch
    run."""
    found = set()
    for path in sorted((ROOT / "fuser").glob("frontend/**/*.py")):
        tree, module = ast.parse(path.read_text()), ".".join(path.relative_to(ROOT).with_suffix("").parts)
        own = {node.name: module for node in tree.body if isinstance(node, ast.FunctionDef)}
        taken = [
            node for node in tree.body if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fuser.")
        ]
        own |= {alias.name: str(node.module) for node in taken for alias in node.names}
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and call.args and ast.unparse(call.func).split(".")[-1] in CALLING:
                names = [node.id for node in ast.walk(call.args[0]) if isinstance(node, ast.Name)]
                found |= {_defined(own[name], name) for name in names if name in own}
    assert len(found) > 5 and found <= set(codec._FUNCTIONS)
