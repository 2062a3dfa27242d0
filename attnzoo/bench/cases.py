"""What is timed: shapes, masks and options, with the FLOPs that count for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.masks import Causal, Dilated, Documents, Full, Mask, SlidingWindow, big_bird, longformer

TOKENS = 16384
VIA = ("sdpa", "sdpa-flash", "sdpa-cudnn", "flash-attn-4", "fa3-fwd", "triton")  # what the table of choices ranks


@dataclass(frozen=True)
class Case:
    """One row of work, and who is timed on it.

    `contestants` are peers called by their own interface ("peer:flex"), or `attnzoo.ops.attention` with a backend
    ("via:triton", "via:auto").
    """

    suite: str
    name: str
    dim: int
    q_heads: int
    k_heads: int
    batch: int
    length: int
    mask: Mask
    contestants: tuple[str, ...]
    softcap: float | None = None
    sinks: bool = False
    documents: int = 0  # packed side by side, of equal length
    alibi: bool = False
    dropout_p: float = 0.0
    deterministic: bool = False

    @property
    def kind(self) -> str:
        """As `attnzoo.ops.softmax.choice` names it."""
        for name, here in (("sinks", self.sinks), ("softcap", self.softcap), ("packed", self.documents)):
            if here:
                return name
        kinds = (("full", Full), ("causal", Causal), ("window", SlidingWindow))
        return next((name for name, kind in kinds if isinstance(self.mask, kind)), "sparse")

    @property
    def whole_mask(self) -> Mask:
        """The mask with the documents in it."""
        return self.mask & Documents(self.boundaries) if self.documents else self.mask

    @property
    def boundaries(self) -> list[int]:
        """Where the packed documents begin and end."""
        return [self.length // self.documents * d for d in range(self.documents + 1)]

    def flops(self, device: str = "cuda") -> float:
        """4 * B * Hq * D * pairs: S * S, halved if causal, S * W for a window, and counted for other patterns.

        That is the forward; a backward counts 2.5 times as much.
        """
        return 4.0 * self.batch * self.q_heads * self.dim * self._pairs(device)

    def _pairs(self, device: str) -> float:
        square = float(self.length) ** 2 / max(1, self.documents)
        if isinstance(self.mask, Full):
            return square
        if isinstance(self.mask, Causal):
            return square / 2
        if isinstance(self.mask, SlidingWindow):
            return float(self.length) * (self.mask.window + self.mask.ahead)
        j = torch.arange(self.length, device=device)
        rows = j[:, None].split(1024)
        return float(sum(self.mask.visible(i, j[None]).sum() for i in rows))


def cases(suites: tuple[str, ...]) -> list[Case]:
    """The cases of the named suites."""
    makers: dict[str, Callable[[], list[Case]]] = {
        "dense": _dense,
        "window": _window,
        "sparse": _sparse,
        "features": _features,
        "table": _table,
    }
    return [case for suite in suites for case in makers[suite]()]


def flex_mask(case: Case, device: str = "cuda") -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The case's mask as a user of FlexAttention would write it."""
    mask = case.mask
    if isinstance(mask, Causal):
        return lambda b, h, i, j: i >= j
    if isinstance(mask, SlidingWindow):
        return lambda b, h, i, j: (i >= j) & (i - j < mask.window)
    if isinstance(mask, Dilated):
        reach, step = mask.window * mask.dilation, mask.dilation
        return lambda b, h, i, j: (i >= j) & (i - j < reach) & ((i - j) % step == 0)
    if case.name.startswith("longformer"):
        half, tokens = LONGFORMER[0] // 2, LONGFORMER[1]
        return lambda b, h, i, j: ((i - j <= half) & (j - i <= half)) | (i < tokens) | (j < tokens)
    if case.name.startswith("big_bird"):
        at = torch.arange(0, case.length, BIG_BIRD, device=device)
        table = mask.visible(at[:, None], at[None])
        return lambda b, h, i, j: table[i // BIG_BIRD, j // BIG_BIRD]
    ends = torch.tensor(DOCUMENTS[1:], device=device)
    document = torch.bucketize(torch.arange(case.length, device=device), ends, right=True)
    return lambda b, h, i, j: (document[i] == document[j]) & (i >= j)


LONGFORMER = (512, 64)  # the window, both sides together, and the global tokens
BIG_BIRD = 64  # tokens in a block
DOCUMENTS = (0, 1000, 1017, 3500, 4100, 8000, 8200, 9001, 13500, 16000, TOKENS)


def _dense() -> list[Case]:
    peers = ("peer:sdpa", "peer:sdpa-flash", "peer:sdpa-cudnn", "peer:flex", "peer:fa3", "peer:fa4")
    who = (*peers, *(f"via:{b}" for b in VIA), "via:auto")
    return [
        Case("dense", f"causal D{d} {q}/{k} {TOKENS // s}x{s}", d, q, k, TOKENS // s, s, Causal(), who)
        for d, q, k in ((128, 16, 16), (128, 32, 8), (64, 32, 32))
        for s in (1024, 4096, 16384)
    ]


def _window() -> list[Case]:
    who = ("peer:flex", "peer:fa4", "via:sdpa-flash", "via:flash-attn-4", "via:triton", "via:auto")
    return [
        Case("window", f"window {w} D128 32/8 1x{s}", 128, 32, 8, 1, s, SlidingWindow(w), who)
        for s, w in ((16384, 1024), (65536, 1024), (65536, 4096))
    ]


def _sparse() -> list[Case]:
    who = ("peer:flex", "via:triton", "via:auto")
    window, tokens = LONGFORMER
    patterns = {
        "dilated 256x4": Dilated(256, 4),
        f"longformer {window}+{tokens}": longformer(window, tokens),
        f"big_bird {BIG_BIRD}": big_bird(BIG_BIRD, length=TOKENS),
        "documents, causal": Documents(DOCUMENTS) & Causal(),
    }
    return [
        Case("sparse", f"{name} D128 32/8 1x{TOKENS}", 128, 32, 8, 1, TOKENS, mask, who)
        for name, mask in patterns.items()
    ]


def _features() -> list[Case]:
    def case(name: str, *who: str, packed: bool = False, **options: object) -> Case:
        batch, length = (1, TOKENS) if packed else (4, TOKENS // 4)
        contestants = ("via:triton", *who, "via:auto")
        shape = (128, 32, 8, batch, length)
        return Case("features", name, *shape, Causal(), contestants, documents=4 if packed else 0, **options)  # type: ignore[arg-type]

    peers = ("peer:fa3", "peer:fa4", "via:flash-attn-4", "via:fa3-fwd")
    return [
        case("plain", *peers),
        case("softcap", *peers, softcap=30.0),
        case("sinks", "peer:fa4", "via:flash-attn-4", sinks=True),
        case("packed", *peers, "via:sdpa", packed=True),
        case("alibi", alibi=True),
        case("deterministic", "via:flash-attn-4", deterministic=True),
        case("dropout", dropout_p=0.1),
    ]


def _table() -> list[Case]:
    """Classes that the dispatch has to know and the other suites leave out."""
    who = tuple(f"via:{b}" for b in VIA)
    shapes: list[tuple[Mask, int, int, int, int]]
    shapes = [(Full(), d, q, k, s) for d, q, k in ((128, 32, 8), (64, 16, 16)) for s in (256, 1024, 4096)]
    shapes += [(Causal(), d, q, k, 256) for d, q, k in ((128, 32, 8), (64, 16, 16))]
    shapes += [(Causal(), 256, 16, 8, 4096)]
    return [
        Case("table", f"{mask.pattern} D{d} {q}/{k} {TOKENS // s}x{s}", d, q, k, TOKENS // s, s, mask, who)
        for mask, d, q, k, s in shapes
    ]
