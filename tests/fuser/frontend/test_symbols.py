"""PyTorch's formulas of sizes, remembered while a model is captured."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx.experimental.sym_node import SymNode

from fuser.frontend.symbols import remembered_arithmetic


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads = self.inner(x).unflatten(-1, (2, 4)).transpose(1, 2)
        grid = torch.arange(x.shape[1] * y.shape[0]).view(y.shape[0], -1)
        return torch.cat([heads.flatten(2), heads.flatten(2)], -1)[:, :, 3:], grid + y.shape[0] // 2


def test_remembered_formulas_make_the_same_program() -> None:
    x, y = torch.ones(3, 5, 8), torch.ones(4, 6)
    dims = tuple(dict.fromkeys(range(t.ndim), torch.export.Dim.AUTO) for t in (x, y))

    def export() -> torch.export.ExportedProgram:
        return torch.export.export(Blocks(), (x, y), dynamic_shapes=dims, strict=False)

    plain, methods = export(), dict(vars(SymNode))
    with remembered_arithmetic():
        assert dict(vars(SymNode)) != methods
        remembered, again = export(), export()
    assert dict(vars(SymNode)) == methods
    for program in (remembered, again):
        assert program.graph_module.code == plain.graph_module.code
        values = [[node.meta.get("val") for node in p.graph.nodes] for p in (program, plain)]
        assert [str(getattr(v, "shape", v)) for v in values[0]] == [str(getattr(v, "shape", v)) for v in values[1]]
        assert str(program.range_constraints) == str(plain.range_constraints)
