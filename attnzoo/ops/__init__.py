"""Functional attention: tensors in, tensors out; no modules, no configs."""

from attnzoo.ops.decoding import decode, explain_decode
from attnzoo.ops.latent import explain_latent_decode, latent_decode
from attnzoo.ops.linear import explain_linear, hybrid_attention, linear_attention, linear_decode, linear_step
from attnzoo.ops.softmax import attention, explain

__all__ = [
    "attention",
    "decode",
    "explain",
    "explain_decode",
    "explain_latent_decode",
    "explain_linear",
    "hybrid_attention",
    "latent_decode",
    "linear_attention",
    "linear_decode",
    "linear_step",
]
