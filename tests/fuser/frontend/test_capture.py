"""From models to graphs."""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import gc
import io
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fuser
from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import StateError, capture, prepare
from fuser.frontend.exporting import EXPORTING, is_capturing
from fuser.frontend.output_structure import flatten_output
from fuser.ir.errors import CaptureError

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("shift", torch.ones(8))
        self.factor = torch.tensor(2.0)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        y = self.linear(x)
        y.add_(self.shift)
        return {"y": y * self.factor * scale, "scale": scale}


def test_a_graph_is_over_the_live_tensors_and_the_flat_inputs() -> None:
    model = Layer().eval()
    captured = capture(model, flatten_call((X,), {"scale": 3.0}))
    live = {id(model.linear.weight), id(model.linear.bias), id(model.shift), id(model.factor)}
    assert {id(t) for t in captured.parameters.values()} == live
    assert len(captured.inputs) == 1
    flat = captured.graph(*captured.parameters.values(), X)
    assert pytree.tree_all(lambda t: isinstance(t, Tensor), list(flat))
    built = captured.output.build(flat)
    expected = model(X, 3.0)
    assert built["scale"] == 3.0
    assert torch.allclose(built["y"], expected["y"])
    assert not any(n.target is torch.ops.aten.add_.Tensor for n in captured.graph.graph.nodes)


class Changing(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.linear = nn.Linear(8, 8)
        self.register_buffer("buffer", torch.zeros(8))
        self.plain, self.number, self.items = torch.zeros(8), 0, []

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "buffer":
            self.buffer.add_(1)
        elif self.what == "plain":
            self.plain.add_(1)
        elif self.what == "number":
            self.number += 1
        elif self.what == "items":
            self.items.append(x)
        elif self.what == "new":
            self.attribute = x
        return self.linear(x) + self.buffer + self.plain


@pytest.mark.parametrize("what", ["buffer", "plain", "number", "items", "new"])
def test_models_that_change_something_are_refused_and_left_as_they_were(what: str) -> None:
    model = Changing(what).eval()
    x = X.clone()
    before, attributes = copy.deepcopy(model.state_dict()), set(vars(model))
    with pytest.raises(CaptureError, match=r"changes (its attribute )?.*while it runs") as caught:
        capture(model, flatten_call((x,), {}))
    assert isinstance(caught.value, StateError) == (what in ("number", "items", "new"))
    assert torch.equal(x, X)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.plain, torch.zeros(8))
    assert model.number == 0 and model.items == [] and set(vars(model)) == attributes
    # Nothing of the trace is left in the model.
    assert type(model(X.clone())) is Tensor


def test_what_inputs_are_to_hold_is_behind_the_results() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            y[0] = 2 * x[0]
            return x + y, y

    x, y = X.clone(), X.clone()
    captured = capture(Model().eval(), flatten_call((x, y), {}))
    assert captured.updated == captured.inputs[1:] and torch.equal(y, X)
    total, same, now = captured.graph.graph.output_node().args[0]
    assert same.name == captured.updated[0] and now.op == total.op == "call_function"


