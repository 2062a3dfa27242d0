"""Rotary frequencies and their scalings: none, linear, dynamic NTK, llama3, yarn.

A scaling is a dictionary in the form of transformers' ``rope_parameters``: `{"rope_type": "yarn", "factor": 4.0, ...}`.
The arithmetic follows transformers' in the same order, so that in fp32 they are those that a model was trained with.
Linear: arXiv:2306.15595. Dynamic NTK: after u/bloc97 and u/emozilla. YaRN: arXiv:2309.00071. llama3: arXiv:2407.21783.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_SHARED = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_REQUIRED = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings"},
}
_OPTIONAL = {"yarn": {"attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"}}


def read_scaling(scaling: Mapping[str, Any] | None, max_position_embeddings: int | None = None) -> dict[str, Any]:
    """A checked copy of `scaling` with `rope_type` set and the entries that are None left out.

    `max_position_embeddings` is the model's, which dynamic scaling counts from (else the scaling's own
    `original_max_position_embeddings`), and which yarn divides by the original where its `factor` is missing.
    Raises ValueError for an unknown type, a missing entry, or an entry that the type does not have.
    """
    given = {name: value for name, value in (scaling or {}).items() if value is not None}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _REQUIRED:
        raise ValueError(f"scaling['rope_type'] is {kind!r}; known are {', '.join(map(repr, _REQUIRED))}")
    given["rope_type"] = kind
    original = given.get("original_max_position_embeddings")
    if kind == "dynamic" and max_position_embeddings is not None:
        given["original_max_position_embeddings"] = max_position_embeddings
    if kind == "yarn" and "factor" not in given and original and max_position_embeddings:
        given["factor"] = max_position_embeddings / original
    missing = sorted(_REQUIRED[kind] - given.keys())
    if missing:
        raise ValueError(f"scaling of type {kind!r} lacks {', '.join(missing)}; it has {sorted(given)}")
    unused = {"original_max_position_embeddings", "factor"}  # configs of a default type may still carry these
    unknown = sorted(given.keys() - _SHARED - _REQUIRED[kind] - _OPTIONAL.get(kind, set()) - unused)
    if unknown:
        raise ValueError(f"scaling of type {kind!r} has no entry {', '.join(unknown)}")
    return given


def attention_factor(scaling: Mapping[str, Any]) -> float:
    """What cosines and sines are multiplied by: 1, except under yarn."""
    if scaling["rope_type"] != "yarn":
        return 1.0
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])

    def magnitude(weight: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * weight * math.log(scaling["factor"]) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)


def frequencies(
    rotary_dim: int,
    base: float,
    scaling: Mapping[str, Any],
    *,
    lengths: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Radians per position, `[rotary_dim / 2]`; under dynamic scaling with `lengths [...]`: `[..., rotary_dim / 2]`."""
    exponents = torch.arange(0, rotary_dim, 2, device=device).to(dtype) / rotary_dim
    kind = scaling["rope_type"]
    if kind == "dynamic" and lengths is not None:
        return 1.0 / _dynamic_base(rotary_dim, base, scaling, lengths.to(dtype)).unsqueeze(-1) ** exponents
    inverse = 1.0 / base**exponents
    if kind == "linear":
        return inverse / scaling["factor"]
    if kind == "llama3":
        return _llama3(inverse, scaling)
    if kind == "yarn":
        return _yarn(inverse, base**exponents, rotary_dim, base, scaling)
    return inverse


def _dynamic_base(rotary_dim: int, base: float, scaling: Mapping[str, Any], lengths: Tensor) -> Tensor:
    stretch = (lengths / scaling["original_max_position_embeddings"]).clamp(min=1.0)
    return base * (1.0 + scaling["factor"] * (stretch - 1.0)) ** (rotary_dim / (rotary_dim - 2))


def _llama3(inverse: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    trained = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inverse
    smooth = (trained / wavelength - low) / (high - low)
    between = (1 - smooth) * inverse / factor + smooth * inverse
    scaled = torch.where(wavelength > trained / low, inverse / factor, between)
    return torch.where(wavelength < trained / high, inverse, scaled)


def _yarn(inverse: Tensor, periods: Tensor, rotary_dim: int, base: float, scaling: Mapping[str, Any]) -> Tensor:
    trained = scaling["original_max_position_embeddings"]

    def dimension(turns: float) -> float:  # the dimension that makes so many turns over the trained length
        return rotary_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    steps = torch.arange(rotary_dim // 2, dtype=inverse.dtype, device=inverse.device)
    keep = 1 - ((steps - low) / (high - low)).clamp(0, 1)
    return 1.0 / (scaling["factor"] * periods) * (1 - keep) + inverse * keep
