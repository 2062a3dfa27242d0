"""The specialisations that must compile for every GPU: each kind of cache, with and without splits."""

from __future__ import annotations

from typing import Any

from attnzoo.ops.decoding.triton.kernels import decode_kernel
from attnzoo.ops.decoding.triton.merging import merge_kernel
from attnzoo.ops.decoding.triton.plan import fitted, merge_constants, merge_for, tiles_for
from attnzoo.ops.decoding.triton.storing import store_kernel
from attnzoo.ops.launching import Build, Builds

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may take on an A100 and on a Hopper GPU
_ROWS = ("LENGTHS", "STARTS", "KEPT")


def builds() -> Builds:
    """See `scripts/compile_kernels.py`."""
    yield _build("decode contiguous", split=True)
    yield _build("decode contiguous fp32", "fp32", ("SINKS",), SOFTCAP=True)
    yield _build("decode one key head", rows=32, split=True, least=90)
    yield _build("decode one key head on an A100", rows=32, split=True)
    yield _build("decode many queries", rows=64, tensors=_ROWS, Q_LEN=16, split=True)
    yield _build("decode short vectors", D=64, DV=64, split=True)
    yield _build("decode wide", D=256, DV=256, split=True)
    yield _build("decode odd sizes", "fp16", D=72, DV=24)
    yield _build("decode ring", tensors=_ROWS, RING=True)
    yield _build("decode paged", tensors=("TABLE", *_ROWS), PAGE=256, split=True)
    yield _build("decode paged 16", tensors=("TABLE",), PAGE=16)
    yield _build("decode int8", codes=1, RECENT=True, split=True)
    yield _build("decode int8 asymmetric", codes=2, SOFTCAP=True)
    yield _build("decode int8 odd sizes", "fp16", codes=1, D=72, DV=72)
    yield _build("decode int8 paged", codes=1, tensors=("TABLE", *_ROWS), PAGE=64, RECENT=True, split=True)
    yield _build("decode first tokens and a window", first_tokens=True, split=True)
    paged = ("TABLE", *_ROWS)
    yield _build("decode first tokens int8 paged", codes=1, tensors=paged, PAGE=64, RECENT=True, first_tokens=True)
    yield _build("decode first tokens and a ring", tensors=_ROWS, RING=True, first_tokens=True)
    yield from _stores()
    constants = {"DV": 512} | merge_constants(merge_for(1, 4, 512, 4))
    del constants["SHARE"]
    yield Build("merge", merge_kernel, {"PART": "*fp32", "OUT": "*bf16", "splits": "i32"}, constants)


def _stores() -> Builds:
    """What appends: vectors as they are, wide latents, into a ring, and codes into pages."""
    yield _store("store", {})
    yield _store("store latent", {}, D=512, DV=64)
    yield _store("store ring", {}, RING=True)
    yield _store("store ring with first tokens", {}, RING=True, PREFIX=4)
    codes = {"K_OUT": "*i8", "V_OUT": "*i8", "K_SCALE": "*fp32", "V_SCALE": "*fp32", "TABLE": "*i32"}
    yield _store("store int8 paged", codes | {"RECENT_K": "*bf16", "RECENT_V": "*bf16"}, D=72, DV=72)


def _store(name: str, more: dict[str, str], **changes: Any) -> Build:
    types = {"BEFORE": "*i64"} | dict.fromkeys(("K", "V", "K_OUT", "V_OUT"), "*bf16") | more
    constants: dict[str, Any] = {"D": 128, "DV": 128, "RING": False, "PREFIX": 0, "QUANT": "K_SCALE" in more} | changes
    constants |= {f"BLOCK_{side}": 1 << (constants[side] - 1).bit_length() for side in ("D", "DV")}
    constants["RECENT"] = "RECENT_K" in more
    numbers = {argument: "i32" for argument in store_kernel.arg_names if argument.islower()}
    constants |= {argument: None for argument in store_kernel.arg_names if argument not in types | constants | numbers}
    signature = {argument: (types | numbers).get(argument) for argument in store_kernel.arg_names}
    given = {argument: kind for argument, kind in signature.items() if kind is not None}
    return Build(name, store_kernel, given, constants, 4 if constants["D"] > 256 else 1)


def _build(
    name: str,
    dtype: str = "bf16",
    tensors: tuple[str, ...] = (),
    *,
    rows: int = 4,
    codes: int = 0,
    split: bool = False,
    least: int = 80,
    first_tokens: bool = False,
    **constants: Any,
) -> Build:
    given: dict[str, Any] = {"D": 128, "DV": 128, "Q_LEN": 1, "PAGE": 0, "RING": False, "RECENT": False} | constants
    itemsize = 4 if dtype == "fp32" else 2
    tiles = tiles_for(rows, given["D"], given["DV"], itemsize, codes > 0, given["PAGE"])
    key_bytes = (given["D"] + given["DV"]) * (1 if codes else itemsize)
    tiles = fitted(tiles, given["D"] * itemsize, key_bytes, SHARED[least])
    given |= {"SOFTCAP": False, **constants, "GROUP": rows // given["Q_LEN"], "SPLIT": split, "QUANT": codes}
    given |= {
        "INTEGER": tiles.integers,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "PRECISION": "ieee",
    }
    given |= merge_constants(merge_for(min(rows, tiles.block_m), 8, given["DV"], tiles.num_warps))
    given |= {"BLOCK_D": 1 << (given["D"] - 1).bit_length(), "BLOCK_DV": 1 << (given["DV"] - 1).bit_length()}
    vectors = "*i8" if codes else f"*{dtype}"
    types = {"Q": f"*{dtype}", "K": vectors, "V": vectors, "OUT": f"*{dtype}"}
    types |= {f"{side}_{part}": "*fp32" for side in "KV" for part in ("SCALE", "OFFSET")[:codes]}
    types |= {"PART": "*fp32", "ARRIVED": "*i64"} if split else {}
    types |= {"RECENT_K": f"*{dtype}", "RECENT_V": f"*{dtype}"} if given["RECENT"] else {}
    types |= {name: "*i32" if name == "TABLE" else "*fp32" if name == "SINKS" else "*i64" for name in tensors}
    types |= {"prefix": "i32"} if first_tokens else {}
    signature = {}
    for argument in decode_kernel.arg_names:
        if argument in types:
            signature[argument] = types[argument]
        elif argument in ("scale", "softcap"):
            signature[argument] = "fp32"
        elif argument.partition("_")[2] in ("batch", "block", "head", "token"):
            given[argument] = 1024  # strides are multiples of 16, and without that nothing is copied in vectors
        elif argument.islower() and argument != "prefix":
            signature[argument] = "i32"
        else:
            given.setdefault(argument, None)  # what this build has none of
    return Build(name, decode_kernel, signature, given, tiles.num_warps, tiles.num_stages, least)
