"""Built-in configurations."""

from __future__ import annotations

import pytest
import torch

from fuser import zoo
from fuser.ir.errors import FuserError

SMALL = {"layers": 1, "hidden": 32, "heads": 2, "intermediate": 64}


@pytest.mark.parametrize("name", zoo.CONFIGURATIONS)
def test_builds_and_runs_at_small_sizes(name: str) -> None:
    if name != "transformer-encoder":
        pytest.importorskip("transformers")
    configuration = zoo.configuration(name)
    model, sizes = configuration.build(
        **SMALL, batch=2, seq=16, vocabulary=100 if configuration.sizes.vocabulary else 0
    )
    assert not model.training
    with torch.no_grad():
        output = model(**configuration.example(sizes, False))
    hidden = output if isinstance(output, torch.Tensor) else output.last_hidden_state
    # A ViT has one token more than patches.
    assert hidden.shape == (2, 17 if name == "vit-b16" else 16, 32)


def test_a_seed_fixes_the_weights_and_leaves_the_generator_alone() -> None:
    configuration = zoo.configuration("transformer-encoder")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, _ = configuration.build(seed=1, **SMALL)
    assert torch.equal(torch.rand(3), expected)
    second, _ = configuration.build(seed=1, **SMALL)
    other, _ = configuration.build(seed=2, **SMALL)
    flat = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, second, other)]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])


def test_published_sizes() -> None:
    bert, vit = zoo.configuration("bert-base").sizes, zoo.configuration("vit-b16").sizes
    assert (bert.layers, bert.hidden, bert.heads, bert.intermediate, bert.vocabulary) == (12, 768, 12, 3072, 30522)
    assert (vit.layers, vit.hidden, vit.seq) == (12, 768, (224 // 16) ** 2)


def test_padding_mask_has_a_full_and_shorter_rows() -> None:
    mask = zoo.padding_mask(4, 16)
    assert mask.sum(1).tolist() == [16, 14, 12, 10]
    assert bool((mask[:, :-1] >= mask[:, 1:]).all())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"heads": 5}, "not a multiple"), ({"layers": 0}, "must be positive"), ({"vocabulary": -1}, "must be positive")],
)
def test_impossible_sizes(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(FuserError, match=message):
        zoo.configuration("bert-base").build(**sizes)


def test_images_are_square_and_have_no_padding() -> None:
    vit = zoo.configuration("vit-b16")
    with pytest.raises(FuserError, match="square"):
        vit.example(zoo.Sizes(**{**vars(vit.sizes), "seq": 15}), False)
    with pytest.raises(FuserError, match="no padding"):
        vit.example(vit.sizes, True)


def test_missing_transformers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(zoo.importlib, "import_module", missing)
    with pytest.raises(FuserError, match=r"pip install 'sparse-fuser\[demo\]'"):
        zoo.configuration("minilm").build(layers=1)
    with pytest.raises(FuserError, match="no built-in configuration 'gpt5'"):
        zoo.configuration("gpt5")
