"""Functional attention: tensors in, tensors out; no modules, no configs."""

from attnzoo.ops.decoding import decode
from attnzoo.ops.latent import latent_decode
from attnzoo.ops.linear import explain_linear, hybrid_attention, linear_attention, linear_decode, linear_step
from attnzoo.ops.softmax import attention, explain

__all__ = [
    "attention",
    "decode",
    "explain",
    "explain_linear",
    "hybrid_attention",
    "latent_decode",
    "linear_attention",
    "linear_decode",
    "linear_step",
]
