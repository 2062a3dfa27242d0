"""How the Hopper kernels cut their work: pieces for persistent programs, their tiles of keys, ends of documents."""

# mypy: disable-error-code="no-untyped-def"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared


@gluon.jit
def piece_of(work, sizes, M: gl.constexpr):
    """The `work`-th piece: head, batch entry, its first row of queries, and the sequence that it is of: first rows and
    numbers of rows of its queries and keys.

    Heads of a section are side by side, and find their keys in L2. In one section late tiles come first, which see the
    most keys, and in the next one last, and so on, so that each round of programs has pieces of about one length.
    """
    documents, heads, _group, section, q_len, k_len, tiles_each, pieces, _window, _ahead = sizes
    # Every second round backwards: who had a long piece gets a short one.
    programs = gl.num_programs(0)
    begin = work // programs * programs
    if work // programs % 2 == 1:
        work = begin + gl.minimum(programs, pieces - begin) - 1 - (work - begin)
    number = work // (tiles_each * section)
    rest = work - number * (tiles_each * section)
    row_of_heads = number * section + rest % section
    tile = rest // section
    if (pieces // (tiles_each * section) - number) % 2 == 1:
        tile = tiles_each - 1 - tile
    first = tile * M
    q_start = 0
    q_rows = q_len
    k_start = 0
    k_rows = k_len
    if documents is not None:
        entry = documents + tile * 8
        first = gl.load(entry)
        q_start = gl.load(entry + 1)
        q_rows = gl.load(entry + 2)
        k_start = gl.load(entry + 3)
        k_rows = gl.load(entry + 4)
    return row_of_heads % heads, row_of_heads // heads, first, q_start, q_rows, k_start, k_rows


@gluon.jit
def walk_of(first, q_rows, k_rows, sizes, M: gl.constexpr, N: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """Tiles of keys [lo, hi), at least one, that hold all that M queries see, and [full_lo, full_hi) seen whole."""
    window = sizes[8]
    ahead = sizes[9]
    position = first + k_rows - q_rows
    lo = 0
    full_lo = 0
    hi = gl.cdiv(k_rows, N)
    full_hi = k_rows // N
    if LEFT:
        lo = gl.minimum(gl.maximum(position - window + 1, 0) // N, gl.maximum(hi - 1, 0))
        full_lo = gl.cdiv(gl.maximum(position + M - window, 0), N)
    if RIGHT:
        hi = gl.minimum(hi, gl.cdiv(gl.maximum(position + M + ahead, 0), N))
        full_hi = gl.minimum(full_hi, gl.maximum(position + ahead + 1, 0) // N)
    hi = gl.maximum(hi, lo + 1)
    full_lo = gl.minimum(gl.maximum(full_lo, lo), hi)
    full_hi = gl.maximum(full_hi, full_lo)
    return lo, full_lo, full_hi, hi


@gluon.jit
def clear_rows(place, rows, BLOCK: gl.constexpr, M: gl.constexpr):
    """Zeros in a tile from `rows` on, which are another document's; each group does it, and writes the same."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK, BLOCK // 8], [4, 1], [1, 0])
    there = gl.arange(0, M, layout=gl.SliceLayout(1, wide)) < rows
    values = place.load(wide)
    place.store(gl.where(there[:, None], values, gl.zeros_like(values)))
    fence_async_shared()
