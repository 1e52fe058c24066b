"""Mechanisms by name: arguments, flags of command lines, and what is refused."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest
import torch
from mechanism_cases import make, tokens

import fuser
from fuser.attention import NestedNamespace, add_arguments, build, configure, names
from fuser.attention.mechanisms.positions import BucketedPositions, grid_entries, grid_index
from fuser.ir.errors import FuserError, MechanismError

NAMES = ("softmax", "local", "performer", "ra", "lara", "scatterbrain", "eva", "causal_eva")
LOCAL = {"use_rpe": False, "window_size": 4, "attn_2d": False, "overlap_window": False, "exact_rpe": False}
FEATURES = {"approx_attn_dim": 64, "proj_method": "favorp", "cos_weighting": False, "sample_scheme": "default"}
FLAGS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "local": LOCAL,
    "performer": FEATURES,
    "ra": {"num_samples": 1},
    "lara": {
        "num_landmarks": 49,
        "kernel_size": None,
        "pool_module_type": "light",
        "mis_type": "mis-opt",
        "proposal_gen": "pool",
        "use_antithetics": False,
        "use_multisample": False,
        "alpha_coeff": 1.0,
    },
    "scatterbrain": {**LOCAL, **FEATURES},
    "eva": {**LOCAL, "adaptive_proj": "default", "num_landmarks": 49, "use_t5_rpe": False},
    "causal_eva": {
        "adaptive_proj": "qk",
        "num_chunks": None,
        "chunk_size": None,
        "causal": False,
        "use_t5_rpe": False,
        "window_size": 4,
        "overlap_window": False,
        "exact_rpe": False,
    },
}


def parsed(name: str, *flags: str, **where: str) -> NestedNamespace:
    parser = add_arguments(argparse.ArgumentParser(), name, **where)
    return parser.parse_args(flags, namespace=NestedNamespace())


@pytest.mark.parametrize("name", NAMES)
def test_flags_have_the_defaults_of_the_reference(name: str) -> None:
    common = {} if name == "causal_eva" else {"fp32": False}
    assert vars(parsed(name).attn_args) == {**common, **FLAGS[name]}


def test_all_mechanisms_are_there() -> None:
    assert names() == NAMES and fuser.attention.names is names


def test_flags_build_a_module_below_a_prefix_and_a_namespace_of_their_own() -> None:
    parser = argparse.ArgumentParser()
    assert add_arguments(parser, "eva", "attn_args_encoder", "encoder-attn") is parser
    add_arguments(parser, "causal_eva", "attn_args_decoder", "d")
    flags = ["--encoder-attn-window-size", "8", "--encoder-attn-use-t5-rpe", "--encoder-attn-adaptive-proj", "no-ln"]
    args = parser.parse_args([*flags, "--d-chunk-size=2", "--d-causal"], namespace=NestedNamespace())
    eva = build("eva", dim=16, num_heads=2, **vars(args.attn_args_encoder))
    assert eva.window_size == 8 and eva.rel_pos_bias is not None and len(eva.adaptive_mu_k) == 1
    decoder = build("causal_eva", embed_dim=16, num_heads=2, **vars(args.attn_args_decoder))
    assert decoder.chunk_size == 2 and decoder.causal
    with pytest.raises(SystemExit):
        parser.parse_args(["--encoder-attn-adaptive-proj", "qk"])


def test_namespaces_nest() -> None:
    namespace = NestedNamespace(plain=1)
    setattr(namespace, "a.b.c", 2)
    setattr(namespace, "a.d", 3)
    assert (namespace.plain, namespace.a.b.c, namespace.a.d, getattr(namespace, "a.b.c")) == (1, 2, 3, 2)
    assert not hasattr(namespace, "x.y") and not hasattr(namespace, "z")


def test_configurations_are_typed_and_immutable() -> None:
    configuration = configure("local", dim=8, num_heads=2)
    assert dataclasses.asdict(configuration)["window_size"] == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        configuration.window_size = 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("evaa", {}, "there is no attention 'evaa'; did you mean 'eva'"),
        ("flash", {}, "choose one of softmax, local"),
        ("eva", {"windowsize": 4}, "eva has no argument 'windowsize'; did you mean 'window_size'"),
        ("lara", {"causal": True}, "lara has no argument 'causal'"),
        ("softmax", {"num_heads": 3}, "dim = 8 channels cannot be divided among num_heads = 3"),
        ("local", {"window_size": 0}, "window_size is 0; it must be at least 1"),
        ("eva", {"num_landmarks": 0}, "num_landmarks is 0"),
        ("eva", {"adaptive_proj": "qk"}, "adaptive_proj is 'qk'; it must be one of default, no-ln, none"),
        ("eva", {"use_rpe": True, "use_t5_rpe": True}, "exclude each other"),
        ("eva", {"attn_2d": True, "use_t5_rpe": True}, "exclude each other"),
        ("performer", {"proj_method": "elu"}, "it must be one of favorp"),
        ("performer", {"proj_method": "dpfp", "approx_attn_dim": 4}, "dpfp makes multiples of 8 features"),
        ("performer", {"proj_method": "mlp-fourier", "approx_attn_dim": 5}, "an even number of features"),
        ("performer", {"proj_drop": 1.0}, "proj_drop is 1.0"),
        ("scatterbrain", {"proj_method": "relu"}, "proj_method='favorp'"),
        ("ra", {"num_samples": -2}, "num_samples is -2"),
        ("lara", {"proposal_gen": "adaptive-1d", "pool_module_type": "dense"}, "must be 'light'"),
        ("lara", {"mis_type": "opt"}, "one of mis-opt, mis-biased, mis-bh"),
        ("causal_eva", {"embed_dim": 8}, "causal_eva needs chunk_size or num_chunks"),
        ("causal_eva", {"embed_dim": 8, "chunk_size": 3}, "chunk_size = 3 must divide window_size = 4"),
        ("causal_eva", {"embed_dim": 8, "chunk_size": 2, "adaptive_proj": "default"}, "one of qk, no-ln"),
        ("causal_eva", {"embed_dim": 8, "chunk_size": 2, "self_attention": True, "kdim": 4}, "kdim and vdim"),
        ("causal_eva", {"embed_dim": 8, "chunk_size": 2, "q_noise": 0.1, "qn_block_size": 3}, "no multiple of"),
    ],
)
def test_arguments_that_no_module_can_have_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    given = {**({} if "embed_dim" in arguments else {"dim": 8}), "num_heads": 2, **arguments}
    with pytest.raises(MechanismError, match=message) as caught:
        build(name, **given)
    assert isinstance(caught.value, FuserError) and isinstance(caught.value, ValueError)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(MechanismError, match="softmax needs dim and num_heads"):
        build("softmax")


@pytest.mark.parametrize(
    ("name", "arguments", "shape", "message"),
    [
        ("softmax", {}, (2, 3, 4, 5), "tokens have the shape"),
        ("local", {"window_size": 4, "attn_2d": True}, (1, 8, 6), "windows of 4 do not divide 8 × 6 tokens"),
        ("local", {"window_size": 2, "attn_2d": True}, (1, 24), "24 tokens are no square"),
        ("scatterbrain", {"window_size": 2, "attn_2d": True}, (1, 24), "24 tokens are no square"),
        ("eva", {"window_size": 8, "num_landmarks": 25}, (1, 24), "num_landmarks = 25 are more than the 24 tokens"),
        ("eva", {"window_size": 8, "num_landmarks": 5}, (1, 22), ""),
        ("eva", {"window_size": 8, "num_landmarks": 2}, (1, 25), ""),
        ("eva", {"window_size": 8, "num_landmarks": 3}, (1, 30), "chunks of 10 do not divide 32 tokens"),
        (
            "eva",
            {"window_size": 2, "num_landmarks": 6, "attn_2d": True},
            (1, 6, 10),
            "chunks of 3 do not divide 6 × 10",
        ),
        ("lara", {"proposal_gen": "adaptive-1d"}, (1, 4, 6), "adaptive-1d makes landmarks of a sequence"),
        ("causal_eva", {"num_chunks": 30, "window_size": 8}, (1, 20), "num_chunks = 30 are more than the 24 tokens"),
        ("causal_eva", {"num_chunks": 5, "window_size": 8}, (1, 24), ""),
        ("causal_eva", {"num_chunks": 5, "window_size": 8}, (1, 25), "chunks of 6 do not divide 32 tokens"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    name: str, arguments: dict[str, Any], shape: tuple[int, ...], message: str
) -> None:
    module, x = make(name, **arguments).double(), tokens(*shape)
    if not message:
        assert module(x).shape == x.shape
        return
    with pytest.raises(MechanismError, match=message):
        module(x)


def test_padding_masks_of_other_shapes_are_refused_and_those_of_grids_taken() -> None:
    module, x = make("softmax").double(), tokens(2, 4, 6)
    with pytest.raises(MechanismError, match=r"key_padding_mask has the shape \(2, 4\)"):
        module(x, torch.zeros(2, 4))
    mask = torch.rand(2, 4, 6) > 0.7
    assert torch.equal(module(x, mask), module(x, mask.flatten(1).long()))


def test_positions_of_a_grid_alias_as_in_the_reference_or_are_exact() -> None:
    # 13² offsets of a 7 × 7 window share 97 entries; 72 of these stand for more than one.
    index = grid_index(7, 0, exact=False)
    rows = torch.arange(7).repeat_interleave(7)
    columns = torch.arange(7).repeat(7)
    offsets = torch.stack([rows[:, None] - rows, columns[:, None] - columns], -1).flatten(0, 1)
    pairs = torch.cat([index.flatten()[:, None], offsets], 1).unique(dim=0)
    assert len(pairs) == 169 and index.unique().numel() == grid_entries(7, 0, exact=False) == 97
    assert int((pairs[:, 0].unique(return_counts=True)[1] > 1).sum()) == 72
    for window, extension in ((7, 0), (4, 2)):
        exact = grid_index(window, extension, exact=True)
        assert exact.unique().numel() == exact.max() + 1 == grid_entries(window, extension, exact=True)
        aliased = grid_index(window, extension, exact=False)
        assert aliased.shape == exact.shape and aliased.max() < grid_entries(window, extension, exact=False)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [2, 16])
def test_buckets_count_from_the_query_if_they_are_exact(causal: bool, rows: int) -> None:
    def buckets(before: int, exact: bool) -> torch.Tensor:
        where = BucketedPositions(
            rows, before, 0 if causal else before, reach=rows + before, heads=1, scale=1.0, causal=causal, exact=exact
        )
        return where.buckets

    exact, shifted, alone = buckets(4, True), buckets(4, False), buckets(0, True)
    assert torch.equal(alone, buckets(0, False))
    # The same token is at distance 0; in the reference it is at the distance of the extension.
    assert (exact.diagonal(4) == 0).all()
    assert torch.equal(exact[:, 4 : 4 + rows], shifted[:, :rows])
    assert int(exact.min()) == 0 and int(exact.max()) < 16
