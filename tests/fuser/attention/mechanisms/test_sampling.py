"""Randomized attention and LARA: what is sampled, and what training adds."""

from __future__ import annotations

import math

import pytest
import torch
from mechanism_cases import DIM, HEADS, make, tokens


@pytest.mark.parametrize("noise", ["multisample", "antithetics"])
@pytest.mark.parametrize("mis", ["mis-bh", "mis-biased"])
def test_twice_the_samples_without_noise_are_the_samples(noise: str, mis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make("lara", num_landmarks=5, mis_type=mis, **{f"use_{noise}": True}).double()
    expected = module.eval()(tokens())
    assert not torch.allclose(module.train()(tokens()), expected)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    torch.testing.assert_close(module(tokens()), expected, rtol=1e-10, atol=1e-10)


def test_antithetic_samples_are_symmetric_around_the_proposals() -> None:
    module = make("lara", num_landmarks=5, use_antithetics=True)
    mu = torch.randn(1, HEADS, 5, DIM // HEADS)
    omega, copies = module._sample(mu)
    assert copies == 2
    torch.testing.assert_close(omega[:, :, :5] + omega[:, :, 5:], 2 * mu)
    assert not torch.equal(omega[:, :, :5], mu)


def test_a_key_is_sampled_with_the_weights_of_attention() -> None:
    torch.manual_seed(0)
    module = make("ra").double().eval()
    many, width = 2000, DIM // HEADS
    q, k = (torch.randn(1, HEADS, 6, width).double() for _ in range(2))
    hidden = torch.tensor([[False] * 4 + [True] * 2])
    drawn = module._key(q.expand(many, -1, -1, -1), k.expand(many, -1, -1, -1), hidden.expand(many, -1))
    weights = (q @ k.mT / math.sqrt(width)).masked_fill(hidden, -math.inf).softmax(-1)
    shares = (drawn.unsqueeze(3) == k.unsqueeze(2)).all(-1).double().mean(0, keepdim=True)
    # Five standard deviations of a share of so many draws, at most.
    assert float((shares - weights).abs().max()) < 5 * 0.5 / math.sqrt(many)
    assert float(shares[..., 4:].max()) == 0


def test_randomized_attention_estimates_softmax_attention_without_bias() -> None:
    # Of heads of one channel: the reference scales noise by D^-½ in place of D^-¼, which biases wider ones.
    torch.manual_seed(0)
    module = make("ra").double().train()
    module.scale = 1.0
    q, k, v = (0.7 * torch.randn(1, 1, 5, 1).double() for _ in range(3))
    samples = module.attend(*(t.expand(3000, -1, -1, -1) for t in (q, k, v)), None)
    want = (q @ k.mT).softmax(-1) @ v
    deviation = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - want[0]).abs() < 5 * deviation).all()
    assert float(deviation.max()) < 0.02


def test_segments_of_landmarks_differ_by_one_token() -> None:
    module = make("lara", num_landmarks=5)
    x = tokens(1, 23)[:, None]
    means = module._landmarks_of_sequence(x)
    sizes = [4, 4, 5, 5, 5]
    want = torch.stack([part.mean(1) for part in x[:, 0].split(sizes, 1)], 1)[:, None]
    torch.testing.assert_close(means, want)
    assert torch.equal(module._landmarks_of_sequence(x[:, :, :4]), x[:, :, :4])
