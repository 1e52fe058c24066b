"""The command line, in process: outputs, exit codes, errors in one line."""

from __future__ import annotations

import errno
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import refuse
from typer.testing import CliRunner

import fuser.cli
from fuser.cli.models import parse_mask, resolve
from fuser.ir.errors import FuserError, MaskError
from fuser.ir.masks import BigBird, Causal, SlidingWindow
from fuser.runtime.cache import KernelCache

TINY = ["transformer-encoder", "--layers", "2", "--hidden", "32", "--heads", "2", "--intermediate", "64"]
SHOW = ["show", *TINY, "--seq", "16", "--search", "model"]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_help_names_the_commands() -> None:
    result = CliRunner().invoke(fuser.cli.app, ["--help"])
    assert result.exit_code == 0
    for command in ("demo", "show", "cache", "doctor"):
        assert command in result.output
        assert CliRunner().invoke(fuser.cli.app, [command, "--help"]).exit_code == 0
    assert CliRunner().invoke(fuser.cli.app, ["nonsense"]).exit_code == 2


def test_version(run: Any) -> None:
    assert run("--version")[:2] == (0, f"fuserc {fuser.__version__}\n")


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("fx", "torch.ops.aten"),
        ("graph", "softmax"),
        ("scheme", "× 2"),
        ("kernels", "fuser_attention_"),
        ("source", 'extern "C" int fuser_attention_'),
        ("plan", "arena"),
        ("precision", "cosine to the unquantized outputs"),
    ],
)
def test_show_prints_every_stage(run: Any, stage: str, expected: str) -> None:
    code, out, _ = run(*SHOW, "--stage", stage)
    assert code == 0
    assert expected in out


def test_show_json(run: Any) -> None:
    def shown(*arguments: str) -> Any:
        code, out, _ = run(*SHOW, "--json", *arguments)
        assert code == 0
        return json.loads(out)

    nodes = shown("--stage", "fx")["nodes"]
    assert {"placeholder", "call_function", "output"} == {node["op"] for node in nodes}
    graph = shown("--stage", "graph")
    kinds = [operator["kind"] for operator in graph["operators"]]
    assert kinds.count("softmax") == 2
    hashes = [region["hash"] for region in graph["regions"]]
    regions = shown("--stage", "scheme")
    assert sum(region["count"] for region in regions) == len(hashes)
    assert {region["hash"] for region in regions} == set(hashes)
    report = shown()
    assert {row["family"] for row in report["kernels"]} >= {"gemm", "attention"}
    assert report["unfused"] == []
    sources = shown("--stage", "source")
    assert {row["name"] for row in report["kernels"]} <= set(sources)
    plan = shown("--stage", "plan")
    assert plan["guards"] == [{"shape": [1, 16, 32], "dtype": "torch.float32"}]
    assert plan["arena_bytes"] > 0


@pytest.mark.parametrize("scores", ["deq", "sanger"])
def test_show_what_becomes_of_scores(run: Any, scores: str) -> None:
    given = (*SHOW, "--stage", "precision", "--quality", "0", "--scores", scores)
    code, out, _ = run(*given, "--json")
    assert code == 0
    attentions = json.loads(out)["computed_in_full"]
    assert [len(attention["scores"]) for attention in attentions] == [2, 2]
    assert all(0 < share <= 1 for attention in attentions for share in attention["scores"] + attention["tiles"])
    assert "computed in full, by head" in run(*given)[1]
    assert "computed in full" not in run(*SHOW, "--stage", "precision", "--quality", "0")[1]
    assert run(*SHOW, "--scores", scores)[0] == 2


def test_profile_accounts_for_the_whole_call(run: Any) -> None:
    code, out, _ = run(*SHOW, "--profile", "--rounds", "3", "--json")
    assert code == 0
    found = json.loads(out)
    attention = [kind for kind in found["kinds"] if kind["family"] == "attention"]
    assert [kind["calls"] for kind in attention] == [2]
    assert attention[0]["kinds"][0] == "qk" and attention[0]["floor"] > 0
    # 2 · 16 tokens · 32 · 96 for the projections of Q, K and V.
    assert any(kind["flops"] >= 2 * 16 * 32 * 96 and kind["family"] == "gemm" for kind in found["kinds"])
    assert found["steps"] == pytest.approx(sum(kind["calls"] * kind["seconds"] for kind in found["kinds"]))
    text = run(*SHOW, "--profile", "--rounds", "3")[1]
    assert "floor" in text and "of the call" in text


