"""The commands of the reference: flags reach the models, which run under fuser and load checkpoints."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fuser import evit, pvt, transformer
from fuser.ir.errors import MechanismError

EXAMPLES = Path(__file__).parents[2] / "examples"
WINDOWS = ["--encoder-attn-window-size", "4", "--encoder-attn-num-landmarks", "4"]
CAUSAL = ["--decoder-attn-chunk-size", "2", "--decoder-attn-causal"]
COMMANDS = {
    "deit": ["image", "--attn-name", "eva", "--attn-2d", "--window-size", "2", "--num-landmarks", "4", "--use-rpe"],
    "pvt": ["image", "--model", "pvt_nano", "--attn-name", "lara", "--num-landmarks", "4"],
    "translation": ["translate", "--tokens", "16", "--attn-name-encoder", "eva", *WINDOWS],
    "language": ["lm", "--tokens", "16", "--attn-name-decoder", "causal_eva", *CAUSAL],
}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    words = {"dim": 16, "heads": 2, "hidden": 32, "layers": 1, "vocabulary": 50}
    tiny = pvt.Sizes(depths=(1,) * 4, dims=(8,) * 4, heads=(1,) * 4, ratios=(2,) * 4, image=64, classes=5)
    monkeypatch.setitem(evit.SIZES, "evit_tiny_p16", evit.Sizes(dim=16, heads=2, patch=8, image=32, depth=1, classes=5))
    monkeypatch.setitem(pvt.SIZES, "pvt_nano", tiny)
    monkeypatch.setitem(transformer.TRANSLATORS, "transformer_wmt_en_de", transformer.Sizes(**words))
    monkeypatch.setitem(transformer.LANGUAGE_MODELS, "transformer_lm", transformer.Sizes(**words))
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module("efficient_models")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_builds_what_its_flags_say(command: str, example: Any) -> None:
    args = example.parse(COMMANDS[command])
    torch.manual_seed(0)
    model, inputs = example.build(args)
    with torch.no_grad():
        assert model.eval()(*inputs).isfinite().all()
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"deit": "EvaAttention", "pvt": "LaraAttention", "translation": "EvaAttention"}.get(
        command, "CausalEvaAttention"
    ) in kinds


def test_a_command_runs_a_checkpoint_under_fuser(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = example.build(example.parse(COMMANDS["deit"]))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pt")
    example.main([*COMMANDS["deit"], "--checkpoint", str(tmp_path / "model.pt"), "--rounds", "1"])
    said = capsys.readouterr().out
    assert "outputs (1, 5)" in said and "fuser" in said


def test_a_decoder_that_sees_what_comes_is_refused(example: Any) -> None:
    args = example.parse([*COMMANDS["language"]])
    args.attn_args_decoder.causal = False
    with pytest.raises(MechanismError, match="causal=True"):
        example.build(args)
