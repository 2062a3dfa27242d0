"""What must compile for every GPU: each kernel with and without its options, in the sizes that models have."""

from __future__ import annotations

from typing import Any

import torch

from attnzoo.ops.launching import Build, Builds
from attnzoo.ops.linear.triton.hopper_launch import OPTIONS
from attnzoo.ops.linear.triton.hybrid_step import step_constants
from attnzoo.ops.linear.triton.launch import constants, state_constants
from attnzoo.ops.linear.triton.near import near_constants
from attnzoo.ops.linear.triton.shapes import configure, near_tiles

_STATES = ("s0", "z0", "s1", "z1", "sums", "z_sums", "inverses", "dots", "d_s0", "d_z0", "d_s1", "d_z1", "s", "z")
_FLOATS = ("top", "row_sums", "gain", "log_decay", "weights", "near_weights")
_INTEGERS = ("lengths", "cu_seqlens", "table", "firsts", "arg")
_INPUTS = ("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v", "f_q", "f_k", "d_fq", "d_fk")
_OTHERS = ("ring_k", "ring_f", "ring_v", "x", "weight")  # of the inputs' dtype as well
_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_PACKED = ("lengths",)
_ROWS = ("lengths", "cu_seqlens", "table", "log_decay", "s0", "z0", "d_s1", "d_z1", "d_s0", "d_z0")


def builds() -> Builds:
    """Each kernel in bf16, alone and with everything; what differs for fp16, fp32 and the largest heads."""
    bf16 = torch.bfloat16
    yield from _walks(64, bf16, "elu", True, absent=_ROWS)
    yield from _walks(128, bf16, "identity", False, absent=(*_ROWS, "z_sums"))
    for dim, dtype in ((256, bf16), (128, torch.float16), (96, torch.float32)):
        yield from list(_walks(dim, dtype, "elu", True, absent=_PACKED))[1::2]
    yield from _hybrid(64, bf16)
    yield from _hybrid(128, bf16)
    yield from _hopper()
    config = configure(128, 128, bf16, bf16)
    from attnzoo.ops.linear.triton.kernels_step import step_token, step_tokens
    from attnzoo.ops.linear.triton.kernels_sums import join_parts

    yield _build(join_parts, state_constants(config, config.sums, True), bf16, ("firsts", "s0", "z0"))
    options = constants(config, config.sums, True, "elu", GROUP=1) | {"num_warps": 4}
    yield _build(step_token, options | {"BV": 128}, bf16, ("lengths", "log_decay"))
    yield _build(step_tokens, options | {"BV": 64, "CHUNK": 16, "PIECES": True}, bf16, ("lengths", "log_decay"))
    for dim, features, dtype in ((64, 128, bf16), (128, 256, bf16), (64, 64, torch.float32)):
        yield _hybrid_step(dim, features, dtype)
    from attnzoo.ops.linear.triton.kernels_hedgehog import hedgehog

    for dim, dtype in ((128, bf16), (64, torch.float32)):
        sizes = {"D": dim, "BD": dim, "BM": 16, "PRECISION": "ieee", "NORMALIZE": True}
        yield _build(hedgehog, sizes | {"num_warps": 4, "num_stages": 1}, dtype, ())


def _walks(dim: int, dtype: torch.dtype, feature_map: str, normalize: bool, absent: tuple[str, ...]) -> Builds:
    """The kernels that walk over chunks."""
    from attnzoo.ops.linear.triton import kernels_forward as forward
    from attnzoo.ops.linear.triton import kernels_grad_keys as keys
    from attnzoo.ops.linear.triton import kernels_grad_queries as queries
    from attnzoo.ops.linear.triton import kernels_sums as sums

    config = configure(dim, dim, dtype, dtype)
    for kernel, tiles, by_features in (
        (sums.sum_parts, config.sums, False),
        (forward.attend, config.attend, False),
        (sums.sum_gradient_parts, config.sum_gradients, True),
        (queries.grad_queries, config.queries, True),
        (keys.grad_values, config.values, False),
        (keys.grad_keys, config.keys, True),
    ):
        more = {"CAUSAL": True, "GROUP": 1, "SKIP_LAST": True, "FOLLOWED": False, "STATE_FIRST": tiles.state_first}
        more["FULL"] = more["ALIKE"] = "s0" in absent
        options = constants(config, tiles, normalize, feature_map, by_features=by_features, **more)
        late = () if kernel.__name__.startswith("sum") else ("near_weights", "lag")
        yield _build(kernel, options, dtype, (*absent, *late))


