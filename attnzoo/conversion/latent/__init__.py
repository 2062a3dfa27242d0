"""Grouped-query attention as multi-head latent attention (MLA), measured by what a calibration text makes of it."""

from attnzoo.conversion.latent.concentrate import Planes, distance_blind, planes_of
from attnzoo.conversion.latent.costs import Inputs, widened
from attnzoo.conversion.latent.factor import LatentWeights, RopePart, latent_weights

__all__ = [
    "Inputs",
    "LatentWeights",
    "Planes",
    "RopePart",
    "distance_blind",
    "latent_weights",
    "planes_of",
    "widened",
]
