"""``fuserc demo``."""

from __future__ import annotations

import dataclasses
import enum
import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fuser.cli.output import Json, console, print_json, table

if TYPE_CHECKING:
    from fuser.demo import Batch, Encoder, Timing
    from fuser.module.optimized import OptimizedModule


class Padding(str, enum.Enum):
    """What fuser does with rows of padding."""

    KEEP = "keep"
    SKIP = "skip"


def demo(
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a sentence encoder (config.json, model.safetensors, tokenizer.json).",
            show_default="the installed MiniLM",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A text with one sentence a line.", show_default="Alice in Wonderland", dir_okay=False),
    ] = None,
    query: Annotated[
        list[str] | None, typer.Option(help="Find the sentences nearest to this; can be repeated.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report and the pictures.", file_okay=False)] = Path("out"),
    batch: Annotated[int, typer.Option(min=1, help="Sentences in a batch.")] = 16,
    padding: Annotated[
        Padding, typer.Option(help="keep: compute padded positions too, as eager does; skip: leave them out.")
    ] = Padding.KEEP,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for the comparison of speed.")] = 15.0,
    torch_compile: Annotated[
        bool, typer.Option("--torch-compile/--no-torch-compile", help="Compare with torch.compile too.")
    ] = True,
    threads: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Threads of everything that is timed.", show_default="PyTorch's")
    ] = None,
    json: Json = False,
) -> None:
    """Embed a real text with a pretrained sentence encoder, eager and fused: compare results and speed.

    Writes the report and a picture of every fused region to the folder --out. Nothing is fetched from the network.
    """
    import torch

    import fuser
    from fuser import demo as parts

    if threads is not None:
        torch.set_num_threads(threads)
    say = _Speaker(silent=json)
    sentences = parts.read_sentences(text or parts.TEXT)

    say.step("load the encoder and split the text into batches with padding masks")
    encoder = parts.load_encoder(model or parts.model_folder())
    batches = parts.make_batches(encoder, sentences, batch)
    shapes = sorted({tuple(b.input_ids.shape) for b in batches})
    say.line(f"{type(encoder.model).__name__} from {encoder.folder}")
    say.line(f"{len(sentences)} sentences in {len(batches)} batches of the shapes {_shapes(shapes)}")

    say.step("embed the text with eager PyTorch")
    eager = parts.encode_with(encoder.model)
    theirs = parts.embed(encoder, eager, batches)
    start = time.perf_counter()
    theirs = parts.embed(encoder, eager, batches)
    say.line(f"{theirs.shape[0]} embeddings of {theirs.shape[1]} numbers in {time.perf_counter() - start:.2f} s")

    say.step("compile with fuser.optimize and embed the text again")
    optimized = fuser.optimize(encoder.model, padding=padding.value)
    fused = parts.encode_with(optimized)
    start = time.perf_counter()
    ours = parts.embed(encoder, fused, batches)
    first = time.perf_counter() - start
    start = time.perf_counter()
    ours = parts.embed(encoder, fused, batches)
    say.line(
        f"{len(optimized.programs)} programs compiled and run in {first:.2f} s, "
        f"then all embeddings in {time.perf_counter() - start:.2f} s"
    )
    _say_fused(say, optimized)

    say.step("compare the embeddings")
    agreement = parts.agreement(ours, theirs)
    say.line(
        f"largest difference {agreement.max_error:.1e}, relative L2 difference {agreement.relative_error:.1e}, "
        f"smallest cosine {agreement.min_cosine:.7f}"
    )

    answers = {}
    for question in query or parts.QUERIES:
        say.step(f"the sentences nearest to: {question}")
        found = parts.nearest(encoder, fused, question, ours, 5)
        answers[question] = [{"cosine": cosine, "sentence": sentences[i]} for i, cosine in found]
        for i, cosine in found:
            say.line(f"{cosine:.3f}  {_cut(sentences[i])}")

    typical = parts.typical_batch(batches)
    say.step(f"time one batch of {_shapes([tuple(typical.input_ids.shape)])} tokens, calls interleaved")
    timings = _race(encoder, fused, typical, torch_compile, seconds, say)
    say.table(timings)

    say.step("write the report and the pictures")
    files = _write(optimized, out)
    for path in files:
        say.line(str(path))
    if json:
        print_json(
            {
                "model": str(encoder.folder),
                "sentences": len(sentences),
                "shapes": shapes,
                "agreement": dataclasses.asdict(agreement),
                "nearest": answers,
                "shape_timed": tuple(typical.input_ids.shape),
                "threads": torch.get_num_threads(),
                "timings": {name: dataclasses.asdict(timing) for name, timing in timings.items()},
                "unfused": optimized.unfused,
                "fallbacks": optimized.fallbacks,
                "files": [str(path) for path in files],
            }
        )


