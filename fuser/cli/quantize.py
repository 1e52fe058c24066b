"""``fuserc quantize``: a sentence encoder with linear layers in int8, calibrated on a text, and what that changes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fuser.cli.options import Scores
from fuser.cli.output import Json, console, print_json, progress, table

_BATCH = 16
_CALIBRATION = 4
"""Batches, from the shortest sentences to the longest."""


def quantize(
    model: Annotated[
        Path,
        typer.Argument(help="Folder of a sentence encoder in Hugging Face's layout.", file_okay=False, exists=True),
    ],
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Text with one sentence a line, like those to embed.", show_default="the demo's", exists=True
        ),
    ] = None,
    quality: Annotated[float, typer.Option(min=0.0, max=1.0, help="Least mean cosine of hidden states.")] = 0.999,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of modules to leave as they are.")] = None,
    smooth: Annotated[bool, typer.Option(help="Move factors from activations to weights where that helps.")] = True,
    trials: Annotated[
        int, typer.Option(min=0, help="Choices of layers to try for the Pareto front of time and error.")
    ] = 0,
    weights_only: Annotated[bool, typer.Option(help="Store weights in int8, and leave activations alone.")] = False,
    scores: Annotated[
        Scores | None, typer.Option(help="Attention with fuser.Int8Attention(), fuser.DEQ() or fuser.Sanger(), too.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the programs for fuser.load to this file.")] = None,
    json: Json = False,
) -> None:
    """Multiply the linear layers of MODEL in int8, show what that does to embeddings, and save the result."""
    from fuser import demo
    from fuser.module.optimized import optimize
    from fuser.module.quantizing import Int8

    encoder = demo.load_encoder(model)
    batches = demo.make_batches(encoder, demo.read_sentences(calibrate or demo.TEXT), _BATCH)
    some = batches[:: max(len(batches) // _CALIBRATION, 1)]
    inputs = [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in some]
    exact = demo.embed(encoder, demo.encode_with(encoder.model), batches)
    options = Int8(
        inputs,
        quality=quality,
        smooth=smooth,
        weights_only=weights_only,
        trials=trials,
        exclude=tuple(exclude or ()),
    )
    with progress(f"quantizing {model.name}"):
        fast = optimize(encoder.model, quantize=[options] if scores is None else [options, scores.quantization])
        found = demo.agreement(demo.embed(encoder, demo.encode_with(fast), batches), exact)
        precision = fast.snapshot().precision
        assert precision is not None
        if out is not None:
            fast.save(out)
    if json:
        names = ("modules", "precision", "error", "smoothed", "reason")
        rows = [{name: getattr(x, name) for name in names} for x in precision.layers]
        written = None if out is None else str(out)
        front = [{"seconds": p.seconds, "cosine": p.cosine, "layers": p.layers} for p in precision.front]
        print_json(
            {
                "cosine": precision.cosine,
                "min_cosine_of_embeddings": found.min_cosine,
                "layers": rows,
                "front": front,
                "file": written,
            }
        )
        return
    cells = [
        (", ".join(x.modules), x.precision, f"{x.error:.1e}", "smoothed" if x.smoothed else x.reason)
        for x in precision.layers
    ]
    console().print(table(model.name, ("layer", "precision", ">error", ""), cells))
    if precision.front:
        points = [(str(p.layers), f"{1e3 * p.seconds:.4g} ms", f"{p.cosine:.6f}") for p in precision.front]
        console().print(table("time and error", (">layers in eight bits", ">time", ">cosine"), points))
    typer.echo(
        f"\nmean cosine of hidden states {precision.cosine:.6f}, of embeddings at least {found.min_cosine:.6f}"
        + ("" if out is None else f"\nwritten: {out}")
    )