def test_show_with_a_mask_and_padding(run: Any) -> None:
    code, out, _ = run(*SHOW, "--mask", "sliding-window:4:4", "--padding", "--batch", "2", "--stage", "graph")
    assert code == 0
    assert out.count("\nmask ") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "no-such-model"], "no built-in configuration"),
        (["show", "no.such.module:make"], "cannot import"),
        (["show", "math:nothing"], "has no 'nothing'"),
        (["show", "math:pi"], "nn.Module"),
        (["show", ":make"], "cannot import"),
        (["show", "..:make"], "cannot import"),
        (["show", "math:sqrt"], "cannot make the model"),
        (["cqs", "--draw", "/nonexistent/picture.png"], "cannot write the picture"),
        ([*SHOW, "--mask", "triangle"], "no mask 'triangle'"),
        ([*SHOW, "--mask", "sliding-window:x:1"], "is not a mask"),
        ([*SHOW, "--heads", "3"], "not a multiple of heads"),
        ([*SHOW, "--dtype", "int8"], "floating-point"),
        (["demo", "--model", "."], "not a sentence encoder"),
        (["demo", "--text", "/nonexistent.txt"], "cannot read the text"),
        (["cache", "import", "/nonexistent.zip"], "nonexistent.zip"),
    ],
)
def test_errors_are_one_line_and_exit_with_1(run: Any, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert code == 1
    assert out == "" or arguments[0] == "demo"
    assert err.startswith("fuserc: ") and message in err
    assert "Traceback" not in err and err.count("\n") == 1


def test_errors_as_json(run: Any) -> None:
    code, out, _ = run("show", "no-such-model", "--json")
    assert code == 1
    assert "no-such-model" in json.loads(out)["error"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["show"],
        ["show", "minilm", "--stage", "assembler"],
        ["show", "minilm", "--batch", "0"],
        ["show", "minilm", "--threads", str(1 << 40)],
        ["show", "minilm", "--seed", str(1 << 70)],
        ["show", "minilm", "--stage", "plan", "--profile"],
        ["cache", "prune", "--max-size", "12x"],
    ],
)
def test_wrong_usage_exits_with_2(run: Any, arguments: list[str]) -> None:
    assert run(*arguments)[0] == 2


