"""States of the linear kernels in memory: their tiles, and what a part starts with from the sums of the other parts."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def state_pointers(base, index, v0, d0, D: tl.constexpr, DV: tl.constexpr, RV: tl.constexpr, RD: tl.constexpr):
    """[RV, RD] pointers, transposed, from value v0 and feature d0 on into one state of [..., D, DV], and a mask."""
    values, features = v0 + tl.arange(0, RV), d0 + tl.arange(0, RD)
    pointers = base + tl.cast(index, tl.int64) * (D * DV) + features[None, :] * DV + values[:, None]
    return pointers, (values < DV)[:, None] & (features < D)[None, :]


@triton.jit
def load_state(
    s,
    z,
    index,
    v0,
    d0,
    NORMALIZE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    RV: tl.constexpr,
    RD: tl.constexpr,
):
    """A transposed tile [RV, RD] of one state and, with the normaliser, its z [RD]."""
    pointers, mask = state_pointers(s, index, v0, d0, D, DV, RV, RD)
    features = d0 + tl.arange(0, RD)
    sums = tl.zeros([RD], tl.float32)
    if NORMALIZE:
        sums = tl.load(z + tl.cast(index, tl.int64) * D + features, mask=features < D, other=0.0)
    return tl.load(pointers, mask=mask, other=0.0), sums


@triton.jit
def store_state(
    s,
    z,
    index,
    v0,
    d0,
    state,
    sums,
    NORMALIZE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    RV: tl.constexpr,
    RD: tl.constexpr,
):
    """Write a transposed tile of one state, and z where the tile has the first values."""
    pointers, mask = state_pointers(s, index, v0, d0, D, DV, RV, RD)
    tl.store(pointers, state, mask=mask)
    if NORMALIZE:
        features = d0 + tl.arange(0, RD)
        tl.store(z + tl.cast(index, tl.int64) * D + features, sums, mask=(features < D) & (v0 == 0))


@triton.jit
def part_fade(rate, here, place, part):
    """The decay over the real tokens of a part of this program's sequence."""
    return tl.exp(rate * tl.minimum(tl.maximum(here.end - here.begin - place * part, 0), part).to(tl.float32))


@triton.jit
def state_beside(
    s0,
    z0,
    sums,
    z_sums,
    here,
    head,
    kv_heads,
    part,
    rate,
    v0,
    d0,
    AFTER: tl.constexpr,
    NORMALIZE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    RV: tl.constexpr,
    RD: tl.constexpr,
):
    """The state before this program's part: the initial one, and the sums of the parts before, in their order.

    AFTER it: the gradient of the state there, from the last state's, and the sums of the parts after, from the last on.
    """
    s = tl.zeros([RV, RD], tl.float32)
    z = tl.zeros([RD], tl.float32)
    if s0 is not None:
        s, z = load_state(s0, z0, here.n * kv_heads + head, v0, d0, NORMALIZE, D, DV, RV, RD)
    if sums is not None:
        others = here.place
        if AFTER:
            others = here.count - 1 - here.place
        for step in range(0, others):
            other = step
            if AFTER:
                other = here.count - 1 - step
            if rate is not None:
                fade = part_fade(rate, here, other, part)
                s, z = s * fade, z * fade
            index = (tl.program_id(0) - here.place + other) * kv_heads + head
            more, z_more = load_state(sums, z_sums, index, v0, d0, NORMALIZE, D, DV, RV, RD)
            s += more
            z += z_more
    return s, z