def _hybrid(dim: int, dtype: torch.dtype) -> Builds:
    """The hybrid's kernels: those of the window, and the walks with keys that come late."""
    from attnzoo.ops.linear.triton import kernels_near_backward as near_backward
    from attnzoo.ops.linear.triton.kernels_forward import attend
    from attnzoo.ops.linear.triton.kernels_grad_keys import grad_keys, grad_values
    from attnzoo.ops.linear.triton.kernels_grad_queries import grad_queries
    from attnzoo.ops.linear.triton.kernels_near import near_attend

    config = configure(dim, dim, dtype, dtype)
    kernels = (near_attend, near_backward.near_grad_queries, near_backward.near_grad_keys)
    for kernel, near in zip(kernels, near_tiles(config), strict=True):
        options = near_constants(config, near, dim, GROUP=1, ADD=True) | {"NORMALIZE": True}
        yield _build(kernel, options, dtype, ("lengths", "cu_seqlens", "table"))
    for kernel, tiles, by_features in (
        (attend, config.attend, False),
        (grad_queries, config.queries, True),
        (grad_values, config.values, False),
        (grad_keys, config.keys, True),
    ):
        more = {"CAUSAL": True, "GROUP": 1, "STATE_FIRST": tiles.state_first, "FULL": True, "ALIKE": True}
        options = constants(config, tiles, True, "elu", by_features=by_features, **more)
        build = _build(kernel, options, dtype, (*_ROWS, "s1", "z1"))
        yield build._replace(name=f"{build.name} late")


def _hybrid_step(dim: int, features: int, dtype: torch.dtype) -> Build:
    """The hybrid's step over a window of 64, three query heads a key head."""
    from attnzoo.ops.linear.triton.kernels_hybrid_step import hybrid_step

    options = step_constants(3, dim, features, dim, 63, dtype) | {"NORMALIZE": True, "OWN_KEYS": features != dim}
    options["MAP"] = "elu" if features == dim else "identity"
    return _build(hybrid_step, options, dtype, ("lengths",))


def _hopper() -> Builds:
    """The kernel for Hopper GPUs, and the sums of parts that it follows."""
    from attnzoo.ops.linear.triton.hopper import hopper_attend
    from attnzoo.ops.linear.triton.kernels_sums import sum_parts

    config = configure(64, 64, torch.bfloat16, torch.bfloat16)
    options = constants(config, config.sums, True, "elu", SKIP_LAST=True, FOLLOWED=True, FULL=True)
    followed = _build(sum_parts, options, torch.bfloat16, _ROWS)
    yield followed._replace(name=f"{followed.name} followed", least=90)
    fixed: dict[str, Any] = {"NORMALIZE": True, "MAP": "elu", "s0": None, "z0": None, **OPTIONS}
    swizzled = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)"
    known = dict.fromkeys(_STATES, "*fp32") | {"scale": "fp32"}
    known |= {f"{name}_tiles": f"tensordesc<bf16[1, 1, 64, 64],{swizzled}>" for name in ("q", "k", "v", "out")}
    signature = {name: "constexpr" if name in fixed else known.get(name, "i32") for name in hopper_attend.arg_names}
    yield Build("hopper_attend 64 bfloat16", hopper_attend, signature, fixed, least=90, most=90)


def _build(kernel: Any, options: dict[str, Any], dtype: torch.dtype, absent: tuple[str, ...]) -> Build:
    """A build with the constants of `options` that the kernel has, and None for the arguments that are absent."""
    signature, fixed = {}, {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr or name in absent:
            signature[name], fixed[name] = "constexpr", options.get(name)
        elif name in (*_INPUTS, *_OTHERS):
            signature[name] = _TYPES[dtype]
        elif name in _STATES or name in _FLOATS:
            signature[name] = "*fp32"
        elif name in _INTEGERS:
            signature[name] = "*i32"
        elif name == "before":
            signature[name] = "*i64"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    label = f"{kernel.__name__} {options['D']} {str(dtype).removeprefix('torch.')}"
    label += "" if options["NORMALIZE"] else " raw"
    return Build(label, kernel, signature, fixed, options["num_warps"], options["num_stages"])
