"""T5's decoder, the model of the GQA paper (arXiv 2305.13245), and the same with fewer KV heads, which comes with code.

Self-attention and cross-attention of every decoder layer have the same heads. The encoder and the relative positions
stay as they are, as in the paper.
"""

import re

from attnzoo.conversion.errors import ConversionError
from attnzoo.conversion.families.base import Config, Geometry, stock_geometry, whole
from attnzoo.conversion.families.code import Code
from attnzoo.conversion.families.separate import Separate

_PATHS = ("layer.0.SelfAttention", "layer.1.EncDecAttention")


class T5(Separate):
    """`q k v o` without biases. Attention 2 i is layer i's self-attention, 2 i + 1 its cross-attention."""

    base = ""
    attention = "decoder.block.{layer}"
    # A table of positions, not a weight of q, k, v or o; it lies in the first layer, for all.
    buffers = ("relative_attention_bias.weight",)

    def __init__(self, model_type: str, code: Code | None = None) -> None:
        super().__init__(model_type, rope=None, projection="{part}", output="o")
        self.code = code
        self.outside = ("shared.weight", "decoder.final_layer_norm.weight", "encoder.final_layer_norm.weight")
        self.optional = ()
        # The second is in old checkpoints, and unused.
        self.varied = tuple(f"{path}.relative_attention_bias" for path in _PATHS)

    def geometry(self, config: Config) -> Geometry:
        if not config.get("is_encoder_decoder", True):
            raise ConversionError("a T5 encoder alone keeps no keys and values; only models with a decoder convert")
        heads, dim = whole(config, "num_heads"), whole(config, "d_model")
        sizes = {
            "num_hidden_layers": whole(config, "num_decoder_layers", "num_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": whole(config, "num_key_value_heads") if self.code else heads,
            "hidden_size": dim,
            "head_dim": whole(config, "d_kv", default=64),
        }
        return stock_geometry(sizes)

    def attentions(self, geometry: Geometry) -> int:
        return 2 * geometry.num_layers

    def path(self, number: int) -> str:
        return f"decoder.block.{number // 2}.{_PATHS[number % 2]}"

    def locate(self, name: str) -> tuple[int, str] | None:
        for kind, path in enumerate(_PATHS):
            if match := re.fullmatch(rf"decoder\.block\.(\d+)\.{re.escape(path)}\.(.+)", name):
                return 2 * int(match[1]) + kind, match[2]
        return None

    def _hold_kv_heads(self, config: Config, num_kv_heads: int) -> Config:
        held = config if self.code else CODE.describe(config, "t5_gqa")
        return held | {"num_key_value_heads": num_kv_heads}


CODE = Code(
    "modeling_t5_gqa.py",
    "T5GQAConfig",
    {"T5ForConditionalGeneration": ("AutoModelForSeq2SeqLM", "T5GQAForConditionalGeneration")},
)
FAMILIES = (T5("t5"), T5("t5_gqa", CODE))
