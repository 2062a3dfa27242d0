"""BLOOM, and the same with fewer KV heads, which comes with code: Falcon, the one stock class with both ALiBi and fewer
KV heads, scales ALiBi's slopes by the root of the head size.
"""

from attnzoo.conversion.families.base import Config, Geometry, stock_geometry, whole
from attnzoo.conversion.families.code import Code
from attnzoo.conversion.families.fused import Fused


class Bloom(Fused):
    """`query_key_value` and `dense`, with biases. ALiBi has a slope for each query head, and these stay."""

    base = "transformer."
    attention = "h.{layer}.self_attention"
    outside = ("word_embeddings.weight", "word_embeddings_layernorm.weight", "ln_f.weight", "ln_f.bias")
    rope = None

    def __init__(self, model_type: str, code: Code | None = None) -> None:
        self.model_type, self.code = model_type, code

    def geometry(self, config: Config) -> Geometry:
        heads = whole(config, "n_head", "num_attention_heads")
        sizes = {
            "num_hidden_layers": whole(config, "n_layer", "num_hidden_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": whole(config, "num_key_value_heads") if self.code else heads,
            "hidden_size": whole(config, "hidden_size", "n_embed"),
        }
        return stock_geometry(sizes)

    def _hold_kv_heads(self, config: Config, num_kv_heads: int) -> Config:
        held = config if self.code else CODE.describe(config, "bloom_gqa")
        return held | {"num_key_value_heads": num_kv_heads}


CODE = Code(
    "modeling_bloom_gqa.py", "BloomGQAConfig", {"BloomForCausalLM": ("AutoModelForCausalLM", "BloomGQAForCausalLM")}
)
FAMILIES = (Bloom("bloom"), Bloom("bloom_gqa", CODE))