class Lazy(nn.Module):
    """Sets itself up in its first call, as transformers does for the outputs of layers."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        self.linear, self.same, self.ready = nn.Linear(8, 8), same, False
        self.settings: dict[str, bool] = {}

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.ready = self.settings["hooked"] = True
            self.linear.register_forward_hook(lambda module, args, output: output * 2)
            if not self.same:
                return x
        return self.linear(x) + len(self.settings)


def state_of(model: nn.Module) -> list[dict[str, object]]:
    """All attributes of all modules: numbers and tensors by themselves, containers by their entries."""
    return [
        {key: (value, list(value), len(value)) if isinstance(value, (dict, list, set)) else value}
        for module in model.modules()
        for key, value in vars(module).items()
    ]


def test_a_model_that_sets_itself_up_is_captured_as_it_is_afterwards() -> None:
    model = Lazy(same=True).eval()
    before = state_of(model)
    captured = capture(model, flatten_call((X,), {}))
    assert state_of(model) == before and not model.ready
    result = captured.graph(*captured.parameters.values(), X)[0]
    assert torch.equal(result, model(X)) and torch.equal(result, model(X))


def test_a_model_that_computes_something_else_in_its_first_call_is_refused() -> None:
    model = Lazy(same=False).eval()
    before = state_of(model)
    with pytest.raises(StateError, match="changes its attribute ready"):
        capture(model, flatten_call((X,), {}))
    assert state_of(model) == before


def test_nothing_of_the_process_changes(caplog: pytest.LogCaptureFixture) -> None:
    call, getattribute = nn.Module.__call__, nn.Module.__getattr__
    loud = logging.getLogger("torch._subclasses.fake_tensor")
    with caplog.at_level(logging.WARNING), pytest.raises(CaptureError, match="RuntimeError"):
        capture(nn.Linear(3, 3), flatten_call((X,), {}))
    assert not any(record.name.startswith("torch._subclasses") for record in caplog.records)
    assert nn.Module.__call__ is call and nn.Module.__getattr__ is getattribute
    assert torch.backends.mha.get_fastpath_enabled() and torch.is_grad_enabled() and not loud.disabled


def test_pytorch_itself_sees_its_own_functions_during_a_capture() -> None:
    # Dynamo keeps tables by function: with another one in the place of torch.is_grad_enabled, it would never know it.
    seen = []

    class Looking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(eval("torch.is_grad_enabled", {"__name__": "torch._dynamo.variables", "torch": torch}))
            return x + 1 if torch.is_grad_enabled() else x - 1

    kind, function = type(torch), torch.is_grad_enabled
    with torch.enable_grad():
        captured = capture(Looking(), flatten_call((X,), {}))
    assert captured.asks_modes and captured.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    assert seen and all(found is function for found in seen)
    assert type(torch) is kind and torch.is_grad_enabled is function


def test_models_without_an_output_are_empty_programs() -> None:
    assert capture(nn.Identity(), flatten_call((), {"input": X})).output.build([X]) is X


def test_other_threads_may_run_other_modules_meanwhile() -> None:
    torch.manual_seed(0)
    deep = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(20)]).eval()
    other = nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)]).eval()
    with torch.no_grad():
        expected = other(X)
    done = threading.Event()
    wrong: list[object] = []

    def work() -> None:
        with torch.no_grad():
            while not done.is_set():
                try:
                    if not torch.equal(other(X), expected):
                        wrong.append("different")
                except Exception as error:
                    wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        graphs = [capture(deep, flatten_call((X,), {})).graph for _ in range(5)]
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    # Nor do their operators get into the graph.
    assert all(sum(n.target is torch.ops.aten.linear.default for n in g.graph.nodes) == 20 for g in graphs)


class Outside(nn.Module):
    """Keeps ``make(length)`` outside of itself."""

    def __init__(self, kept: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.linear, self.kept = nn.Linear(8, 8), kept

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x)) + self.kept(len(x))


def cached_in_a_dict(wrap: Callable[[Tensor], Any], unwrap: Callable[[Any], Tensor]) -> Callable[[int], Tensor]:
    found: dict[int, Any] = {}

    def kept(length: int) -> Tensor:
        if length not in found:
            found[length] = wrap(torch.arange(length).float()[:, None])
        return unwrap(found[length])

    return kept


def expected_with(model: Outside) -> Tensor:
    return model.linear(X).relu() + torch.tensor([[0.0], [1.0]])


@pytest.mark.parametrize("cache", [functools.lru_cache, functools.cache, functools.lru_cache(maxsize=3)])
def test_caches_of_functions_in_a_model_are_not_filled_by_a_trace(cache: Any) -> None:
    kept = cache(lambda length: torch.arange(length).float()[:, None])
    model = Outside(kept).eval()
    captured = capture(model, flatten_call((X,), {}))
    assert kept.cache_info().currsize == 0
    assert torch.equal(captured.graph(*captured.parameters.values(), X)[0], expected_with(model))


@functools.lru_cache
def cached_globally(length: int) -> Tensor:
    return torch.arange(length).float()[:, None]


TABLES: dict[int, tuple[Tensor, ...]] = {}


def kept_globally(length: int) -> Tensor:
    if length not in TABLES:
        TABLES[length] = (torch.arange(length).float()[:, None],)
    return TABLES[length][0]


@pytest.mark.parametrize(
    "kept",
    [
        cached_in_a_dict(lambda t: t, lambda t: t),
        cached_in_a_dict(lambda t: (t, t), lambda t: t[0]),
        cached_globally,
        lambda length: cached_globally(length),
        kept_globally,
    ],
    ids=["dict", "tuples", "lru_cache", "global lru_cache", "global dict"],
)
def test_nothing_of_a_trace_stays_in_caches(kept: Callable[[int], Tensor]) -> None:
    model = Outside(kept).eval()
    call = flatten_call((X,), {})
    cached_globally.cache_clear()
    if kept is not cached_globally:
        with pytest.raises(StateError, match=r"keeps tensors|changes its attribute kept"):
            capture(model, call)
    assert type(kept(2)) is Tensor and torch.equal(model(X), expected_with(model))
    # Real tensors in a cache are constants.
    captured = capture(model, call)
    assert kept is cached_globally or any(tensor is kept(2) for tensor in captured.parameters.values())
    assert torch.equal(captured.graph(*captured.parameters.values(), X)[0], expected_with(model))


def test_failed_captures_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model = Outside(lambda length: torch.ones(()) if torch.ones(length).sum() > 1 else torch.zeros(()))
    with pytest.raises(CaptureError, match="could not be captured"):
        capture(model, flatten_call((X,), {}))
    assert capfd.readouterr() == ("", "")


def test_nothing_of_a_failed_trace_stays_in_caches() -> None:
    kept = functools.lru_cache(lambda length: torch.arange(length).float()[:, None])

    def failing(length: int) -> Tensor:
        raise ValueError(f"not {kept(length).shape}")

    with pytest.raises(CaptureError, match="not torch"):
        capture(Outside(failing), flatten_call((X,), {}))
    assert type(kept(2)) is Tensor


def test_captures_leave_the_collection_of_garbage_as_it_was() -> None:
    model, call = nn.Linear(8, 8).eval(), flatten_call((X,), {})
    capture(model, call)
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        capture(model, call)
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


class Holder:
    """Refers to itself."""

    def __init__(self) -> None:
        self.itself, self.kept = self, list[Tensor]()


HOLDERS: list[Holder] = []


def held_for_a_while(length: int) -> Tensor:
    made = torch.arange(length).float()[:, None]
    if HOLDERS:
        HOLDERS.pop().kept.append(made)
    return made


def test_tensors_of_a_trace_that_only_older_garbage_refers_to_are_not_kept() -> None:
    HOLDERS.append(Holder())
    model = Outside(held_for_a_while).eval()
    captured = capture(model, flatten_call((X,), {}))
    assert not HOLDERS
    assert torch.equal(captured.graph(*captured.parameters.values(), X)[0], expected_with(model))


def test_hooks_that_keep_what_they_see_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    seen: list[Tensor] = []
    handle = model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with pytest.raises(StateError, match="changes its attribute"):
        capture(model, flatten_call((X,), {}))
    assert seen == []
    handle.remove()
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert len(capture(model, flatten_call((X,), {})).parameters) == 2


def test_parameters_that_nobody_registered_are_the_live_ones() -> None:
    model = Outside(lambda length: torch.zeros(()))
    model.members = [nn.Linear(8, 8), nn.Parameter(torch.ones(8))]  # type: ignore[assignment]
    model.kept = lambda length: model.members[0](model.members[1])
    parameters = list(capture(model.eval(), flatten_call((X,), {})).parameters.values())
    for tensor in (model.members[0].weight, model.members[0].bias, model.members[1]):
        assert any(tensor is parameter for parameter in parameters)


def test_a_capture_is_known_by_its_thread() -> None:
    told: list[bool] = []

    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            other = threading.Thread(target=lambda: told.append(is_capturing()))
            other.start()
            other.join()
            told.append(is_capturing())
            return x + 1

    capture(Asking(), flatten_call((X,), {}))
    assert told == [False, True] and not is_capturing()


def test_a_forked_child_does_not_wait_for_a_capture_of_its_parent() -> None:
    with EXPORTING:
        child = threading.Thread(target=_fork_and_capture)
        child.start()
        child.join()
    assert _statuses.pop() == 0


_statuses: list[int] = []


def _fork_and_capture() -> None:
    pid = os.fork()
    if pid == 0:
        free = EXPORTING.acquire(blocking=False)
        os._exit(0 if free and not is_capturing() else 1)
    _statuses.append(os.waitpid(pid, 0)[1])


# ---- devices, threads, processes


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_model_is_captured_on_the_one_device_of_the_call(elsewhere: bool) -> None:
    # Stand-ins need no GPU.
    with FakeTensorMode():
        model = Outside(lambda length: model.shift).eval()
        model.linear.weight = nn.Parameter(torch.empty(8, 8, device="cuda"))
        model.linear.bias = nn.Parameter(torch.empty(8, device="cuda"))
        model.shift = nn.Parameter(torch.empty(8, device="cpu" if elsewhere else "cuda"))
        call = flatten_call((torch.empty(2, 8, device="cuda"),), {})
        if elsewhere:
            with pytest.raises(CaptureError, match="cpu"):
                capture(model, call)
            return
        captured = capture(model, call)
    values = [n.meta["val"] for n in captured.graph.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    assert values and {v.device for v in values} == {torch.device("cuda", 0)}


@pytest.fixture
def deep() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(30)]).eval()


def test_the_model_may_be_used_in_any_way_beside_its_capture(deep: nn.Module) -> None:
    with torch.no_grad():
        expected = deep(X)
    names = list(deep.state_dict())
    done = threading.Event()

    def use() -> int:
        uses = 0
        while not done.is_set() or not uses:
            with torch.no_grad():
                assert torch.equal(deep(X), expected)
                assert torch.equal(copy.deepcopy(deep)(X), expected)
            assert all(type(t) is Tensor and t.data_ptr() for t in deep.state_dict().values())
            assert [name for name, _ in deep.named_parameters()] == names
            buffer = io.BytesIO()
            torch.save(deep.state_dict(), buffer)
            uses += 1
        return uses

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        used = pool.submit(use)
        try:
            for _ in range(3):
                capture(deep, flatten_call((X,), {}))
        finally:
            done.set()
        assert used.result() > 0


def test_forks_beside_a_capture_have_the_model_whole_and_can_capture_it(deep: nn.Module) -> None:
    prepare()  # As a module that is made does.
    with torch.no_grad():
        expected = deep(X)
    call_of_modules = nn.Module.__call__
    done = threading.Event()

    def capture_again() -> None:
        while not done.is_set():
            capture(deep, flatten_call((X,), {}))

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        capturing_all_the_time = pool.submit(capture_again)
        try:
            statuses = []
            for i in range(6):
                time.sleep(0.05)
                pid = os.fork()
                if pid == 0:
                    os._exit(_right_in_a_child(deep, expected, call_of_modules, again=i == 0))
                statuses.append(os.waitpid(pid, 0)[1])
        finally:
            done.set()
        capturing_all_the_time.result()
    assert statuses == [0] * len(statuses)


def test_captures_import_nothing_once_they_are_prepared() -> None:
    """A process that is forked while a module is imported would wait for it forever."""
    code = """if True:
        import sys
        import torch
        from fuser.frontend.calls import flatten_call
        from fuser.frontend.capture import capture, prepare
        prepare()
        before = set(sys.modules)
        layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
        call = flatten_call((torch.randn(2, 8, 32),), {})
        for dynamic in (False, True):
            capture(layer, call, dynamic)
        print(sorted(set(sys.modules) - before))
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def _right_in_a_child(model: nn.Module, expected: Tensor, call: Any, again: bool) -> int:
    # A child has one thread, and PyTorch's pool of the parent is not in it.
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            right = torch.equal(model(X), expected) and all(p.data_ptr() for p in model.parameters())
        right &= nn.Module.__call__ is call and torch.backends.mha.get_fastpath_enabled() and not is_capturing()
        if again:
            right &= len(capture(model, flatten_call((X,), {})).parameters) == 60
        return 0 if right else 1
    except BaseException:
        traceback.print_exc()
        return 2


