"""What a conversion to latent attention will do, and the doing of it, layer by layer; not where the result goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from attnzoo.conversion import ConversionError
from attnzoo.conversion.damage import Damage
from attnzoo.conversion.families import Config, Family, Geometry, Projections, family_for
from attnzoo.conversion.latent.method import ToLatent
from attnzoo.conversion.rotary import Rotary
from attnzoo.hf.calibration import convert_layers
from attnzoo.hf.calibration_measure import measure
from attnzoo.hf.calibration_progress import progress_bar
from attnzoo.hf.calibration_stage import Stage
from attnzoo.hf.latent_survey import worthiest_frequencies
from attnzoo.hf.latent_weights import filled, rope_of
from attnzoo.hf.plan import mask_of, one_a_layer
from attnzoo.hf.swap import rotated
from attnzoo.hf.weights import scale_of
from attnzoo.specs import MLA, Spec


@dataclass
class LatentPlan:
    """A conversion: where it starts, and the layers' sizes, all known."""

    config: Config
    family: Family
    geometry: Geometry
    weights: Mapping[str, Tensor]
    specs: list[MLA]
    original: Stage
    new: Stage
    scale: list[float]

    def attention(self, number: int) -> dict[str, Tensor]:
        """The original attention's tensors of a layer, by their names inside the module."""
        found = {}
        for name in self.weights:
            at = self.family.locate(name)
            if at is not None and at[0] == number and at[1] not in self.family.buffers:
                found[at[1]] = self.weights[name]
        return found

    def split(self, number: int, tensors: Mapping[str, Tensor]) -> tuple[Projections, Rotary]:
        """A layer's projections, and what RoPE turns in them."""
        p = self.family.split({name: t.to(self.original.device) for name, t in tensors.items()}, self.geometry)
        return _with_gains(p, self.family), self.family.rotary(self.config, number)


def method_name(refit: bool = True, steps: int = 0) -> str:
    """What the method with these settings of `ToLatent` is called."""
    return "regress" if steps else "refit" if refit else "svd"


def best_device() -> torch.device:
    """Where the layers of a folder run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plan_latent(
    config: Config,
    weights: Mapping[str, Tensor],
    spec: Spec | Sequence[Spec],
    calibration: Tensor | None,
    device: torch.device,
) -> LatentPlan:
    """The plan; raises ConversionError for what the config and the sizes can tell.

    Args:
        config: the original's config.json.
        weights: its tensors by name, read when they are asked for.
        spec: an MLA or a list of them; with calibration text, open frequencies become those that it asks for.
        calibration: token ids `[rows, S]`, or None.
        device: where layers run.
    """
    family = family_for(str(config.get("model_type")))
    geometry = family.geometry(config)
    specs = one_a_layer(spec, geometry.num_layers)
    for one in specs:
        if not isinstance(one, MLA):
            raise ConversionError(f"spec must be an MLA or a list of them, one a layer; got {one!r}")
    path = family.base + family.attention
    original = Stage(config, weights, path, device=device, dtype=torch.float32)
    scale = [scale_of(original.attention_of(layer)) for layer in original.layers]
    if calibration is not None:
        specs = _with_frequencies(
            LatentPlan(config, family, geometry, weights, [], original, original, scale), specs, calibration
        )
    whole = [filled(one, geometry, rotated(original.model)) for one in specs]  # type: ignore[arg-type]
    masks = [mask_of(layer, number, config) for number, layer in enumerate(map(original.attention_of, original.layers))]
    whole = [replace(one, mask=one.mask or mask) for one, mask in zip(whole, masks, strict=True)]
    described = {"model_type": f"attnzoo_{family.model_type}", "attnzoo": {"spec": [one.to_dict() for one in whole]}}
    type(AutoConfig.for_model(described["model_type"])).from_dict({})  # which makes its model classes known
    new = Stage(config | described, _Without(weights, family), path, device=device, dtype=torch.float32)
    return LatentPlan(config, family, geometry, weights, whole, original, new, scale)


def _with_frequencies(plan: LatentPlan, specs: Sequence[Spec], calibration: Tensor) -> list[Spec]:
    """The specs with the frequencies that the text asks for, where they leave them open."""
    size = rotated(plan.original.model)
    chosen: dict[int, tuple[int, ...]] = {}
    out: list[Spec] = []
    for spec in specs:
        assert isinstance(spec, MLA)
        rope = filled(spec, plan.geometry, size).qk_rope_head_dim
        if size and rope and spec.rope_frequencies is None:
            if rope not in chosen:
                chosen[rope] = worthiest_frequencies(
                    plan.original,
                    plan.split,
                    plan.attention,
                    calibration,
                    rope_of(plan.original.model, (), calibration.shape[1]),
                    plan.scale,
                    rope // 2,
                )
            spec = replace(spec, rope_frequencies=chosen[rope])
        out.append(spec)
    return out


def run_latent(
    plan: LatentPlan,
    calibration: Tensor | None,
    held_out: Tensor | None,
    keep: Callable[[int, Mapping[str, Tensor]], None],
    **fitting: Any,
) -> Damage | None:
    """Convert all layers, hand each to `keep`, and say what it cost; None where there is no text to say it on.

    Args:
        plan: of the conversion.
        calibration, held_out: token ids `[rows, S]`.
        keep: called with a layer's number and new tensors by full names.
        fitting: `refit` and `steps`, see `ToLatent`.
    """
    start = time.perf_counter()
    rope = rope_of(plan.original.model, (), None if calibration is None else calibration.shape[1])
    method = ToLatent(
        method_name(**fitting), plan.split, plan.specs, rope, plan.scale, plan.family.attention_path, **fitting
    )
    if calibration is None and held_out is None:
        for number in range(plan.geometry.num_layers):
            keep(number, method(number, plan.attention(number), None))
        return None
    with progress_bar(f"{method.name}: {plan.family.model_type}") as progress:
        layers, walk = convert_layers(
            plan.original,
            plan.new,
            method,
            plan.attention,
            calibration,
            held_out,
            keep=keep,
            storage=torch.float32,
            progress=progress,
        )
    before, after, divergence, tokens = measure(plan.original, plan.new, walk)
    g = plan.geometry
    size = plan.attention(0)[next(iter(plan.attention(0)))].element_size()
    cached = sum((spec.kv_lora_rank or 0) + (spec.qk_rope_head_dim or 0) for spec in plan.specs)
    return Damage(
        method=method.name,
        layers=layers,
        tokens=tokens,
        held_out=held_out is not None,
        cross_entropy_before=before,
        cross_entropy=after,
        kl=divergence,
        kv_bytes_before=2 * size * g.num_layers * g.num_kv_heads * g.head_dim,
        kv_bytes=size * cached,
        seconds=time.perf_counter() - start,
    )


def _with_gains(p: Projections, family: Family) -> Projections:
    """Norms' weights as what the norms multiply with: Gemma's add one."""
    if not family.model_type.startswith("gemma") or p.q_norm is None or p.k_norm is None:
        return p
    return Projections(**{**vars(p), "q_norm": 1 + p.q_norm, "k_norm": 1 + p.k_norm})


class _Without(Mapping[str, Tensor]):
    """All but the attention's tensors."""

    def __init__(self, weights: Mapping[str, Tensor], family: Family) -> None:
        self._weights, self._names = weights, [name for name in weights if family.locate(name) is None]

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
