"""Methods of a model run programs where they run the model, and say so where they do not."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuser
from fuser.module.methods import BoundMethods


class Speaker(nn.Module):
    """A model with methods of all kinds around its forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(32, 32)
        self.spoken = 0

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))

    def speak(self, x: Tensor, times: int = 2) -> Tensor:
        """Apply the model to its own output."""
        for _ in range(times):
            x = self(x)
        self.spoken += 1
        return x

    def whisper(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def head(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def reset(self) -> Speaker:
        self.spoken = 0
        return self

    def copied(self) -> nn.Module:
        return copy.deepcopy(self)

    def _hidden(self) -> int:
        return self.spoken

    @classmethod
    def make(cls) -> Speaker:
        return cls()


class Loud(Speaker):
    def speak(self, x: Tensor, times: int = 2) -> Tensor:
        return super().speak(x, times) * 2


X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


class Counting(nn.Module):
    """Stands for an optimized module: runs the model and counts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "model", model)
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.model(*args, **kwargs)


def bound(model: Speaker) -> tuple[Any, Counting, list[str]]:
    run, unserved = Counting(model), []
    methods = BoundMethods(model, run, unserved.append)
    return lambda name: methods.bind(name, getattr(model, name)), run, unserved


@pytest.mark.parametrize("make", [Speaker, Loud])
def test_calls_of_the_model_in_methods_are_redirected(make: type[Speaker]) -> None:
    model = make().eval()
    method, run, unserved = bound(model)
    with torch.no_grad():
        assert torch.equal(method("speak")(X, times=3), make().speak(X, times=3))
        assert torch.equal(method("whisper")(X), model(X))
    assert run.calls == 4 and unserved == []


def test_methods_read_and_change_the_model() -> None:
    model = Speaker().eval()
    method, run, _ = bound(model)
    method("speak")(X)
    assert model.spoken == 1 and method("_hidden")() == 1
    assert method("reset")() is run and model.spoken == 0


def test_methods_look_like_the_model_s() -> None:
    method, _, _ = bound(Speaker())
    assert inspect.signature(method("speak")) == inspect.signature(Speaker().speak)
    assert method("speak").__name__ == "speak" and method("speak").__doc__ == Speaker.speak.__doc__


def test_a_copy_made_in_a_method_is_a_copy_of_the_model() -> None:
    model = Speaker()
    copied = bound(model)[0]("copied")()
    assert type(copied) is Speaker and copied is not model
    assert copied.linear.weight is not model.linear.weight


def test_what_runs_parts_of_the_model_is_named() -> None:
    method, run, unserved = bound(Speaker())
    method("head")(X)
    method("reset")()
    assert run.calls == 0 and unserved == ["head"]


def test_an_optimized_model_s_methods_run_programs() -> None:
    model = Speaker().eval()
    fast = fuser.optimize(model, search="model")
    with torch.no_grad():
        torch.testing.assert_close(fast.speak(X), model.speak(X))
        assert len(fast.programs) == 1 and fast.fallbacks == ()
        fast.head(X)
    assert fast.fallbacks == (
        "the method head runs parts of the model by itself; only what calls the whole model is compiled",
    )
    assert "the method head" in fast.report()
    assert type(fast.make()) is Speaker and fast.reset() is fast


def test_in_methods_only_the_first_shape_compiles_at_once_where_each_is_captured_by_itself() -> None:
    model = Speaker().eval()
    fast = fuser.optimize(model, search="model", dynamic=False)
    with torch.no_grad():
        for rows in range(1, 5):
            torch.testing.assert_close(fast.speak(X[:rows]), model.speak(X[:rows]))
    assert len(fast.programs) == 1
    assert len(fast.fallbacks) == 3 and all("which compiling takes" in reason for reason in fast.fallbacks)


def test_in_methods_all_shapes_of_one_capture_run_programs() -> None:
    model = Speaker().eval()
    fast = fuser.optimize(model, search="model")
    with torch.no_grad():
        for rows in range(2, 5):
            torch.testing.assert_close(fast.whisper(X[:rows]), model.whisper(X[:rows]))
    assert len({id(compiled.captured) for compiled in fast.programs}) == 1 and fast.fallbacks == ()


def test_generate_of_a_language_model_runs_its_prompt_as_a_program() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_embd=32, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=49, pad_token_id=49
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    fast = fuser.optimize(model, search="model")
    ids = torch.randint(1, 49, (1, 8), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": False}
    with torch.no_grad():
        assert torch.equal(fast.generate(ids, **options), model.generate(ids, **options))
    assert fast.programs or fast.fallbacks


def test_encode_of_a_sentence_transformer_runs_programs() -> None:
    package = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")

    class Words(modules.InputModule):  # type: ignore[misc, name-defined]
        """Words of a sentence as their lengths, embedded and passed through one linear layer."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.linear = nn.Embedding(20, 32), nn.Linear(32, 32)

        def preprocess(self, inputs: list[str], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
            lengths = [[len(word) for word in text.split()] for text in inputs]
            width = max(map(len, lengths))
            rows = [words + [0] * (width - len(words)) for words in lengths]
            mask = [[1] * len(words) + [0] * (width - len(words)) for words in lengths]
            return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}

        def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
            features["token_embeddings"] = torch.relu(self.linear(self.table(features["input_ids"])))
            return features

        def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
            raise NotImplementedError

    model = package.SentenceTransformer(modules=[Words(), modules.Pooling(32)], device="cpu").eval()
    fast = fuser.optimize(model, search="model")
    texts = ["a few words in a row", "here are some other ones"]
    expected, found = model.encode(texts), fast.encode(texts)
    torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected))
    assert len(fast.programs) == 1 and fast.fallbacks == ()