# ---- what transformers returns and installs


def attributes_of(model: nn.Module) -> dict[str, Any]:
    """Everything that the modules of a model hold, containers by their entries."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            inner = list(value.items()) if isinstance(value, dict) else value
            found[f"{name}.{key}"] = [(k, id(v)) for k, v in inner] if isinstance(value, dict) else inner
    return found


@pytest.mark.parametrize("flags", [{}, {"output_hidden_states": True}, {"use_cache": False}])
def test_a_causal_model_is_captured_with_its_cache_and_left_as_it_was(flags: dict[str, bool]) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=99)).eval()
    ids = torch.arange(12)[None]
    before = attributes_of(model)
    call = flatten_call((), {"input_ids": ids, **flags})
    captured = capture(model, call)
    assert attributes_of(model) == before
    given = {**captured.parameters, **dict(zip(captured.inputs, call.tensors, strict=True))}
    nodes = [node for node in captured.graph.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        built = captured.output.build(captured.graph(*(given[node.name] for node in nodes)))
        expected = model(input_ids=ids, **flags)
    assert type(built) is type(expected) and list(built) == list(expected)
    ours, theirs = flatten_output(built)[0], flatten_output(expected)[0]
    assert len(ours) == len(theirs) == {"": 5, "output_hidden_states": 8, "use_cache": 1}[next(iter(flags), "")]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def _doubled() -> Tensor:
    made = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    made.mul_(2.0)
    return made


def _filled(x: Tensor) -> Tensor:
    made = torch.tensor([0.0] * 8)
    made[0] = x.sum()
    return made


NUMBERS: dict[str, Callable[[Tensor], Any]] = {
    "a factor": lambda x: x * torch.tensor([0.5] * 8),
    "an index": lambda x: x.index_select(0, torch.tensor([1, 0])),
    "written": lambda x: x * _doubled(),
    "written with what is computed": lambda x: (x * 2.0, _filled(x)),
    "returned": lambda x: (x * 2.0, torch.tensor([1, 2])),
}


@pytest.mark.parametrize("use", NUMBERS)
def test_tensors_of_numbers_in_the_code_are_made_anew_in_every_call(use: str) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return NUMBERS[use](x)

    fast = fuser.optimize(Model().eval())
    for x in (X, X + 1.0):
        got, expected = pytree.tree_leaves(fast(x)), pytree.tree_leaves(Model()(x))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        for tensor in got:
            tensor.zero_()
    assert fast.fallbacks == ()


def test_a_tensor_of_the_models_that_is_detached_in_place_is_not_one_of_the_codes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.ones(8)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.table.detach_()

    with pytest.raises(CaptureError, match="in place"):
        capture(Model().eval(), flatten_call((X,), {}))
