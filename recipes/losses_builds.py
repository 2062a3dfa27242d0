"""The losses' kernel specialisations that must compile for every GPU; see `scripts/compile_kernels.py`."""

from __future__ import annotations

from typing import Any

from attnzoo.ops.launching import Build, Builds
from recipes.losses_triton import constants_of, rows_kernel, tile

_TYPES = {
    **{"targets": "*i64", "rows": "*i1", "ids": "*i64", "logprobs": "*fp32", "cross_entropy": "*fp32", "kl": "*fp32"},
    **dict.fromkeys(("stride_logits", "stride_teacher", "vocabulary", "top"), "i32"),
    **dict.fromkeys(("scale", "softcap", "teacher_scale", "teacher_softcap", "cooling"), "fp32"),
    **{"ce_weight": "fp32", "kl_weight": "fp32"},
}


def builds() -> Builds:
    """Each kind of loss, with and without what changes the logits."""
    yield _build("cross-entropy", "bf16", ("targets",))
    yield _build("cross-entropy of short rows", "bf16", ("targets",), 1 << 16)
    yield _build("cross-entropy fp32 softcap", "fp32", ("targets",), CAPPED=True)
    yield _build("divergence", "bf16", ("teacher", "rows"))
    capped = {"CAPPED": True, "TEACHER_CAPPED": True, "TEMPERED": True}
    yield _build("mixture softcap tempered", "bf16", ("targets", "teacher", "rows"), **capped)
    yield _build("mixture of top 64", "bf16", ("targets", "rows", "ids", "logprobs"), TOP=64)
    yield _build("mixture evaluated", "bf16", ("targets", "teacher"), GRADIENT=False)


def _build(name: str, dtype: str, given: tuple[str, ...], vocabulary: int = 1 << 17, **changed: Any) -> Build:
    signature = {"logits": f"*{dtype}", "teacher": f"*{dtype}", **_TYPES}
    optional = ("teacher", "targets", "rows", "ids", "logprobs")
    absent = {name: None for name in optional if name not in given}
    signature = {name: kind for name, kind in signature.items() if name not in absent}
    block, warps = tile(vocabulary, alone="teacher" not in given)
    return Build(f"losses {name}", rows_kernel, signature, {**absent, **constants_of(block), **changed}, warps, 1)
