"""``fuserc cqs``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Optional

import typer

from fuser.cli.output import Json, console, print_json, table
from fuser.ir.errors import FuserError


def cqs(
    workers: Annotated[int, typer.Option("--workers", help="Number of workers.")] = 7,
    seq: Annotated[int, typer.Option("--seq", help="Tokens of the sequence.")] = 4096,
    kv: Annotated[Optional[int], typer.Option("--kv", help="Keys, where they are not as many.")] = None,  # noqa: UP045
    width: Annotated[int, typer.Option("--width", min=1, help="Head size, for the memory of a worker in fp32.")] = 64,
    draw: Annotated[Optional[Path], typer.Option("--draw", help="Write a PNG of the owners.", dir_okay=False)] = None,  # noqa: UP045
    json: Json = False,
) -> None:
    """Divide attention among workers by a cyclic quorum set: tokens, pairs and memory of each."""
    from fuser.explain.report import size_text
    from fuser.kernels.cqs import partition

    part = partition(workers, seq, kv_len=kv)
    shares = part.shares()
    # Queries, keys and values in, output and log-sum-exp out, for one head.
    memory = [4 * (share.tokens * (2 * width + 1) + 2 * share.keys * width) for share in shares]
    if draw is not None:
        try:
            part.draw(draw)
        except OSError as error:
            raise FuserError(f"cannot write the picture {draw}: {error.strerror or error}") from error
    ratio = part.responsibility_ratio
    if json:
        listed = [{**dataclasses.asdict(s), "bytes": size} for s, size in zip(shares, memory, strict=True)]
        print_json(
            {
                "workers": workers,
                "seq_len": seq,
                "kv_len": part.kv_len,
                "base": part.base,
                "responsibility_ratio": ratio,
                "shares": listed,
            }
        )
        return
    rows = [
        (str(s.worker), " ".join(map(str, s.groups)), str(s.tokens), f"{s.fraction:.2%}", str(s.pairs), size_text(size))
        for s, size in zip(shares, memory, strict=True)
    ]
    out = console()
    title = f"{workers} workers, {seq} tokens, base set {' '.join(map(str, part.base))}"
    out.print(table(title, ("worker", "groups", ">tokens", ">share", ">pairs", ">memory a head"), rows))
    out.print(f"all pairs over those of the busiest worker: {ratio:.4f}")
    if draw is not None:
        out.print(f"wrote {draw}", markup=False, soft_wrap=True)
