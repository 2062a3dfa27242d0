"""Hedgehog's features: a product with a head's weight, and two softmaxes of it, in one pass."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from attnzoo.ops.linear.triton.tiles import head_base


@triton.jit
def hedgehog(
    x, weight, out, x_b, x_h, x_s, out_b, out_h, out_s, length, rows,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, H, S, 2 D] of x [B, H, S, D] and weight [H, D, D]; a program has BM of the B * S tokens of a head."""
    head = tl.program_id(1)
    dims = tl.arange(0, BD)
    rank = tl.program_id(0) * BM + tl.arange(0, BM)
    row, token = (rank // length).to(tl.int64), (rank % length).to(tl.int64)
    inside = (rank < rows)[:, None] & (dims < D)[None, :]
    from_x = head_base(x, head * 0, head, x_b, x_h) + (row * x_b + token * x_s)[:, None] + dims[None, :]
    tokens = tl.load(from_x, mask=inside, other=0.0)
    square = (dims < D)[:, None] & (dims < D)[None, :]
    matrix = tl.load(weight + (head * D + dims[:, None]) * D + dims[None, :], mask=square, other=0.0)
    scores = tl.dot(tokens, matrix, input_precision=PRECISION).to(out.dtype.element_ty).to(tl.float32)
    to = head_base(out, head * 0, head, out_b, out_h) + (row * out_b + token * out_s)[:, None] + dims[None, :]
    for half in tl.static_range(0, 2):
        found = tl.where((dims < D)[None, :], scores, float("-inf"))
        found = tl.exp(found - tl.max(found, 1)[:, None])
        found = found / tl.sum(found, 1)[:, None]
        tl.store(to + half * D, found.to(out.dtype.element_ty), mask=inside)
        scores = -scores
