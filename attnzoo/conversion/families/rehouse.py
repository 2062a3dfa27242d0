"""What families share whose model, with fewer KV heads, is held by another family's class."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.conversion.errors import Refusal
from attnzoo.conversion.families.base import Config, Family, Move, Projections

# What configs of all families call alike.
_COMMON = (
    "vocab_size",
    "use_cache",
    "initializer_range",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "id2label",
    "label2id",
    "problem_type",
    "num_labels",
    "_name_or_path",
    "attnzoo",
)


def common(config: Config, ours: str, theirs: str) -> Config:
    """The keys that mean the same to every family, and the architectures, whose names begin with `theirs` instead.

    Raises Refusal for an architecture that the other family has not.
    """
    kept = {key: config[key] for key in _COMMON if key in config}
    heads = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
    new = []
    for name in config.get("architectures") or ():
        if name.removeprefix(ours) not in heads:
            raise Refusal(f"{theirs}, which holds this with fewer KV heads, has no counterpart of {name}")
        new.append(theirs + name.removeprefix(ours))
    # Whose absence means other things to other classes.
    kept["tie_word_embeddings"] = bool(config.get("tie_word_embeddings"))
    return kept | ({"architectures": new} if new else {})


def rope(config: Config, part: float, theta: float = 10000.0) -> Config:
    """The config's RoPE in the words of Phi and Starcoder2; `part` and `theta` are what absent keys mean."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found: Config = {"rope_type": scaling.get("type", "default")}
    for key, word, default in (("rope_theta", "rotary_emb_base", theta), ("partial_rotary_factor", "rotary_pct", part)):
        found[key] = next((config[name] for name in (key, word) if config.get(name) is not None), default)
    found |= {key: value for key, value in scaling.items() if key != "type"}
    # Older transformers read them outside of the dictionary.
    return {"rope_parameters": found} | {key: found[key] for key in ("rope_theta", "partial_rotary_factor")}


def renamed(names: Iterable[str], old: Family, new: Family, table: Mapping[str, str]) -> dict[str, Move]:
    """Moves to other names, by what they begin with inside the base model, or inside a layer, as `table` has it.

    Tensors of the attention are left out; beginnings that are not in the table stay.
    """
    begin, new_begin = (family.attention.partition("{layer}")[0] for family in (old, new))
    moves = {}
    for name in names:
        if old.locate(name):
            continue
        base, layer, inner = "", "", name
        if inner.startswith(old.base):
            base, inner = new.base, inner.removeprefix(old.base)
        if inner.startswith(begin):
            number, _, inner = inner.removeprefix(begin).partition(".")
            layer = f"{new_begin}{number}."
        stem = next((word for word in table if inner.startswith(word)), "")
        moves[base + layer + table.get(stem, "") + inner.removeprefix(stem)] = Move((name,))
    return moves


def with_biases(p: Projections) -> Projections:
    """The same with zeros for the biases that it has not."""

    def bias(there: Tensor | None, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=p.q.dtype, device=p.q.device) if there is None else there

    return replace(
        p,
        q_bias=bias(p.q_bias, *p.q.shape[:2]),
        k_bias=bias(p.k_bias, *p.k.shape[:2]),
        v_bias=bias(p.v_bias, *p.v.shape[:2]),
        o_bias=bias(p.o_bias, p.o.shape[0]),
    )


def wide(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` computed in fp32 (fp64 where its first argument is), its result in the first argument's dtype."""

    def computed(first: Tensor, *rest: Any) -> Tensor:
        dtype = torch.promote_types(first.dtype, torch.float32)
        return function(first.to(dtype), *(tensor.to(dtype) for tensor in rest)).to(first.dtype)

    return computed


# A layer norm's scale and shift put into the linear layer behind it: W (n * scale + shift) + b.
scaled = wide(lambda weight, scale: weight * scale)
shifted = wide(lambda bias, weight, shift: bias + weight @ shift)
