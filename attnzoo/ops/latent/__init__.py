"""Attention in latent space, over a cache that all heads share."""

from attnzoo.ops.latent.api import explain_latent_decode, latent_decode
from attnzoo.ops.latent.common import Held

__all__ = ["Held", "explain_latent_decode", "latent_decode"]
