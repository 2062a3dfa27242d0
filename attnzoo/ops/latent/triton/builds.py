"""The specialisations that must compile for every GPU: each kind of cache of latents, few heads and many."""

from __future__ import annotations

from typing import Any

from attnzoo.ops.decoding.triton.builds import SHARED
from attnzoo.ops.decoding.triton.plan import fitted, merge_constants, merge_for
from attnzoo.ops.latent.triton.hopper import hopper_kernel
from attnzoo.ops.latent.triton.kernels import latent_kernel
from attnzoo.ops.latent.triton.plan import HOPPER, tiles_for
from attnzoo.ops.launching import Build, Builds

_ROWS = ("LENGTHS", "STARTS", "KEPT")


def builds() -> Builds:
    """See `scripts/compile_kernels.py`."""
    yield _build("latent 16 heads on an A100", 16, split=True, least=80)
    yield _build("latent 128 heads on an A100", 128, least=80)
    yield _build("latent 16 heads", 16, split=True)
    yield _build("latent 128 heads", 128)
    yield _hopper("latent many heads", split=True)
    yield _hopper("latent many heads paged", tensors=("TABLE", *_ROWS), PAGE=64, Q_LEN=2)
    yield _hopper("latent many heads ring", RING=True)
    yield _build("latent fp32", 16, "fp32", least=80, RANK=64, ROPE=16)
    yield _build("latent paged", 128, tensors=("TABLE", *_ROWS), PAGE=64, split=True)
    yield _build("latent paged 16", 16, tensors=("TABLE",), PAGE=16)
    yield _build("latent ring", 16, tensors=_ROWS, RING=True)
    yield _build("latent int8", 16, codes=1, RECENT=True, split=True, least=80)
    yield _build("latent int8 paged asymmetric", 128, codes=2, tensors=("TABLE", *_ROWS), PAGE=64, split=True)


def _build(
    name: str,
    heads: int,
    dtype: str = "bf16",
    *,
    tensors: tuple[str, ...] = (),
    codes: int = 0,
    split: bool = False,
    least: int = 90,
    **constants: Any,
) -> Build:
    given: dict[str, Any] = {"RANK": 512, "ROPE": 64, "PAGE": 0, "RING": False, "RECENT": False} | constants
    tiles = tiles_for(heads, given["RANK"], 4 if dtype == "fp32" else 2, codes > 0, SHARED[least])
    width = (given["RANK"] + given["ROPE"]) * (4 if dtype == "fp32" else 2)
    tiles = fitted(tiles, width, width, SHARED[least])
    given |= {"HEADS": heads, "Q_LEN": 1, "SPLIT": split, "QUANT": codes, "PRECISION": "ieee"}
    given |= {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_R": given["RANK"], "BLOCK_P": given["ROPE"]}
    given |= merge_constants(merge_for(min(heads, tiles.block_m), 8, given["RANK"], tiles.num_warps))
    vectors = "*i8" if codes else f"*{dtype}"
    types = {"Q": f"*{dtype}", "Q_ROPE": f"*{dtype}", "C": vectors, "R": vectors, "OUT": f"*{dtype}"}
    types |= {f"{side}_{part}": "*fp32" for side in "CR" for part in ("SCALE", "OFFSET")[:codes]}
    types |= {"PART": "*fp32", "ARRIVED": "*i64"} if split else {}
    types |= {"RECENT_C": f"*{dtype}", "RECENT_R": f"*{dtype}"} if given["RECENT"] else {}
    types |= {name: "*i32" if name == "TABLE" else "*i64" for name in tensors}
    signature = _signature(latent_kernel, types, given)
    return Build(name, latent_kernel, signature, given, tiles.num_warps, tiles.num_stages, least)


def _hopper(name: str, *, tensors: tuple[str, ...] = (), split: bool = False, **constants: Any) -> Build:
    given = {"HEADS": 128, "Q_LEN": 1, "RANK": 512, "ROPE": 64, "SPLIT": split, "PAGE": 0, "RING": False} | constants
    given |= {"BLOCK_M": HOPPER.block_m, "BLOCK_N": HOPPER.block_n}
    types = dict.fromkeys(("Q", "Q_ROPE", "C", "R", "OUT"), "*bf16") | ({"PART": "*fp32"} if split else {})
    types |= {name: "*i32" if name == "TABLE" else "*i64" for name in tensors}
    signature = _signature(hopper_kernel, types, given)
    return Build(name, hopper_kernel, signature, given, HOPPER.num_warps, HOPPER.num_stages, 90, 90)


def _signature(kernel: Any, types: dict[str, str], given: dict[str, Any]) -> dict[str, str]:
    """Types of the kernel's arguments; strides and what is missing go into `given`."""
    signature = {}
    for argument in kernel.arg_names:
        if argument in types:
            signature[argument] = types[argument]
        elif argument == "scale":
            signature[argument] = "fp32"
        elif argument.partition("_")[2] in ("batch", "block", "head", "token"):
            given[argument] = 1024  # strides are multiples of 16, and without that nothing is copied in vectors
        elif argument.islower():
            signature[argument] = "i32"
        else:
            given.setdefault(argument, None)  # a tensor that this build has none of
    return signature
