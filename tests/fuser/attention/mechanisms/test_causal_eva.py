"""Causal EVA: decoding, the interface of fairseq, and old checkpoints."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mechanism_cases import DIM, TOKENS, make, tokens
from torch import Tensor, nn

from fuser.ir.errors import MechanismError

Steps = st.lists(st.integers(1, 11), min_size=1, max_size=8)
FORMS = st.fixed_dictionaries(
    {
        "window_size": st.sampled_from([4, 8]),
        "chunk_size": st.sampled_from([1, 2, 4]),
        "use_t5_rpe": st.booleans(),
        "overlap_window": st.booleans(),
        "exact_rpe": st.booleans(),
        "adaptive_proj": st.sampled_from(["qk", "no-ln"]),
    }
)


def causal(**arguments: Any) -> Any:
    """The module itself, time first, in evaluation mode and float64."""
    settings = {"window_size": 8, "chunk_size": 4, "causal": True, "use_t5_rpe": True, "self_attention": True}
    return make("causal_eva", **{**settings, **arguments}).attention.double().eval()


def times(count: int) -> Tensor:
    return tokens(2, count).transpose(0, 1)


@settings(max_examples=12, deadline=None)
@given(FORMS, Steps)
def test_decoding_in_steps_of_any_lengths_gives_what_one_call_gives(form: dict[str, Any], steps: list[int]) -> None:
    module = causal(**form)
    x = times(sum(steps))
    state: dict[str, Any] = {}
    parts = [module(part, part, part, incremental_state=state)[0] for part in x.split(steps)]
    torch.testing.assert_close(torch.cat(parts), module(x, x, x)[0], rtol=1e-11, atol=1e-11)
    # Windows that are over and chunks that are summarized are let go.
    (kept,) = state.values()
    assert kept["window"].shape[1] < module.window_size + module.extension
    assert kept["chunk"].shape[1] < module.chunk_size


def test_sequences_go_on_from_those_that_they_are_reordered_to() -> None:
    module = causal()
    x = times(TOKENS)
    state: dict[str, Any] = {}
    module(x[:13], x[:13], x[:13], incremental_state=state)
    order = torch.tensor([1, 1])
    assert module.reorder_incremental_state(state, order) is state
    rest = x[13:]
    out = module(rest, rest, rest, incremental_state=state)[0]
    whole = torch.cat([x[:13, order], rest])
    torch.testing.assert_close(out, module(whole, whole, whole)[0][13:], rtol=1e-11, atol=1e-11)
    assert module.reorder_incremental_state({}, order) == {}


def test_layers_share_a_state_also_after_they_were_copied() -> None:
    first = causal()
    second = copy.deepcopy(first)
    x = times(5)
    state: dict[str, Any] = {}
    for step in x.split(1):
        for module in (first, second):
            module(step, incremental_state=state)
    assert len(state) == 2


def test_keys_and_values_may_be_others_than_queries() -> None:
    module = causal(self_attention=False, kdim=6, vdim=5)
    x, k, v = times(11), torch.randn(11, 2, 6).double(), torch.randn(11, 2, 5).double()
    out = module(x, k, v)[0]
    changed = module(x, k, torch.cat([v[:9], v[9:] + 1]))[0]
    assert torch.equal(out[:9], changed[:9]) and not torch.equal(out[9:], changed[9:])
    same = causal(self_attention=True)
    assert torch.equal(same(x, x + 1, x + 2)[0], same(x)[0])


def test_one_query_alone_is_softmax_over_its_window_and_earlier_chunks() -> None:
    module = causal(use_t5_rpe=False)
    x = times(TOKENS)
    q, k, v = (
        layer(x).view(TOKENS, 2, 2, 4).permute(1, 2, 0, 3) for layer in (module.q_proj, module.k_proj, module.v_proj)
    )
    means = [t.unflatten(2, (-1, 4)).mean(3) for t in (q, k)]
    k_bar = module.adaptive_mu_k(means[1])
    omega = module.adaptive_mu_q(means[0]) + k_bar
    chunk_k, chunk_v = (t.unflatten(2, (-1, 4)) for t in (k, v))
    logits = (chunk_k @ omega.unsqueeze(-1)).squeeze(-1) / 2 - chunk_k.pow(2).sum(-1) / 4
    beta = (logits.softmax(-1).unsqueeze(-1) * chunk_v).sum(3)
    # Token 21 is in the window of 16 to 23 and the chunk of 20 to 23, the sixth.
    keys, values = torch.cat([k[:, :, 16:22], k_bar[:, :, :5]], 2), torch.cat([v[:, :, 16:22], beta[:, :, :5]], 2)
    mixed = (q[:, :, 21:22] @ keys.mT / 2).softmax(-1) @ values
    want = module.out_proj(mixed.transpose(1, 2).flatten(2))[:, 0]
    torch.testing.assert_close(module(x)[0][21], want, rtol=1e-12, atol=1e-12)


def test_checkpoints_with_joined_projections_load() -> None:
    module = causal()
    model = nn.ModuleDict({"layer": module})
    state = model.state_dict()
    old = {name: t for name, t in state.items() if not name[6:].startswith(("q_proj", "k_proj", "v_proj"))}
    for kind in ("weight", "bias"):
        old[f"layer.in_proj_{kind}"] = torch.cat([state[f"layer.{part}_proj.{kind}"] for part in "qkv"])
    fresh = nn.ModuleDict({"layer": causal()})
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    fresh.load_state_dict(old)
    x = times(9)
    assert torch.equal(fresh["layer"](x)[0], module(x)[0])
    fresh["layer"].upgrade_state_dict_named(old, "layer")
    assert old.keys() == state.keys()


def test_quantization_noise_drops_blocks_of_weights_in_training_alone() -> None:
    module = causal(q_noise=0.5, qn_block_size=4)
    before = copy.deepcopy(module.state_dict())
    x = times(9)
    assert torch.equal(module(x)[0], causal()(x)[0])
    layer = module.q_proj.train()
    nn.init.zeros_(layer.bias)
    weight = layer(torch.eye(DIM).double()).mT
    blocks, kept = (t.unflatten(1, (2, 4)) for t in (layer.weight, weight))
    dropped = (kept == 0).all(-1)
    assert 0 < int(dropped.sum()) < dropped.numel()
    torch.testing.assert_close(kept[~dropped], 2 * blocks[~dropped])
    assert torch.equal(layer.weight, before["q_proj.weight"])


def test_dropout_is_of_the_joint_weights_in_training() -> None:
    module = causal(dropout=0.5, adaptive_proj="no-ln")
    x = times(16)
    assert torch.equal(module(x)[0], causal(adaptive_proj="no-ln")(x)[0])
    torch.manual_seed(0)
    one = module.train()(x)[0]
    assert not torch.equal(one, module(x)[0])


def test_what_cannot_be_decoded_or_masked_is_refused() -> None:
    x = times(8)
    with pytest.raises(MechanismError, match="needs causal=True and chunk_size"):
        causal(causal=False)(x, incremental_state={})
    with pytest.raises(MechanismError, match="needs causal=True and chunk_size"):
        causal(chunk_size=None, num_chunks=2)(x, incremental_state={})
    with pytest.raises(MechanismError, match="knows no padding"):
        causal()(x, key_padding_mask=torch.zeros(2, 8), incremental_state={})
    with pytest.raises(MechanismError, match="no masks but the causal one"):
        causal(causal=False)(x, attn_mask=torch.zeros(8, 8))
    with pytest.raises(MechanismError, match=r"key has the shape \(7, 2, 8\)"):
        causal(self_attention=False)(x, x[:7], x[:7])
    state: dict[str, Any] = {}
    module = causal()
    module(x, incremental_state=state)
    with pytest.raises(MechanismError, match="the state is of 2 sequences and 1 go on"):
        module(x[:1, :1], incremental_state=state)
