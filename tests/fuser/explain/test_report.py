"""Reports say what was fused: as values, as text, as HTML that needs nothing else."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fuser
from fuser import zoo
from fuser.explain.drawing import draw_region, duration
from fuser.explain.report import choice_of, collect, regions_of, render_html, render_text
from fuser.ir.errors import FuserError
from fuser.runtime.profile import profile

SIZES = {"layers": 3, "hidden": 32, "heads": 2, "intermediate": 64, "seq": 16}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def optimized() -> fuser.OptimizedModule:
    configuration = zoo.configuration("transformer-encoder")
    model, sizes = configuration.build(**SIZES)
    return fuser.optimize(model, configuration.example(sizes, False), search="model")


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_values(optimized: fuser.OptimizedModule) -> None:
    found = collect(optimized.snapshot())
    (compiled,) = optimized.programs
    assert found.model == "TransformerEncoder"
    assert found.programs == ("1×16×32 float32",)
    assert sum(region.count for region in found.regions) == len(compiled.graph.regions)
    assert max(region.count for region in found.regions) == 3
    for row in found.regions:
        region = next(r for r in compiled.graph.regions if r.hash == row.hash)
        names = [name for group in row.groups for name in group.operators]
        assert sorted(names) == sorted(op.name for op in region.operators)
        assert row.seconds == pytest.approx(sum(group.seconds for group in row.groups))
    assert found.memory.arena == compiled.assembly.plan.arena_bytes
    # Four matrices of a layer are packed: 3·32·32 + 32·32 + 2·32·64 numbers of 4 bytes; packing may pad.
    assert found.memory.constants >= 3 * 4 * (4 * 32 * 32 + 2 * 32 * 64)
    json.dumps(found.as_dict())


def test_every_kernel_has_its_choice(optimized: fuser.OptimizedModule) -> None:
    (compiled,) = optimized.programs
    for record in optimized.kernels:
        choice = choice_of(compiled, record)
        assert choice is not None and choice.family == record.family
    assert all(row.seconds is not None and row.seconds > 0 for row in collect(optimized.snapshot()).kernels)


def test_text_names_everything(optimized: fuser.OptimizedModule) -> None:
    text = optimized.report()
    for record in optimized.kernels:
        assert record.name in text
    for region in optimized.programs[0].graph.regions:
        assert str(optimized.programs[0].choices[region.hash].scheme) in text
    assert "× 3" in text
    assert "unfused inside the regions: nothing" in text
    assert re.search(r"memory +arena .* packed and derived weights", text)


def test_html_stands_alone(optimized: fuser.OptimizedModule, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert optimized.report(path) == optimized.report()
    html = path.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)|@import|url\((?!#)""", html)
    pictures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(pictures) == len(regions_of(optimized.programs[0]))
    for record in optimized.kernels:
        assert record.name in html


def test_pictures_show_operators_groups_and_edges(optimized: fuser.OptimizedModule) -> None:
    for region, choice, _ in regions_of(optimized.programs[0]):
        svg = draw_region(region, choice)
        found = texts(svg)
        for op in region.operators:
            assert op.kind in found
        for group in choice.groups:
            assert group.family in found
        paths = list(ElementTree.fromstring(svg).iter(f"{SVG}path"))
        assert len(paths) > len(region.edges)
        assert draw_region(region, choice) == svg


def test_nodes_do_not_overlap_and_lie_inside(optimized: fuser.OptimizedModule) -> None:
    for region, choice, _ in regions_of(optimized.programs[0]):
        root = ElementTree.fromstring(draw_region(region, choice))
        width, height = float(root.attrib["width"]), float(root.attrib["height"])
        boxes = [
            tuple(float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
            for group in root.iter(f"{SVG}g")
            for rect in group.iter(f"{SVG}rect")
        ]
        assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h in boxes)
        for i, (x, y, w, h) in enumerate(boxes):
            for a, b, c, d in boxes[i + 1 :]:
                assert x + w <= a or a + c <= x or y + h <= b or b + d <= y


def test_a_constant_mask_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    configuration = zoo.configuration("transformer-encoder")
    model, sizes = configuration.build(**SIZES)
    mask = fuser.masks.SlidingWindow(4, 4)
    fast = fuser.optimize(model, configuration.example(sizes, False), attention=mask, search="model")
    html = render_html(collect(fast.snapshot()), fast.programs[-1])
    assert mask.name in html
    assert html.count("data:image/png;base64,") == 1


class Branching(nn.Module):
    """Cannot be captured. The name of its one parameter must not break the page."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


def test_what_was_not_compiled_is_said(tmp_path: Path) -> None:
    fast = fuser.optimize(Branching().eval(), (torch.ones(3),))
    text = fast.report(tmp_path / "report.html")
    assert "nothing is compiled" in text
    assert "could not be captured" in text
    assert "could not be captured" in (tmp_path / "report.html").read_text(encoding="utf-8")
    never_called = fuser.optimize(Branching().eval())
    assert "nothing is compiled" in render_text(collect(never_called.snapshot()))


def test_text_from_a_model_is_escaped() -> None:
    class Evil(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    Evil.__name__ = "<script>alert(1)</script>"
    html = render_html(collect(fuser.optimize(Evil().eval()).snapshot()), None)
    assert "<script" not in html


def test_a_report_that_cannot_be_written_is_one_error(optimized: fuser.OptimizedModule, tmp_path: Path) -> None:
    with pytest.raises(FuserError, match="cannot write the report"):
        optimized.report(tmp_path / "missing" / "report.html")


def test_profile_runs_every_step_and_leaves_the_program_right(optimized: fuser.OptimizedModule) -> None:
    (compiled,) = optimized.programs
    x = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(1))
    (before,) = compiled.program([x])
    found = profile(compiled.program, [x], rounds=2)
    (after,) = compiled.program([x])
    assert torch.equal(after, before)
    assert len(found.steps) == len(compiled.assembly.plan.steps) == len(compiled.assembly.labels)
    assert found.call > 0 and all(seconds >= 0 for seconds in found.steps)


def test_stepping_computes_what_a_call_does(optimized: fuser.OptimizedModule) -> None:
    program = optimized.programs[0].program
    x = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(2))
    (expected,) = program([x])
    program([torch.zeros_like(x)])
    with program.stepping([x]) as (runs, results):
        for run in runs:
            run()
        (stepped,) = results()
    assert torch.equal(stepped, expected)


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 µs"), (3e-9, "3 ns"), (0.0, "0 ns")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
