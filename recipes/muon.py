"""Muon for the matrices inside of a model's layers, AdamW for all else, as one optimizer.

Muon (arXiv 2502.16982) steps along the orthogonal factor of a matrix's momentum: all directions that a gradient has are
followed alike. The factor comes from five Newton-Schulz steps, for all matrices of one shape at once. Its step is
scaled to the size of AdamW's, so both share learning rate and decay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as adamw_step

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic whose iteration brings singular values near 1
STEPS = 5
LIKE_ADAMW = 0.2  # root mean square of AdamW's steps, in learning rates


class MuonAdamW(torch.optim.Optimizer):
    """Groups with `orthogonal` take Muon's step, the others AdamW's.

    Set `found_inf` to a tensor, as AdamW's fused step reads it, and where it is 1 a step changes no weight.

    Args:
        groups: params, orthogonal, decays.
        fused: whether AdamW's step is.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: Iterable[dict[str, Any]], *, fused: bool) -> None:
        defaults = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.95}
        super().__init__(groups, {**defaults, "fused": fused})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if trained:
                (self._orthogonal if group["orthogonal"] else self._adamw)(trained, group)
        return loss

    def _orthogonal(self, trained: list[Tensor], group: dict[str, Any]) -> None:
        alike: dict[Any, list[Tensor]] = defaultdict(list)
        for parameter in trained:
            alike[parameter.shape, parameter.dtype].append(parameter)
        moves = 1.0 if self.found_inf is None else 1.0 - self.found_inf
        for weights in alike.values():
            gradients = torch.stack([weight.grad for weight in weights]).float().nan_to_num()  # type: ignore[misc]
            held = [self.state[weight] for weight in weights]
            for state, weight in zip(held, weights, strict=True):
                if not state:
                    state["momentum"] = torch.zeros_like(weight, dtype=torch.float32)
            before = [state["momentum"] for state in held]
            torch._foreach_lerp_(before, list(gradients.unbind()), 1 - group["momentum"])
            ahead = gradients.lerp_(torch.stack(before), group["momentum"])  # Nesterov's
            rows, columns = weights[0].shape
            size = LIKE_ADAMW * max(rows, columns) ** 0.5 * group["lr"]
            updates = orthogonalised(ahead).to(weights[0].dtype) * (-size * moves)
            torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"] * moves)
            torch._foreach_add_(weights, list(updates.unbind()))

    def _adamw(self, trained: list[Tensor], group: dict[str, Any]) -> None:
        held = [self.state[weight] for weight in trained]
        for state, weight in zip(held, trained, strict=True):
            if not state:
                state["step"] = torch.zeros((), device=weight.device if group["fused"] else None)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        adamw_step(
            trained,
            [weight.grad for weight in trained],  # type: ignore[misc]
            *([state[name] for state in held] for name in ("exp_avg", "exp_avg_sq")),
            [],
            [state["step"] for state in held],
            fused=group["fused"],
            found_inf=self.found_inf if group["fused"] else None,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalised(matrices: Tensor) -> Tensor:
    """Near the orthogonal factors of matrices `[N, rows, columns]`, bf16: singular values between 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT) / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.bfloat16()
    for _ in range(STEPS):
        square = x @ x.mT
        x = a * x + torch.baddbmm(square, square, square, beta=b, alpha=c) @ x
    return x if wide else x.mT
