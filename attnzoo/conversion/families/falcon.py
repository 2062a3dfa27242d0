"""Falcon: one fused layer in three layouts, which all are `Fused`'s; the newest holds any number of KV heads."""

from attnzoo.conversion.errors import Refusal
from attnzoo.conversion.families.base import Config, Geometry, stock_geometry, whole
from attnzoo.conversion.families.fused import Fused
from attnzoo.conversion.rotary import Rotary


class Falcon(Fused):
    """`query_key_value` and `dense`. RoPE in halves, or ALiBi, which no conversion of KV heads touches.

    The stock class repeats the heads of its newest layout before it caches them; with one head in the older layout
    (`multi_query`) the cache is one head's.
    """

    model_type = "falcon"
    base = "transformer."
    attention = "h.{layer}.self_attention"
    outside = ("word_embeddings.weight", "ln_f.weight", "ln_f.bias")

    def geometry(self, config: Config) -> Geometry:
        heads = whole(config, "num_attention_heads", "n_head")
        kv_heads = whole(config, "num_kv_heads", "n_head_kv", default=heads)
        if not config.get("new_decoder_architecture", False):
            kv_heads = 1 if config.get("multi_query", True) else heads
        sizes = {"num_hidden_layers": whole(config, "num_hidden_layers", "n_layer")}
        sizes |= {"hidden_size": whole(config, "hidden_size", "n_embed")}
        return stock_geometry(sizes | {"num_attention_heads": heads, "num_key_value_heads": kv_heads})

    def rotary(self, config: Config, layer: int) -> Rotary:
        return Rotary() if config.get("alibi") else super().rotary(config, layer)

    def _hold_kv_heads(self, config: Config, num_kv_heads: int) -> Config:
        config["num_kv_heads"] = num_kv_heads
        if config.get("new_decoder_architecture", False):
            return config
        if num_kv_heads == 1:
            return config | {"multi_query": True}
        if not config.get("parallel_attn", True):
            raise Refusal(
                f"Falcon with parallel_attn=false holds one KV head or as many as query heads, not num_kv_heads="
                f"{num_kv_heads}; its newer layout, which holds them, has attention beside the MLP"
            )
        # The newer layout, with the one norm for attention and MLP that the older one has.
        return config | {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}


FAMILIES = (Falcon(),)
