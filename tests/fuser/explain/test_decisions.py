"""Shares of what DEQ and Sanger compute in full, and their picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fuser
from fuser.explain.decisions import of_program, picture, shares


def test_shares_of_elements_and_tiles() -> None:
    chosen = torch.zeros(1, 2, 5, 6, dtype=torch.bool)
    chosen[0, 0, 0, 0] = chosen[0, 0, 4, 5] = chosen[0, 0, 0, 5] = True
    causal = torch.ones(5, 6, dtype=torch.bool).tril()
    found = shares(chosen, causal, tile=2)
    # The last column does not exist, so two of the three decisions count nowhere; six tiles have allowed pairs.
    assert found.elements.tolist() == [[1 / 15, 0.0]]
    assert found.tiles.tolist() == [[1 / 6, 0.0]]
    everything = shares(chosen, tile=3)
    assert everything.elements[0, 0] == pytest.approx(3 / 30) and everything.tiles[0, 0] == pytest.approx(3 / 4)
    assert shares(chosen, torch.zeros(5, 6, dtype=torch.bool)).elements.isnan().all()


class TwoAttentions(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return first + nn.functional.scaled_dot_product_attention(k, q, v)


@pytest.mark.parametrize("how", [fuser.DEQ(), fuser.Sanger(threshold=0.02)])
def test_shares_of_a_program(how: fuser.DEQ | fuser.Sanger) -> None:
    q, k, v = torch.randn(3, 2, 4, 100, 16, generator=torch.Generator().manual_seed(0)).unbind()
    fast = fuser.optimize(TwoAttentions().eval(), (q, k, v), quantize=how, search="model")
    found = list(of_program(fast.programs[-1], (q, k, v)).values())
    causal = torch.ones(100, 100, dtype=torch.bool).tril()
    added = torch.zeros(100, 100).masked_fill(~causal, -torch.inf)
    want = [shares(how.reference(q, k, v, additive_mask=added)[1], causal), shares(how.reference(k, q, v)[1])]
    assert len(found) == 2
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got.elements, expected.elements)
        torch.testing.assert_close(got.tiles, expected.tiles)
    assert of_program(fuser.optimize(TwoAttentions().eval(), (q, k, v), search="model").programs[-1], (q, k, v)) == {}


def test_what_is_no_decision() -> None:
    with pytest.raises(ValueError, match="bool"):
        shares(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="allowed is bool"):
        shares(torch.zeros(1, 1, 2, 2, dtype=torch.bool), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="1 or more"):
        shares(torch.zeros(1, 1, 2, 2, dtype=torch.bool), tile=0)


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    q, k = torch.randn(2, 1, 4, 20, 16, generator=torch.Generator().manual_seed(0)).unbind()
    added = torch.zeros(20, 20).masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf)
    picture(tmp_path / "head.png", fuser.DEQ(), q, k[:, :2], additive_mask=added, head=3)
    assert (tmp_path / "head.png").read_bytes().startswith(b"\x89PNG")
