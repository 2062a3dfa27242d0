"""`attnzoo.swap` for plain PyTorch: each `torch.nn.MultiheadAttention` becomes a `TorchAttention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from attnzoo import ops
from attnzoo.masks import Mask
from attnzoo.specs import GQA, Spec

Module = TypeVar("Module", bound=nn.Module)


class TorchAttention(nn.Module):
    """Grouped-query attention with the call of `torch.nn.MultiheadAttention`, and weights of one.

    Parameters are `q_proj k_proj v_proj o_proj`. A query that sees no key gives the output's bias, where torch gives
    NaN. torch's Transformer layers do not take their fast path with it, which would go around it.

    Args:
        old: the module whose weights it takes; KV heads are merged to their group's mean (arXiv 2305.13245).
        spec: number of KV heads, and a mask that comes on top of those of a call (on queries and keys of one sequence).

    Raises:
        ValueError: for heads that do not divide, bias_k, bias_v or add_zero_attn.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kdim: int
    vdim: int
    batch_first: bool
    dropout: float
    mask: Mask | None

    def __init__(self, old: nn.MultiheadAttention | TorchAttention, spec: GQA) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = old.embed_dim, old.num_heads, old.head_dim
        self.kdim, self.vdim, self.batch_first, self.dropout = old.kdim, old.vdim, old.batch_first, old.dropout
        have = old.num_kv_heads if isinstance(old, TorchAttention) else old.num_heads
        self.num_kv_heads = have if spec.num_kv_heads is None else spec.num_kv_heads
        if have % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide the module's {have} KV heads; got {self.num_kv_heads}")
        self.mask = spec.mask if spec.mask is not None else getattr(old, "mask", None)
        if self.mask is not None and self.mask.heads not in (None, self.num_heads):
            raise ValueError(f"mask is made for {self.mask.heads} heads; the module has {self.num_heads}")
        # What torch's layers look at before they go the fast path, which reads weights and calls no module.
        self._qkv_same_embed_dim, self.in_proj_bias, self.in_proj_weight = False, None, None
        for name, (weight, bias, trained) in _weights(old).items():
            if name in ("k_proj", "v_proj"):
                weight = _merged(weight, have, self.num_kv_heads)
                bias = None if bias is None else _merged(bias, have, self.num_kv_heads)
            setattr(self, name, _linear(weight, bias, trained))
        self.train(old.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As of `torch.nn.MultiheadAttention`, but for the weights.

        Args:
            query, key, value: `[S, B, E]`, `[B, S, E]` with batch_first, or `[S, E]`.
            key_padding_mask: `[B, Sk]` or `[Sk]`: True, or -inf, at keys to ignore.
            need_weights: False; the weights are never formed.
            attn_mask: `[Sq, Sk]` or `[B * num_heads, Sq, Sk]`: True, or -inf, where a query must not see a key.
            average_attn_weights: not used.
            is_causal: says that `attn_mask` is causal; the mask itself is what counts.

        Returns:
            (output in the query's layout, None).

        Raises:
            ValueError: for need_weights, masks with other values than 0 and -inf, is_causal without a mask.
        """
        if need_weights:
            raise ValueError("need_weights must be False: TorchAttention never forms the attention weights; got True")
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is True without an attn_mask, which torch.nn.MultiheadAttention needs too")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q = self.q_proj(query).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.k_proj(key).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(value).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        mask = self._visible(q, k, key_padding_mask, attn_mask)
        out = ops.attention(q, k, v, mask=mask, dropout_p=self.dropout if self.training else 0.0)
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _visible(
        self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor | Mask | None:
        """What is visible after the masks of a call and the module's own; bool `[B | 1, H | 1, Sq, Sk]` if need be."""
        queries, keys = q.shape[2], k.shape[2]
        seen: Tensor | None = None
        if key_padding_mask is not None:
            seen = ~_hidden("key_padding_mask", key_padding_mask)[:, None, None, :]
        if attn_mask is not None:
            free = ~_hidden("attn_mask", attn_mask)
            free = free.unflatten(0, (-1, self.num_heads)) if free.dim() == 3 else free[None, None]
            seen = free if seen is None else seen & free
        if seen is None:
            return self.mask
        if self.mask is not None:
            seen = seen & self.mask.dense(queries, keys, device=q.device)
        return seen.expand(-1, -1, queries, keys)


def has_torch_attention(model: nn.Module) -> bool:
    """Whether there is a module in it that `swap_torch` replaces."""
    return isinstance(model, nn.Module) and any(_swappable(module) for module in model.modules())


def swap_torch(model: Module, spec: Spec | Sequence[Spec]) -> Module:
    """Replace each `torch.nn.MultiheadAttention` in `model`, in the order of `model.modules()`; see `attnzoo.swap`."""
    old = [(name, module) for name, module in model.named_modules(remove_duplicate=True) if _swappable(module)]
    specs = [spec] * len(old) if isinstance(spec, Spec) else list(spec)
    if len(specs) != len(old):
        raise ValueError(f"spec lists {len(specs)} layers, the model has {len(old)} attention modules")
    for one in specs:
        if not isinstance(one, GQA):
            raise ValueError(f"spec must be a GQA for torch.nn.MultiheadAttention, or a list of them; got {one!r}")
    new = {id(module): TorchAttention(module, one) for (_, module), one in zip(old, specs, strict=True)}  # type: ignore[arg-type]
    for module in list(model.modules()):
        for name, child in module.named_children():
            if id(child) in new:
                setattr(module, name, new[id(child)])
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return new.get(id(model), model)  # type: ignore[return-value]


def _swappable(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention | TorchAttention)


def _weights(old: nn.MultiheadAttention | TorchAttention) -> dict[str, tuple[Tensor, Tensor | None, bool]]:
    """Weight, bias and whether they are trained, of each projection."""
    if isinstance(old, TorchAttention):
        layers = {name: getattr(old, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        return {name: (p.weight, p.bias, p.weight.requires_grad) for name, p in layers.items()}
    if old.bias_k is not None or old.bias_v is not None or old.add_zero_attn:
        raise ValueError("model must have no bias_k, bias_v and add_zero_attn in its torch.nn.MultiheadAttention")
    biases = (None, None, None) if old.in_proj_bias is None else old.in_proj_bias.chunk(3)
    if old._qkv_same_embed_dim:
        weights, trained = old.in_proj_weight.chunk(3), [old.in_proj_weight.requires_grad] * 3
    else:
        weights = old.q_proj_weight, old.k_proj_weight, old.v_proj_weight
        trained = [weight.requires_grad for weight in weights]
    out = old.out_proj
    return {
        **{f"{part}_proj": (weights[n], biases[n], trained[n]) for n, part in enumerate("qkv")},
        "o_proj": (out.weight, out.bias, out.weight.requires_grad),
    }


def _merged(t: Tensor, have: int, want: int) -> Tensor:
    """Heads `[have * D, ...]` to the means of their groups, `[want * D, ...]`."""
    return t.detach().unflatten(0, (want, have // want, -1)).mean(1).flatten(0, 1)


def _linear(weight: Tensor, bias: Tensor | None, trained: bool) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=trained)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=trained)
    return linear


def _hidden(name: str, mask: Tensor) -> Tensor:
    """A mask of torch's as bool, True where hidden."""
    if mask.dtype == torch.bool:
        return mask
    hidden = mask == -torch.inf
    if not bool((hidden | (mask == 0)).all()):
        raise ValueError(f"{name} must be bool, or floating point with 0 and -inf only; got other values")
    return hidden
