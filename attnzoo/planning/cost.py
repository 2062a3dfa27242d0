"""What a model costs on a machine: arithmetic, traffic, memory, and the roofline of decoding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from attnzoo.planning.model import Model

SIZES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}  # bytes a number
_FAR = 1 << 40  # a context that no memory holds, unless a token takes none


@dataclass(frozen=True)
class Gpu:
    """A GPU, or several that share all work evenly and without cost; the defaults are an H100 SXM.

    Attributes:
        memory_gb: of one, in 1e9 bytes.
        bandwidth_gbs: of its memory, in 1e9 bytes/s.
        tflops: of dense matrix products in the dtype, in 1e12 FLOP/s.
        sram_kb: of a multiprocessor, in 1024 bytes, for tiles.
        reserve: part of the memory that is kept for activations, workspaces and fragmentation.
        count: of GPUs.

    Raises:
        ValueError: for a number that is not above 0, or a reserve outside [0, 1).
    """

    memory_gb: float = 80
    bandwidth_gbs: float = 3350
    tflops: float = 989
    sram_kb: float = 228
    reserve: float = 0.1
    count: int = 1

    def __post_init__(self) -> None:
        for name in ("memory_gb", "bandwidth_gbs", "tflops", "sram_kb", "count"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"gpu.{name} must be a number above 0, got {value!r}")
        if not isinstance(self.count, int):
            raise ValueError(f"gpu.count must be an integer, got {self.count!r}")
        if isinstance(self.reserve, bool) or not isinstance(self.reserve, int | float) or not 0 <= self.reserve < 1:
            raise ValueError(f"gpu.reserve must be a number in [0, 1), got {self.reserve!r}")

    @property
    def usable_bytes(self) -> float:
        """Memory of all GPUs, less the reserve."""
        return self.memory_gb * 1e9 * self.count * (1 - self.reserve)


@dataclass(frozen=True)
class Cost:
    """What one mechanism costs; see docs/plan.md for the formulas.

    Attributes:
        parameters, active_parameters: all, and those that a token uses.
        weight_bytes: of all parameters.
        training_flops_per_token: forward and backward, the mean over a sequence of the context.
        hbm_standard_bytes, hbm_tiled_bytes: attention's traffic in a forward pass over one sequence of the context,
            with scores written out and in tiles.
        kv_bytes_per_token: what one token more takes in the cache, past the context.
        kv_bytes: the cache of one sequence of the context.
        gpus: fewest that hold the weights and the batch.
        max_batch: sequences of the context that fit beside the weights; 0: none.
        max_context: tokens for which the batch fits; 0: none; None: any number.
        decode_seconds: least time of one step, in which each sequence of the batch gets a token.
        decode_bound: what takes that long, "memory" or "compute".
        tokens_per_s: of the whole batch.
    """

    parameters: int
    active_parameters: int
    weight_bytes: int
    training_flops_per_token: float
    hbm_standard_bytes: int
    hbm_tiled_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    gpus: int
    max_batch: int
    max_context: int | None
    decode_seconds: float
    decode_bound: str
    tokens_per_s: float


def cost_of(model: Model, gpu: Gpu, *, context: int, batch: int, dtype: str) -> Cost:
    """The costs of `model` with sequences of `context` tokens, `batch` of them at once, weights and caches in `dtype`.

    Raises:
        ValueError: for a context or batch below 1, or a dtype that is none of `SIZES`.
    """
    for name, value in (("context", context), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if dtype not in SIZES:
        raise ValueError(f"dtype must be one of {', '.join(SIZES)}, got {dtype!r}")
    size, sram = SIZES[dtype], int(gpu.sram_kb * 1024)
    weights, layers = model.weights, model.attentions.items()
    forward = sum(count * attention.flops(context) for attention, count in layers)
    kv = model.cache_bytes(context, size)
    free = gpu.usable_bytes - weights.total * size
    seconds, bound = _decode(model, gpu, context, batch, size)
    return Cost(
        parameters=weights.total,
        active_parameters=weights.active,
        weight_bytes=weights.total * size,
        training_flops_per_token=3 * (2 * weights.matmul + forward / context),
        hbm_standard_bytes=sum(count * attention.standard_bytes(context, size) for attention, count in layers),
        hbm_tiled_bytes=sum(count * attention.tiled_bytes(context, size, sram) for attention, count in layers),
        kv_bytes_per_token=model.cache_bytes(context + 1, size) - kv,
        kv_bytes=kv,
        gpus=math.ceil((weights.total * size + batch * kv) / gpu.usable_bytes * gpu.count),
        max_batch=max(0, int(free // kv)),
        max_context=_max_context(model, free / batch, size),
        decode_seconds=seconds,
        decode_bound=bound,
        tokens_per_s=batch / seconds,
    )


def _decode(model: Model, gpu: Gpu, context: int, batch: int, size: int) -> tuple[float, str]:
    """The longer of moving and computing: weights once a step, caches once a sequence."""
    weights, layers = model.weights, model.attentions.items()
    cached = sum(count * attention.decode_bytes(context, size) for attention, count in layers)
    moved = (weights.read(batch) - model.looked_up) * size + batch * cached
    flops = batch * (2 * weights.matmul + sum(count * attention.decode_flops(context) for attention, count in layers))
    by_memory = moved / (gpu.bandwidth_gbs * 1e9 * gpu.count)
    by_compute = flops / (gpu.tflops * 1e12 * gpu.count)
    return (by_memory, "memory") if by_memory >= by_compute else (by_compute, "compute")


def _max_context(model: Model, room: float, size: int) -> int | None:
    """The most tokens whose cache takes at most `room` bytes."""
    if model.cache_bytes(_FAR, size) <= room:
        return None
    low, high = 0, _FAR  # fits, does not fit
    while high - low > 1:
        middle = (low + high) // 2
        if model.cache_bytes(middle, size) <= room:
            low = middle
        else:
            high = middle
    return low
