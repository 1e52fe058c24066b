"""Outlines hold all that a picture needs, so that it can be drawn where the model is not."""

from __future__ import annotations

import dataclasses
import json

from fuser.explain.drawing import Outline, draw_outline, draw_region, duration
from fuser.ir.target import Target
from fuser.kernels.families import IMPLEMENTATIONS
from fuser.schemes import bert_layer
from fuser.search.partition import default_scheme

TARGET = Target("cpu", "avx2", frozenset(), 2, (32768, 2**20, 2**25), 5e10, 1e10, 1e-6)


def test_a_stored_outline_gives_the_same_picture() -> None:
    region = bert_layer()
    choice = default_scheme(region, IMPLEMENTATIONS, TARGET)
    outline = Outline.from_json(json.loads(json.dumps(dataclasses.asdict(Outline.of(region)))))
    assert outline == Outline.of(region)
    kernels = [
        (
            g.family,
            f"≈ {duration(g.seconds)}",
            [o.name for o in g.group.operators],
        )
        for g in choice.groups
    ]
    assert draw_outline(outline, kernels) == draw_region(region, choice)
