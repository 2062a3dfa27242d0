"""What a model family is: where its checkpoints keep q, k, v and o, and how its config counts heads.

A family works on config.json dictionaries and tensors alone, so that a checkpoint converts without its model class.
"""

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnzoo.conversion.errors import ConversionError, Refusal
from attnzoo.conversion.families.code import Code
from attnzoo.conversion.rotary import Layout, Rotary
from attnzoo.masks import Causal, Mask, SlidingWindow

Config = dict[str, Any]


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model's attention; `dim` is the hidden size, which need not be num_heads * head_dim."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dim: int


@dataclass(frozen=True, eq=False)
class Projections:
    """One layer's attention weights with the storage undone; any dtype and device.

    q `[Hq, D, dim]`, k and v `[Hk, D, dim]`, o `[dim, Hq, D]`; q_bias `[Hq, D]`, k_bias and v_bias `[Hk, D]`,
    o_bias `[dim]`, q_norm and k_norm (weights of norms of each head) `[D]`, or `[Hq, D]` and `[Hk, D]` where a head has
    its own; each None where the model has none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True)
class Move:
    """How a tensor outside of the attention weights comes about: `make` of the old checkpoint's tensors `sources`.

    It is stored in the shard, and in the dtype, of the first of them. `make` runs on meta tensors too.
    """

    sources: tuple[str, ...]
    make: Callable[..., Tensor] = lambda tensor: tensor


class Family(ABC):
    """One storage of attention weights; `split` and `join` are exact inverses.

    Names are those of a stock transformers class: `base` is the path of the base model inside the *ForCausalLM,
    `attention` the path of a layer's attention inside the base model, `required` and `optional` the tensors in there,
    `outside` tensors that every base model has outside its layers, `varied` beginnings of names inside a layer that not
    every layer has.
    """

    model_type: str
    base: str = "model."
    attention: str = "layers.{layer}.self_attn"
    outside: tuple[str, ...] = ("embed_tokens.weight", "norm.weight")
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    varied: tuple[str, ...] = ()
    # Not weights: tables that old checkpoints store beside them. They are carried over as they are.
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    # What lies beside the weights of models that no stock class holds.
    code: Code | None = None
    # Whether one norm runs over the channels of all heads together, so that its statistics are theirs (OLMo2).
    joint_norm: bool = False
    # What is added to the weights of heads' norms (Gemma), and whether these subtract a head's mean (Cohere).
    norm_offset: float = 0.0
    centred_norm: bool = False
    # How RoPE pairs the dimensions of a head (None: there is none), and which part of them where no key says it.
    rope: Layout | None = "half"
    rotated: float = 1.0

    def rotary(self, config: Config, layer: int) -> Rotary:
        """What RoPE turns in a layer's heads."""
        if self.rope is None:
            return Rotary()
        keys = (config, config.get("rope_parameters") or {})
        found = (where.get(key) for where in keys for key in ("partial_rotary_factor", "rotary_pct"))
        part = next((value for value in found if value is not None), self.rotated)
        size = int(self.geometry(config).head_dim * part)
        return Rotary(size + size % 2, self.rope)  # one frequency for every second dimension, which turns two

    @abstractmethod
    def geometry(self, config: Config) -> Geometry:
        """The sizes that a config.json dictionary gives; raises ConversionError where a key is missing or odd."""

    @abstractmethod
    def split(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> Projections:
        """Undo the storage: names inside the attention module -> Projections, as views where the storage allows.

        Raises ConversionError for a missing or unexpected name, or a shape that is not the geometry's.
        """

    @abstractmethod
    def join(self, projections: Projections, geometry: Geometry) -> dict[str, Tensor]:
        """The inverse of `split`: contiguous tensors under the same names."""

    @abstractmethod
    def _hold_kv_heads(self, config: Config, num_kv_heads: int) -> Config:
        """Change `config`, a copy, to hold fewer KV heads, and return it; raises Refusal where nothing holds them."""

    def with_kv_heads(self, config: Config, num_kv_heads: int) -> Config:
        """A new config of the stock family that holds `num_kv_heads`; its model_type may be another than the given one.

        The number that the model has changes nothing, in any family. Raises ConversionError for a number that does not
        divide the model's KV heads, Refusal where no stock class holds it.
        """
        have = self.geometry(config).num_kv_heads
        if not isinstance(num_kv_heads, int) or num_kv_heads < 1 or have % num_kv_heads:
            allowed = ", ".join(str(n) for n in range(1, have + 1) if have % n == 0)
            raise ConversionError(
                f"num_kv_heads must divide the model's {have} KV heads, so be one of {allowed}; got {num_kv_heads!r}"
            )
        config = copy.deepcopy(config)
        return config if num_kv_heads == have else self._hold_kv_heads(config, num_kv_heads)

    def with_mask(self, config: Config, mask: Mask) -> Config:
        """A new config of the same family whose every layer has `mask`; raises Refusal where the class has none."""
        stock = type(mask) in (Causal, SlidingWindow) and mask.causal
        if config.get("use_bidirectional_attention") or not stock:
            raise Refusal(f"no stock {self.model_type} config holds mask={mask!r}; attnzoo.swap holds it in memory")
        window = mask.window if isinstance(mask, SlidingWindow) else None
        return self._hold_window(copy.deepcopy(config), window)

    def _hold_window(self, config: Config, window: int | None) -> Config:
        if window is None:
            return config
        raise Refusal(
            f"the stock {self.model_type} class has no sliding window (mistral, phi3, qwen2, qwen3 and gemma2 have "
            "one for every layer); attnzoo.swap holds it in memory"
        )

    def attentions(self, geometry: Geometry) -> int:
        """How many attention modules of these sizes a model has; they are numbered from 0."""
        return geometry.num_layers

    def path(self, number: int) -> str:
        """The module path of an attention inside the base model."""
        return self.attention.format(layer=number)

    def attention_path(self, number: int) -> str:
        """The module path of an attention inside the *ForCausalLM."""
        return self.base + self.path(number)

    def locate(self, name: str) -> tuple[int, str] | None:
        """(attention, name inside its module) of a checkpoint's tensor, or None where it is not attention's.

        Files saved from the base model alone have no `base` prefix (GPT-2's on the hub: "h.0.attn.c_attn.weight").
        """
        path = re.escape(self.attention).replace(r"\{layer\}", r"(\d+)")
        match = re.fullmatch(rf"(?:{re.escape(self.base)})?{path}\.(.+)", name)
        return (int(match[1]), match[2]) if match else None

    def moves(self, names: Iterable[str], holder: "Family") -> dict[str, Move]:
        """The tensors that the family `holder` has besides the attention weights, out of those of here, `names`.

        A name that is no move's source is left behind. For its own kind a family keeps all as they are.
        """
        return {name: Move((name,)) for name in names}

    def beside(self, number: int, holder: "Family") -> dict[str, str]:
        """What `house` needs besides an attention's weights: its word for a tensor -> name inside the base model."""
        return {}

    def house(
        self, projections: Projections, beside: Mapping[str, Tensor], holder: "Family", config: Config
    ) -> dict[str, Tensor]:
        """An attention's weights as the family `holder` stores them, for its `config`; perhaps more than its `join`."""
        return holder.join(projections, holder.geometry(config))

    def check_names(self, names: Mapping[str, Tensor]) -> None:
        """Raise ConversionError where a required name is missing, or one is neither a weight nor a known buffer."""
        for name in self.required:
            if name not in names:
                raise ConversionError(f"a {self.model_type} attention needs {name}, and it is missing")
        known = {*self.required, *self.optional, *self.buffers}
        for name in names:
            if name not in known:
                raise ConversionError(
                    f"{name} is not a tensor of a plain {self.model_type} attention, which has "
                    f"{', '.join(sorted(known))}; adapters have to be merged and quantised weights dequantised first"
                )


def shaped(tensors: Mapping[str, Tensor], name: str, *shape: int, stored: tuple[int, ...] | None = None) -> Tensor:
    """`tensors[name]` viewed as `shape`; `stored` is the shape it must have (default: the first two dims folded)."""
    tensor = tensors[name]
    if stored is None:
        stored = (shape[0] * shape[1], *shape[2:]) if len(shape) > 1 else shape
    if tuple(tensor.shape) != stored:
        raise ConversionError(f"{name} has shape {list(tensor.shape)}, its config says {list(stored)}")
    return tensor.reshape(shape)


def whole(config: Config, *keys: str, default: int | None = None) -> int:
    """The positive integer under the first of `keys` that the config has."""
    value = next((config[key] for key in keys if config.get(key) is not None), default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConversionError(f"config.json needs a positive integer {keys[0]!r}, got {value!r}")
    return value


def stock_geometry(config: Config, kv_heads: int | None = None, head_dim: int | None = None) -> Geometry:
    """The geometry of a config with `num_key_value_heads`; the arguments are its class's defaults for absent keys."""
    heads, dim = whole(config, "num_attention_heads"), whole(config, "hidden_size")
    # An absent key means the class's default, null means "as many as queries" and "dim // heads".
    kv_heads = whole(
        config, "num_key_value_heads", default=heads if "num_key_value_heads" in config else kv_heads or heads
    )
    head_dim = whole(config, "head_dim", default=dim // heads if "head_dim" in config else head_dim or dim // heads)
    if heads % kv_heads:
        raise ConversionError(f"config.json has {heads} attention heads, not a multiple of its {kv_heads} KV heads")
    return Geometry(whole(config, "num_hidden_layers"), heads, kv_heads, head_dim, dim)
