"""A model on paper with another attention, and the mechanisms that a plan compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from attnzoo.masks import SlidingWindow, longformer
from attnzoo.planning.attention import Attention, Latent, Softmax
from attnzoo.planning.model import Model
from attnzoo.planning.recurrent import Recurrent
from attnzoo.specs import GQA, MLA, Linear, Spec

Candidate = tuple[str, Spec | None, Callable[[], Model]]  # name, what names it, how to make it

LATENT, ROPE = 512, 64  # DeepSeek-V2's and V3's


def with_spec(model: Model, spec: Spec) -> Model:
    """The model with the attention that `spec` names in every layer; what is None stays as the model has it.

    There may be more KV heads than the model has. An MLA that the model has not takes 512 + 64 numbers a token, and
    the model's head_dim for `qk_nope_head_dim` and `v_head_dim`, with queries straight from the hidden state; a GQA
    that a model with MLA has not takes its `v_head_dim` as head_dim.

    Raises:
        ValueError: for KV heads that do not divide the model's query heads, and for a spec that is not planned.
    """
    changes: dict[type[Spec], Callable[..., Attention]] = {GQA: _grouped, MLA: _latent, Linear: _linear}
    change = changes.get(type(spec))
    if change is None:
        raise ValueError(f"spec must be one of {sorted(kind.mechanism for kind in changes)}, got {spec.mechanism!r}")
    return _each(model, lambda attention: change(attention, spec))


def with_int8(model: Model) -> Model:
    """The model with int8 caches, but in layers whose window bounds them: there is no int8 ring."""
    return _each(model, _int8)


def mechanisms(model: Model, *, window: int, global_tokens: int) -> list[Candidate]:
    """What is compared, the model as it is first. Making one may raise a ValueError."""
    specs: list[tuple[str, Spec]] = [("MHA", GQA(_heads(model)))]
    specs += [(f"GQA-{heads}", GQA(heads)) for heads in (8, 4, 2)]
    specs += [("MQA", GQA(1)), (f"MLA {LATENT}+{ROPE}", MLA(LATENT, qk_rope_head_dim=ROPE))]
    specs += [
        (f"window {window}", GQA(mask=SlidingWindow(window))),
        (f"sparse {window}+{global_tokens}", GQA(mask=longformer(window, global_tokens, causal=True))),
        ("linear", Linear()),
        ("linear + window 64", Linear(feature_map="hedgehog", window=64)),
    ]
    made = [(name, spec, partial(with_spec, model, spec)) for name, spec in specs]
    return [("as it is", None, lambda: model), ("int8 KV cache", None, partial(with_int8, model)), *made]


def _heads(model: Model) -> int:
    return _as_softmax(model.layers[0].attention).num_heads


def _each(model: Model, change: Callable[[Attention], Attention]) -> Model:
    changed = {attention: change(attention) for attention in model.attentions}
    return replace(model, layers=tuple(replace(layer, attention=changed[layer.attention]) for layer in model.layers))


def _grouped(attention: Attention, spec: GQA) -> Attention:
    if isinstance(attention, Latent) and spec.num_kv_heads is None:
        return attention if spec.mask is None else replace(attention, mask=spec.mask)
    softmax = _as_softmax(attention)
    heads = softmax.num_kv_heads if spec.num_kv_heads is None else spec.num_kv_heads
    if softmax.num_heads % heads:
        raise ValueError(f"num_kv_heads must divide {softmax.num_heads} heads, got {heads}")
    return replace(softmax, num_kv_heads=heads, mask=softmax.mask if spec.mask is None else spec.mask)


def _latent(attention: Attention, spec: MLA) -> Attention:
    if isinstance(attention, Latent):
        start = attention
    else:
        softmax = _as_softmax(attention)
        start = Latent(
            softmax.num_heads, LATENT, softmax.head_dim, ROPE, softmax.v_head_dim, mask=softmax.mask, int8=softmax.int8
        )
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank", "mask")
    return replace(start, **{name: value for name in names if (value := getattr(spec, name)) is not None})


def _linear(attention: Attention, spec: Linear) -> Attention:
    softmax = _grouped(_as_softmax(attention), GQA(spec.num_kv_heads))
    assert isinstance(softmax, Softmax)
    projections = replace(softmax, mask=None, sinks=False, int8=False)
    return Recurrent(projections, spec.feature_map, spec.num_features, spec.normalize, spec.window)


def _int8(attention: Attention) -> Attention:
    if isinstance(attention, Softmax | Latent) and attention.bounded is False:
        return replace(attention, int8=True)
    return attention


def _as_softmax(attention: Attention) -> Softmax:
    if isinstance(attention, Softmax):
        return attention
    assert isinstance(attention, Latent)
    return Softmax(
        attention.num_heads, attention.num_heads, attention.v_head_dim, attention.v_head_dim, mask=attention.mask
    )
