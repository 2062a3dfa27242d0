"""What packed documents need besides attention, since their boundaries are only known on the device: which tile of
queries belongs to which document, and zeros in the rows after the last one."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from attnzoo.ops.softmax.triton.tiles import document_of


@triton.jit(do_not_specialize=("documents",))
def document_tiles_kernel(
    entries,  # [tiles, 8], int32, of which six are used
    cu_q,  # [documents + 1]
    cu_k,
    documents,
    BLOCK: tl.constexpr,  # queries in a tile
    DOCUMENTS: tl.constexpr,  # a power of two, at least the number of documents
    SORTED: tl.constexpr,  # by the keys that are seen: tiles with the most come last
    CAUSAL: tl.constexpr,  # what decides how many these are
):
    """For each tile: its first row inside its document, where the document's queries start and how many there are, and
    the same of its keys, and its number. Tiles past the last document have no rows, and are last in any order."""
    tile = tl.program_id(0)
    number, before = document_of(tile, cu_q, documents, BLOCK, DOCUMENTS)
    there = number < documents
    q_start = tl.load(cu_q + number, mask=there, other=0).to(tl.int32)
    q_end = tl.load(cu_q + number + 1, mask=there, other=0).to(tl.int32)
    k_start = tl.load(cu_k + number, mask=there, other=0).to(tl.int32)
    k_end = tl.load(cu_k + number + 1, mask=there, other=0).to(tl.int32)
    place = tile
    if SORTED and there:
        later = _seeing_more(
            tile - before, number, q_end - q_start, k_end - k_start, cu_q, cu_k, documents, BLOCK, DOCUMENTS, CAUSAL
        )
        place = _tiles(cu_q, documents, BLOCK, DOCUMENTS) - 1 - later
    entry = entries + place * 8
    tl.store(entry, tl.where(there, (tile - before) * BLOCK, 0))
    tl.store(entry + 1, q_start)
    tl.store(entry + 2, q_end - q_start)
    tl.store(entry + 3, k_start)
    tl.store(entry + 4, k_end - k_start)
    tl.store(entry + 5, number)


@triton.jit
def _seeing_more(
    tile, number, q_rows, k_rows, cu_q, cu_k, documents, BLOCK: tl.constexpr, DOCUMENTS: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """How many tiles come after the `tile`-th one of a document: those that see more keys, and of equals the others of
    the documents before it and the later ones of its own."""
    n = tl.arange(0, DOCUMENTS)
    q_each = tl.load(cu_q + n + 1, mask=n < documents, other=0) - tl.load(cu_q + n, mask=n < documents, other=0)
    k_each = tl.load(cu_k + n + 1, mask=n < documents, other=0) - tl.load(cu_k + n, mask=n < documents, other=0)
    q_each = q_each.to(tl.int32)
    k_each = k_each.to(tl.int32)
    tiles = tl.cdiv(q_each, BLOCK)
    if CAUSAL:  # the t-th tile of a document sees (t + 1) * BLOCK + k_each - q_each keys
        seen = (tile + 1) * BLOCK + k_rows - q_rows
        fewer = seen - (k_each - q_each) - (n < number).to(tl.int32)
        more = tl.where(fewer < 0, tiles, tl.maximum(tiles - fewer // BLOCK, 0))
    else:
        more = tl.where((k_each > k_rows) | ((k_each == k_rows) & (n < number)), tiles, 0)
        more = tl.where(n == number, tiles - 1 - tile, more)
    return tl.sum(more, 0)


@triton.jit
def _tiles(cu, documents, BLOCK: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The tiles of all documents."""
    n = tl.arange(0, DOCUMENTS)
    each = tl.load(cu + n + 1, mask=n < documents, other=0) - tl.load(cu + n, mask=n < documents, other=0)
    return tl.sum(tl.cdiv(each.to(tl.int32), BLOCK), 0)


@triton.jit(do_not_specialize=("documents", "length"))
def clear_tail_kernel(
    x,  # [1, heads, length, DIM], or [1, heads, length] for a DIM of 1
    boundaries,  # [documents + 1]
    documents,
    length,
    stride_h,
    stride_s,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of two
    VALUE: tl.constexpr,
):
    """VALUE in ROWS rows of one head, as far as they lie past the last boundary: most programs have nothing to do."""
    end = tl.load(boundaries + documents).to(tl.int32)
    first = tl.program_id(0) * ROWS
    if first + ROWS > end:
        rows = first + tl.arange(0, ROWS)[:, None]
        d = tl.arange(0, COLUMNS)[None, :]
        at = x + tl.program_id(1).to(tl.int64) * stride_h + rows.to(tl.int64) * stride_s + d
        value = tl.full([ROWS, COLUMNS], VALUE, tl.float32).to(x.dtype.element_ty)
        tl.store(at, value, mask=(rows >= end) & (rows < length) & (d < DIM))
