import pytest
import torch

from attnzoo.conversion import merge_heads
from attnzoo.conversion.families import ConversionError, Projections

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def random_layer(kv_heads: int, dtype: torch.dtype = torch.float32, *, heads: int = 24, seed: int = 0) -> Projections:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    d, dim = 5, 29
    weights = draw(heads, d, dim), draw(kv_heads, d, dim), draw(kv_heads, d, dim), draw(dim, heads, d)
    return Projections(*weights, draw(heads, d), draw(kv_heads, d), draw(kv_heads, d), draw(dim))


def repeated(p: Projections, times: int) -> Projections:
    parts = (t.repeat_interleave(times, dim=0) for t in (p.k, p.v, p.k_bias, p.v_bias))
    k, v, k_bias, v_bias = parts
    return Projections(p.q, k, v, p.o, p.q_bias, k_bias, v_bias, p.o_bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [2, 3, 8])
@pytest.mark.parametrize("method", ["mean", "first"])
def test_duplicated_heads_come_back_bit_for_bit(dtype, group, method):
    few = random_layer(3, dtype)
    merged = merge_heads(repeated(few, group), 3, method)
    for name in ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias"):
        assert torch.equal(getattr(merged, name), getattr(few, name)), name
        assert getattr(merged, name).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_is_the_mean_of_contiguous_groups_rounded_once(dtype):
    layer = random_layer(6, dtype)
    merged = merge_heads(layer, 2)
    for name in ("k", "v", "k_bias", "v_bias"):
        exact = getattr(layer, name).double().unflatten(0, (2, 3)).mean(1)
        # Half a unit in the last place of the dtype, and the fp32 sum's own rounding.
        error = (getattr(merged, name).double() - exact).abs()
        assert (error <= exact.abs() * (0.51 * torch.finfo(dtype).eps) + 3e-7).all(), name


def test_mean_in_fp16_does_not_overflow_where_the_sum_would():
    layer = random_layer(8, torch.float16)
    layer.k.fill_(60000.0)
    assert (merge_heads(layer, 1).k == 60000.0).all()


def test_first_takes_the_first_head_of_each_group():
    layer = random_layer(6)
    merged = merge_heads(layer, 2, "first")
    for name in ("k", "v", "k_bias", "v_bias"):
        assert torch.equal(getattr(merged, name), getattr(layer, name)[[0, 3]]), name


def test_random_has_the_scale_of_the_weights_and_no_biases():
    layer = random_layer(8)
    layer = Projections(layer.q, layer.k * 0.03, layer.v * 7, layer.o, None, layer.k_bias, layer.v_bias)
    merged = merge_heads(layer, 4, "random")
    for name in ("k", "v"):
        assert getattr(merged, name).std().item() == pytest.approx(getattr(layer, name).std().item(), rel=0.1), name
        assert abs(getattr(merged, name).mean()) < 0.15 * getattr(merged, name).std()
    assert not merged.k_bias.any() and not merged.v_bias.any()
    assert merged.k_bias.shape == (4, 5)


def test_random_depends_on_seed_and_layer_alone():
    layer = random_layer(8)

    def k(**of):
        return merge_heads(layer, 2, "random", **of).k

    assert torch.equal(k(seed=3, layer=1), k(seed=3, layer=1))
    assert not torch.equal(k(seed=3, layer=1), k(seed=3, layer=2))
    assert not torch.equal(k(seed=3, layer=1), k(seed=4, layer=1))
    assert not torch.equal(k(), merge_heads(layer, 2, "random").v)


@pytest.mark.parametrize("method", ["mean", "first", "random"])
def test_the_same_number_of_heads_changes_nothing(method):
    layer = random_layer(6)
    assert merge_heads(layer, 6, method) is layer


def test_absent_biases_stay_absent():
    layer = random_layer(6)
    merged = merge_heads(Projections(layer.q, layer.k, layer.v, layer.o), 2)
    assert merged.k_bias is None and merged.v_bias is None and merged.k.shape == (2, 5, 29)


def test_bad_requests_are_named_with_what_is_allowed():
    layer = random_layer(6)
    for bad in (4, 0, -1, 12):
        with pytest.raises(ConversionError, match=r"6 KV heads.*1, 2, 3, 6"):
            merge_heads(layer, bad)
    with pytest.raises(ConversionError, match="one of mean, first, random, got 'median'"):
        merge_heads(layer, 2, "median")
