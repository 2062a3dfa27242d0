"""Latent weights out of grouped ones, as mathematics: no model."""

from __future__ import annotations

import pytest
import torch

from attnzoo.conversion.latent import Inputs, RopePart, distance_blind, latent_weights, planes_of
from attnzoo.conversion.moments import Moments
from tests.conversion.latent.naive import grouped, latent, projections

DIM, TOKENS, SCALE = 24, 11, 0.3


def frequencies(half):
    return 10.0 ** -torch.linspace(0, 3, half, dtype=torch.float64) if half else torch.zeros(0, dtype=torch.float64)


def text(seed=1, rows=1, tokens=TOKENS):
    """Inputs whose directions differ in size, around a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, tokens, DIM, generator=generator, dtype=torch.float64)
    return x * torch.logspace(0.5, -1.5, DIM, dtype=torch.float64) + 0.3


def seen(p, freq, x):
    """Moments of inputs `[rows, S, DIM]`, by token and by the attention that each receives."""
    asking, attended = Moments(DIM), Moments(DIM)
    for row in x:
        asking.add(row)
        attended.add(row, grouped(p, row, freq, SCALE)[1].sum((0, 1)))
    return Inputs(asking.second(), attended.second())


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "rotary_dim"), [(4, 4, 6), (6, 3, 6), (3, 1, 4), (6, 2, 4), (4, 2, 0)])
def test_planes_of_all_heads_and_a_full_rank_are_exact(heads, kv_heads, rotary_dim, biases, calibrated):
    head_dim = 6
    p = projections(heads, kv_heads, head_dim, DIM, biases=biases)
    freq, x = frequencies(rotary_dim // 2), text()
    inputs = seen(p, freq, x).damped() if calibrated else Inputs.unknown(DIM)
    planes = tuple(sorted(list(range(rotary_dim // 2)) * kv_heads))
    rope = RopePart(rotary_dim, planes, distance_blind(freq, TOKENS))
    rank = min(DIM, kv_heads * (head_dim - rotary_dim + head_dim))
    w = latent_weights(p, inputs, rope, rank=rank, nope=head_dim, scale=SCALE)
    want, _ = grouped(p, x[0], freq, SCALE)
    got = latent(w, x[0], heads, head_dim, freq[list(planes)], SCALE)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-8)


def test_a_latent_of_the_queries_at_their_rank_is_exact():
    p, freq, x = projections(4, 2, 6, DIM), frequencies(3), text()
    rope = RopePart(6, (0, 0, 1, 1, 2, 2), distance_blind(freq, TOKENS))
    w = latent_weights(p, Inputs.unknown(DIM), rope, rank=12, nope=2, scale=SCALE, q_rank=DIM)
    want, _ = grouped(p, x[0], freq, SCALE)
    torch.testing.assert_close(latent(w, x[0], 4, 2, freq[[0, 0, 1, 1, 2, 2]], SCALE), want, atol=1e-9, rtol=1e-8)


def test_heads_that_share_their_keys_up_to_a_turn_need_one_plane_a_frequency():
    p, freq = projections(4, 2, 6, DIM), frequencies(3)
    turned = torch.polar(torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([0.3, 1.0, -2.0]).double())
    z = torch.complex(p.k[0, :3], p.k[0, 3:]) * turned[:, None]
    p.k[1] = torch.cat([z.real, z.imag])
    planes = planes_of(p, Inputs.unknown(DIM), 6, SCALE)
    assert (planes.worth[:, 1] < 1e-12 * planes.worth[:, 0]).all()
    rope = RopePart(6, (0, 1, 2), distance_blind(freq, TOKENS))
    w = latent_weights(p, Inputs.unknown(DIM), rope, rank=12, nope=1, scale=SCALE)
    want, _ = grouped(p, text()[0], freq, SCALE)
    torch.testing.assert_close(latent(w, text()[0], 4, 1, freq, SCALE), want, atol=1e-9, rtol=1e-8)


def test_planes_come_in_the_order_of_their_worth_and_give_the_keys_back():
    p = projections(6, 3, 6, DIM, biases=True)
    planes = planes_of(p, seen(p, frequencies(3), text()), 6, SCALE)
    assert (planes.worth.diff(dim=1) <= 0).all()
    keys = torch.einsum("fhj,fjd->hfd", planes.mixing, planes.rows)
    wide = torch.cat([p.k, p.k_bias[..., None]], dim=-1)
    torch.testing.assert_close(torch.cat([keys.real, keys.imag], dim=1), wide, atol=1e-10, rtol=1e-10)


def test_the_text_lowers_the_error_on_text_of_its_kind():
    p, freq = projections(6, 3, 6, DIM), frequencies(3)
    rope = RopePart(6, (0, 1, 2), distance_blind(freq, TOKENS))
    inputs = seen(p, freq, text(seed=2, rows=40))
    errors = []
    for given in (Inputs.unknown(DIM), inputs.damped()):
        w = latent_weights(p, given, rope, rank=8, nope=6, scale=SCALE)
        differences = [latent(w, x, 6, 6, freq, SCALE) - grouped(p, x, freq, SCALE)[0] for x in text(seed=3, rows=4)]
        errors.append(torch.stack(differences).square().mean())
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("nope", [1, 2, 4])
def test_a_small_part_without_rope_keeps_the_planes_with_the_most_left(nope):
    p = projections(4, 2, 6, DIM)
    rope = RopePart(6, (0, 1, 2), torch.ones(3, dtype=torch.complex128))
    w = latent_weights(p, Inputs.unknown(DIM), rope, rank=20, nope=nope, scale=SCALE)
    lost = planes_of(p, Inputs.unknown(DIM), 6, SCALE).worth[:, 1]
    best = lost.argsort(descending=True)[: nope // 2].sort().values
    q_nope = w.q.unflatten(0, (4, -1))[:, :nope]
    want = p.q[:, torch.cat([best, best + 3])]
    torch.testing.assert_close(q_nope[:, : len(best) * 2], want)
    assert not q_nope[:, len(best) * 2 :].any()


def test_what_stands_for_a_dropped_rotation_is_near_one_for_slow_frequencies_and_near_zero_for_fast_ones():
    blind = distance_blind(torch.tensor([1e-6, 3.0]), 512)
    assert abs(blind[0] - 1) < 1e-3 and abs(blind[1]) < 0.3
    distances = torch.arange(512).double()
    want = (torch.exp(-3j * distances) / (1 + distances)).sum() / (1 / (1 + distances)).sum()
    torch.testing.assert_close(blind[1], want)
