"""The specialisations that must compile for every GPU: each kernel with each kind of sequence and of score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnzoo.ops.launching import Build, Builds
from attnzoo.ops.softmax.triton.bias import bias_gradient_kernel
from attnzoo.ops.softmax.triton.documents import clear_tail_kernel, document_tiles_kernel
from attnzoo.ops.softmax.triton.forward import forward_kernel
from attnzoo.ops.softmax.triton.hopper import hopper_forward_kernel
from attnzoo.ops.softmax.triton.hopper_keys import hopper_keys_kernel
from attnzoo.ops.softmax.triton.hopper_queries import hopper_queries_kernel
from attnzoo.ops.softmax.triton.key_gradient import key_gradient_kernel
from attnzoo.ops.softmax.triton.query_gradient import query_gradient_kernel

_POINTERS = {
    "lse": "*fp32",
    "d_lse": "*fp32",
    "lse2": "*fp32",
    "delta": "*fp32",
    "d_bias": "*fp32",
    "sinks": "*fp32",
    "slopes": "*fp32",
    "dense": "*i1",
    "key_lengths": "*i32",
    "cu_q": "*i32",
    "cu_k": "*i32",
    "seed": "*i64",
    "tables": "*i32",
    "walk_starts": "*i32",
    "walk_partial": "*i32",
    "walk_tiles": "*i32",
    "walk_classes": "*i32",
}
_OPTIONS = ("sinks", "slopes", "bias", "dense", "key_lengths", "cu_q", "cu_k", "seed", "tables", "walk_classes")
_WALK = ("walk_starts", "walk_partial", "walk_tiles")
_PACKED = ("cu_q", "cu_k")
_COPIED = ("k_tiles", "v_tiles", "q_tiles", "do_tiles", "lse2_tiles", "delta_tiles")
_LONGFORMER = ("or", ("stretch", ("sliding_window", 256, 0)), ("global_tokens", 0))


def builds() -> Builds:
    """See `scripts/compile_kernels.py`."""
    kernels = {
        "forward": (forward_kernel, (128, 64, 8, 3)),
        "query_gradient": (query_gradient_kernel, (128, 64, 8, 2)),
        "key_gradient": (key_gradient_kernel, (64, 128, 8, 2)),
    }
    for name, (kernel, tiles) in kernels.items():
        yield _build(f"{name} causal", kernel, tiles, RIGHT=True)
        yield _build(f"{name} causal, copied tiles", kernel, tiles, _COPIED, RIGHT=True)
        window: dict[str, Any] = {"LEFT": True, "RIGHT": True}
        yield _build(f"{name} packed window softcap", kernel, tiles, _PACKED, softcap=True, FAST=True, **window)
        yield _build(f"{name} listed", kernel, tiles, (*_WALK, "tables"), PROGRAM=_LONGFORMER)
        small = (32, 32, 4, 1)
        yield _build(f"{name} fp32 dilated", kernel, small, dtype="fp32", STEP=4, **window)
        options = ("slopes", "bias", "dense", "key_lengths", "seed", *(("sinks",) if name == "forward" else ()))
        yield _build(f"{name} all options", kernel, (64, 32, 4, 1), options, D=192, DV=128)
    yield _build("forward wide", forward_kernel, (64, 32, 8, 1), RIGHT=True, D=576, DV=512)
    for name, kernel in (
        ("hopper_forward", hopper_forward_kernel),
        ("hopper_queries", hopper_queries_kernel),
        ("hopper_keys", hopper_keys_kernel),
    ):
        yield _hopper(name, kernel, 128)
        yield _hopper(name, kernel, 128, ("documents", "softcap"), LEFT=True)
        yield _hopper(name, kernel, 64, CONSUMERS=3, STAGES=3)
    table = {"entries": "*i32", "cu_q": "*i32", "cu_k": "*i32", "documents": "i32"}
    constants: dict[str, Any] = {"BLOCK": 128, "DOCUMENTS": 64, "SORTED": True, "CAUSAL": True}
    signature = table | dict.fromkeys(constants, "constexpr")
    yield Build("document_tiles", document_tiles_kernel, signature, constants, 1, 1)
    tail = {
        "x": "*bf16",
        "boundaries": "*i32",
        "documents": "i32",
        "length": "i32",
        "stride_h": "i32",
        "stride_s": "i32",
    }
    constants = {"DIM": 96, "ROWS": 64, "COLUMNS": 128, "VALUE": float("-inf")}
    yield Build("clear_tail", clear_tail_kernel, tail | dict.fromkeys(constants, "constexpr"), constants)
    yield _build("bias_gradient", bias_gradient_kernel, (64, 64, 8, 1), ("bias",), RIGHT=True)


def _build(
    name: str,
    kernel: Any,
    tiles: tuple[int, int, int, int],
    options: tuple[str, ...] = (),
    *,
    dtype: str = "bf16",
    softcap: bool = False,
    **given: Any,
) -> Build:
    """A kernel with these optional tensors and constants, and what else it needs at its plainest."""
    m, n, warps, stages = tiles
    constants: dict[str, Any] = {
        **{"GROUP": 4, "D": 128, "DV": 128, "BLOCK_M": m, "BLOCK_N": n, "DOCUMENTS": 64 if "cu_q" in options else 0},
        **{"STEP": 1, "LEFT": False, "RIGHT": False, "PROGRAM": None, "PLAIN": False, "PRECISION": "ieee"},
        **{"FAST": False, "ENDS": 1 if options == _COPIED else 0, "BOUNDED": softcap and "bias" not in options},
        "PARTIAL_STAGES": 2,
    } | given
    constants["BLOCK_D"] = 1 << constants["D"].bit_length() - 1
    constants["BLOCK_E"] = constants["D"] - constants["BLOCK_D"]
    constants["BLOCK_DV"] = constants["DV"]
    constants["PLAIN"] = not softcap and "bias" not in options
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ("scale", "softcap", "dropout_p"):
            signature[argument] = "fp32"
        elif argument in _POINTERS or argument in ("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v", "bias"):
            signature[argument] = _POINTERS.get(argument, f"*{dtype}")
        else:
            signature[argument] = "i32"
        if argument in _COPIED:
            rows = m if argument in ("q_tiles", "do_tiles") else n
            columns = constants["BLOCK_D" if argument in ("q_tiles", "k_tiles") else "BLOCK_DV"]
            kind = f"fp32[1, {m}]" if argument in ("lse2_tiles", "delta_tiles") else f"{dtype}[1, 1, {rows}, {columns}]"
            signature[argument] = f"tensordesc<{kind}>"
        absent = argument == "softcap" and not softcap
        absent |= argument in (*_OPTIONS, *_WALK, *_COPIED, "d_lse") and argument not in options
        if absent:
            signature[argument] = "constexpr"
            constants[argument] = None
    least = 90 if any(name in options for name in _COPIED) else 80
    return Build(name, kernel, signature, _known(kernel, constants), warps, stages, least)


def _hopper(name: str, kernel: Any, wide: int, options: tuple[str, ...] = (), **given: Any) -> Build:
    """A kernel for Hopper GPUs with these of its options, for heads of this width."""
    constants: dict[str, Any] = {
        **{"D": wide, "DV": wide, "BLOCK": wide, "M": 64, "N": 128, "STAGES": 2, "CONSUMERS": 2, "TURNS": True},
        **{"BOUNDED": "softcap" in options, "LEFT": False, "RIGHT": True},
    } | given
    constants |= {option: None for option in ("sinks", "documents", "softcap", "d_lse") if option not in options}
    known = dict.fromkeys(("lse", "lse2", "delta", "d_lse", "sinks"), "*fp32")
    known |= dict.fromkeys(("out", "d_out", "d_q", "d_k", "d_v"), "*bf16")
    known |= {"documents": "*i32"} | dict.fromkeys(("scale", "factor", "softcap"), "fp32")
    swizzled = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)"
    plain = "NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)"
    walked = constants["M"] if kernel is hopper_keys_kernel else constants["N"]
    by_queries = ("k_tiles", "v_tiles") if kernel is not hopper_keys_kernel else ("q_tiles", "do_tiles")
    for argument in ("q_tiles", "k_tiles", "v_tiles", "do_tiles", "out_tiles"):
        rows = walked if argument in by_queries else 64
        known[argument] = f"tensordesc<bf16[1, 1, {rows}, {wide}],{swizzled}>"
    for argument in ("lse2_tiles", "delta_tiles"):
        known[argument] = f"tensordesc<fp32[1, {walked}],{plain}>"
    signature = {name: "constexpr" if name in constants else known.get(name, "i32") for name in kernel.arg_names}
    suffix = ", ".join((*options, *given))
    return Build(f"{name} {wide} {suffix}".strip(), kernel, signature, _known(kernel, constants), least=90, most=90)


def _known(kernel: Any, constants: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in constants.items() if name in kernel.arg_names}
