"""attnzoo.swap on plain PyTorch: torch.nn.MultiheadAttention and torch's Transformer layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo import GQA, Linear
from attnzoo.hf.torch_modules import TorchAttention
from attnzoo.masks import Causal, SlidingWindow

EXACT = {"atol": 1e-12, "rtol": 1e-10}
SIZES = {"d_model": 32, "nhead": 4, "dim_feedforward": 48, "dtype": torch.float64}


def causal(length):
    return nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 12, "vdim": 20}])
def test_a_spec_that_changes_nothing_gives_torchs_output_under_every_mask(batch_first, options):
    torch.manual_seed(0)
    old = nn.MultiheadAttention(32, 4, batch_first=batch_first, dtype=torch.float64, **options).eval()
    new = attnzoo.swap(old, GQA())
    q = torch.randn(3, 5, 32, dtype=torch.float64)
    k = torch.randn(3, 7, options.get("kdim", 32), dtype=torch.float64)
    v = torch.randn(3, 7, options.get("vdim", 32), dtype=torch.float64)
    pad = torch.arange(7)[None] >= torch.tensor([7, 4, 2])[:, None]
    hidden = torch.rand(12, 5, 7) < 0.3
    hidden[..., 0] = False
    additive = torch.zeros(5, 7, dtype=torch.float64).masked_fill(hidden[0], -torch.inf)
    if not batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    for masks in (
        {},
        {"key_padding_mask": pad},
        {"attn_mask": hidden},
        {"attn_mask": hidden[0], "key_padding_mask": pad},
        {"attn_mask": additive, "key_padding_mask": torch.zeros(3, 7).double().masked_fill(pad, -torch.inf)},
    ):
        want = old(q, k, v, need_weights=False, **masks)[0]
        got, weights = new(q, k, v, **masks)
        assert weights is None
        torch.testing.assert_close(got, want, **EXACT)
    one = [t[0] if batch_first else t[:, 0] for t in (q, k, v)]
    torch.testing.assert_close(new(*one)[0], old(*one, need_weights=False)[0], **EXACT)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_transformer_layers_give_the_same_and_never_go_around_the_swapped_module(batch_first, mode):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(**SIZES, dropout=0.0, batch_first=batch_first), 2, enable_nested_tensor=batch_first
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**SIZES, dropout=0.0, batch_first=batch_first), 2)
    src, tgt = torch.randn(3, 7, 32, dtype=torch.float64), torch.randn(3, 5, 32, dtype=torch.float64)
    pad = torch.arange(7)[None] >= torch.tensor([7, 4, 2])[:, None]
    if not batch_first:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)

    def run():
        getattr(encoder, mode)(), getattr(decoder, mode)()
        with torch.inference_mode(mode == "eval"):
            memory = encoder(src, src_key_padding_mask=pad)
            return memory, decoder(tgt, memory, tgt_mask=causal(5), memory_key_padding_mask=pad, tgt_is_causal=True)

    want = run()
    assert attnzoo.swap(encoder, GQA()) is encoder
    attnzoo.swap(decoder, GQA())
    got = run()
    real = ~pad if batch_first else ~pad.T
    torch.testing.assert_close(got[0][real], want[0][real], **EXACT)
    torch.testing.assert_close(got[1], want[1], **EXACT)
    for layer in encoder.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    assert (run()[0] - got[0]).abs().max() > 1e-3
    assert len([m for m in decoder.modules() if isinstance(m, TorchAttention)]) == 4


def test_heads_that_were_duplicated_merge_without_a_change_and_specs_may_differ():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**SIZES, batch_first=True), 2).eval()
    for layer in encoder.layers:
        for part in (layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias):
            keys = part.data[32:].unflatten(0, (2, 2, 2, 8))
            keys.copy_(keys[:, :, :1].expand_as(keys).clone())
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    want = encoder(x).detach()
    attnzoo.swap(encoder, [GQA(2), GQA()])
    torch.testing.assert_close(encoder(x), want, **EXACT)
    assert [layer.self_attn.k_proj.out_features for layer in encoder.layers] == [16, 32]
    attnzoo.swap(encoder, GQA(mask=SlidingWindow(2, 1)))
    assert [layer.self_attn.num_kv_heads for layer in encoder.layers] == [2, 4]
    moved = x.clone()
    moved[:, 5] += 1
    changed = (encoder(moved) - encoder(x)).abs().amax(-1) > 1e-9
    assert changed[:, 3:].all() and not changed[:, :3].any()


def test_a_mask_of_the_module_comes_on_top_of_those_of_a_call():
    torch.manual_seed(0)
    old = nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    new = attnzoo.swap(old, GQA(mask=SlidingWindow(3)))
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    hidden = ~SlidingWindow(3).dense(6, 6)
    want = old(x, x, x, attn_mask=hidden, need_weights=False)[0]
    torch.testing.assert_close(new(x, x, x)[0], want, **EXACT)
    torch.testing.assert_close(new(x, x, x, attn_mask=causal(6), is_causal=True)[0], want, **EXACT)
    torch.testing.assert_close(new(x, x, x, attn_mask=~Causal().dense(6, 6))[0], want, **EXACT)


def test_what_the_module_cannot_do_is_refused():
    old = nn.MultiheadAttention(32, 4, batch_first=True)
    new, x = attnzoo.swap(old, GQA(2)), torch.randn(2, 6, 32)
    with pytest.raises(ValueError, match="need_weights"):
        new(x, x, x, need_weights=True)
    with pytest.raises(ValueError, match="attn_mask must be bool"):
        new(x, x, x, attn_mask=torch.full((6, 6), -0.5))
    with pytest.raises(ValueError, match="is_causal"):
        new(x, x, x, is_causal=True)
    model = nn.Sequential(nn.MultiheadAttention(32, 4), nn.MultiheadAttention(32, 4, add_bias_kv=True))
    for spec, message in [(GQA(), "bias_k"), (Linear(), "must be a GQA"), (GQA(3), "divide"), ([GQA()], "lists 1")]:
        with pytest.raises(ValueError, match=message):
            attnzoo.swap(model, spec)
        assert isinstance(model[0], nn.MultiheadAttention)