class _Speaker:
    """Prints the steps of the demo, numbered; nothing when ``silent``."""

    def __init__(self, silent: bool) -> None:
        self._out = None if silent else console()
        self._number = 0

    def step(self, text: str) -> None:
        self._number += 1
        if self._out:
            self._out.print(f"\n{self._number}. {text}", style="bold", markup=False, soft_wrap=True)

    def line(self, text: str) -> None:
        if self._out:
            self._out.print(f"   {text}", markup=False, soft_wrap=True)

    def table(self, timings: dict[str, Timing]) -> None:
        if self._out:
            rows = [
                (
                    f"   {name}",
                    f"{timing.median * 1e3:.2f} ms",
                    f"{timing.low * 1e3:.2f} to {timing.high * 1e3:.2f} ms",
                    f"{timing.ratio:.2f}×",
                )
                for name, timing in timings.items()
            ]
            self._out.print(table("", ("", ">median", ">quartiles", ">speed"), rows))


def _say_fused(say: _Speaker, optimized: OptimizedModule) -> None:
    kernels = optimized.kernels
    calls = sum(kernel.calls for kernel in kernels)
    say.line(
        f"{calls} launches of {len(kernels)} kernels a call; {len(optimized.unfused)} operators of the regions "
        f"unfused, {len(optimized.outside)} outside the regions left to PyTorch"
    )
    for reason in optimized.fallbacks:
        say.line(f"the original model ran: {reason}")


def _race(
    encoder: Encoder, fused: Any, batch: Batch, torch_compile: bool, seconds: float, say: _Speaker
) -> dict[str, Timing]:
    import torch

    from fuser import demo as parts

    runners = {"eager": parts.encode_with(encoder.model), "fuser": fused}
    if torch_compile:
        say.line("torch.compile needs a while for this shape")
        start = time.perf_counter()
        compiled = parts.encode_with(torch.compile(encoder.model, dynamic=False))
        try:
            with torch.inference_mode():
                compiled(batch.input_ids, batch.attention_mask)
        except Exception as error:  # whatever goes wrong inside torch.compile is not the demo's to stop for
            say.line(f"torch.compile failed and is left out: {str(error).splitlines()[0]}")
        else:
            say.line(f"torch.compile took {time.perf_counter() - start:.1f} s")
            runners["torch.compile"] = compiled
    calls = {name: functools.partial(encode, batch.input_ids, batch.attention_mask) for name, encode in runners.items()}
    with torch.inference_mode():
        return parts.race(calls, "eager", seconds)


def _write(optimized: OptimizedModule, out: Path) -> list[Path]:
    from fuser.explain.drawing import draw_region
    from fuser.explain.report import regions_of
    from fuser.ir.errors import FuserError

    try:
        out.mkdir(parents=True, exist_ok=True)
        report = out / "report.html"
        optimized.report(report)
        files = [report]
        regions = regions_of(optimized.programs[-1]) if optimized.programs else []
        for number, (region, choice, count) in enumerate(regions):
            path = out / f"region{number}_times{count}.svg"
            path.write_text(draw_region(region, choice), encoding="utf-8")
            files.append(path)
    except OSError as error:
        raise FuserError(f"cannot write to the folder {out}: {error}") from error
    return files


def _shapes(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("×".join(map(str, shape)) for shape in shapes)


def _cut(text: str) -> str:
    return text if len(text) <= 110 else f"{text[:109]}…"