def test_a_model_that_cannot_be_captured_is_one_error(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "branching_model.py").write_text(
        "import torch\n"
        "class Branching(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x + 1 if x.sum() > 0 else x\n"
        "def make():\n"
        "    return Branching(), (torch.ones(3),)\n"
    )
    monkeypatch.chdir(tmp_path)
    code, _, err = run("show", "branching_model:make", "--stage", "graph")
    assert code == 1 and "could not be captured" in err
    code, _, err = run("show", "branching_model:make")
    assert code == 1 and "could not be captured" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def make(:", "SyntaxError: invalid syntax"),
        ("def make():\n    raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
    ],
)
def test_errors_of_the_users_own_code_are_one_line(
    run: Any, tmp_path: Path, monkeypatch: Any, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_model", raising=False)
    (tmp_path / "broken_model.py").write_text(text)
    importlib.invalidate_caches()
    monkeypatch.syspath_prepend(str(tmp_path))
    code, _, err = run("show", "broken_model:make")
    assert code == 1 and message in err and "broken_model.py" in err and err.count("\n") == 1


def test_a_model_of_the_users_own(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "own_model.py").write_text(
        "import torch\n"
        "def make():\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))\n"
        "    return model, {'input': torch.ones(5, 8)}\n"
    )
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("show", "own_model:make", "--json", "--search", "model")
    assert code == 0
    assert {row["family"] for row in json.loads(out)["kernels"]} == {"gemm"}


def test_cache_commands(run: Any, own_cache: Path, tmp_path: Path) -> None:
    assert run(*SHOW)[0] == 0
    listed = json.loads(run("cache", "ls", "--json")[1])
    assert listed["root"] == str(own_cache)
    symbols = {kernel["symbol"] for kernel in listed["kernels"]}
    assert any(symbol.startswith("fuser_attention") for symbol in symbols)
    assert all(symbol in run("cache", "ls")[1] for symbol in symbols)
    assert json.loads(run("cache", "verify", "--json")[1])["damaged"] == []

    archive = tmp_path / "kernels.zip"
    assert json.loads(run("cache", "export", str(archive), "--json")[1])["kernels"] == len(symbols)
    assert json.loads(run("cache", "prune", "--all", "--json")[1])["bytes"] == 0
    assert json.loads(run("cache", "ls", "--json")[1])["kernels"] == []
    assert len(json.loads(run("cache", "import", str(archive), "--json")[1])["kernels"]) == len(symbols)

    library = next(own_cache.glob("kernels/*/*/kernel.so"))
    library.write_bytes(b"damaged")
    code, out, _ = run("cache", "verify", "--json")
    assert code == 1
    assert [name for name, _ in json.loads(out)["damaged"]] == [library.parent.name]


def test_a_read_only_cache_is_listed_by_its_own_name(
    run: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    KernelCache(own_cache).write_plan("a", "a mask", b"plan")
    refuse(monkeypatch, own_cache, errno.EROFS)
    listed = json.loads(run("cache", "ls", "--json")[1])
    assert listed["root"] == str(own_cache) and [plan["title"] for plan in listed["plans"]] == ["a mask"]
    assert f"1 plans in {own_cache}," in run("cache", "ls")[1]


def test_a_cache_that_cannot_be_written_is_an_error(
    run: Any, own_cache: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """What is removed from it or added to it would not be: it would happen to a temporary one."""
    archive = tmp_path / "kernels.zip"
    assert run("cache", "export", str(archive))[0] == 0
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSER_CACHE_DIR", str(tmp_path / "file"))
    for command in (["prune", "--all"], ["prune"], ["import", str(archive)]):
        code, out, err = run("cache", *command)
        assert code == 1 and out == "" and "cannot be written" in err


def test_doctor(run: Any, own_cache: Path) -> None:
    code, out, _ = run("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)}
    assert {"torch", "C++ compiler", "kernel cache", "target"} <= set(checks)
    assert code == int(not all(check["ok"] for check in checks.values()))
    assert str(own_cache) in run("doctor")[1]


def test_doctor_finds_what_is_wrong(run: Any, own_cache: Path) -> None:
    own_cache.mkdir(mode=0o777)
    own_cache.chmod(0o777)
    code, out, _ = run("doctor")
    assert code == 1
    assert "bad" in out and "chmod -R go-w" in out


def test_masks_by_name() -> None:
    assert parse_mask("") is None
    assert parse_mask("sliding-window:3:5") == SlidingWindow(3, 5)
    assert parse_mask("causal") == Causal()
    assert parse_mask("bigbird:64:3:1:2:7") == BigBird(64, 3, 1, 2, 7)
    with pytest.raises(MaskError, match="is not a mask"):
        parse_mask("dilated:1")


def test_resolve_is_repeatable_and_checks_sizes() -> None:
    sizes = {"layers": 1, "hidden": 32, "heads": 2, "intermediate": 64, "seq": 8}
    first, second = (resolve("transformer-encoder", sizes, seed=3).model for _ in range(2))
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    other = resolve("transformer-encoder", sizes, seed=4).model
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    with pytest.raises(FuserError, match="chooses its own sizes"):
        resolve("torch.nn:Identity", {"layers": 2})
    with pytest.raises(FuserError, match="cannot be guessed"):
        resolve("torch.nn:Identity", {})


def test_bfloat16_converts_model_and_inputs() -> None:
    named = resolve("transformer-encoder", {"layers": 1, "hidden": 32, "heads": 2, "seq": 8}, dtype="bfloat16")
    assert {p.dtype for p in named.model.parameters()} == {torch.bfloat16}
    assert named.kwargs["src"].dtype == torch.bfloat16
