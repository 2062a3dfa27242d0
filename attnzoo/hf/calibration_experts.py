"""Experts: a checkpoint has three matrices for each, transformers' modules hold those of all experts in two tensors."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch import Tensor

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
_ROLES = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}


def in_module(name: str) -> str:
    """What transformers' modules call the place that Mixtral's checkpoints call block_sparse_moe."""
    return name.replace(".block_sparse_moe.", ".mlp.")


def fused_experts(names: Collection[str]) -> dict[str, list[list[str]]]:
    """Tensors of modules, by name, out of a checkpoint's: the experts' names, by role (gate and up, or down)."""
    found: dict[str, dict[str, dict[int, str]]] = {}
    for name in names:
        if match := _EXPERT.fullmatch(name):
            roles = found.setdefault(match[1], {})
            roles.setdefault(_ROLES[match[3]], {})[int(match[2])] = name
    fused = {}
    for path, roles in found.items():
        ordered = {role: [numbers[n] for n in sorted(numbers)] for role, numbers in roles.items()}
        place = in_module(path)
        if {"gate", "up", "down"} <= ordered.keys():
            fused[f"{place}.gate_up_proj"] = [ordered["gate"], ordered["up"]]
            fused[f"{place}.down_proj"] = [ordered["down"]]
    return fused


def fuse(parts: list[list[Tensor]]) -> Tensor:
    """`[experts, out, in]` of each role, one role's outputs behind the other's."""
    return torch.cat([torch.stack(experts) for experts in parts], dim=1)
