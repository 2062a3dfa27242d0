"""Draw every picture of the documentation: `python scripts/draw_docs.py [--out docs/mechanisms]`.

Pictures of masks are drawn from the masks themselves, schematic ones from boxes and arrows placed by hand.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from attnzoo.masks import Dilated, GlobalTokens, PerHead, RandomBlocks, SlidingWindow, big_bird, longformer

MASKS = {
    "sliding_window": PerHead((SlidingWindow(16), SlidingWindow(9, ahead=8))),
    "sparse_patterns": PerHead(
        (Dilated(6, 4), GlobalTokens((0, 1, 2, 3, 30, 47)), RandomBlocks(2, 4), RandomBlocks(2, 4, length=64))
    ),
    "sparse_published": PerHead(
        (
            longformer(12, (0, 1, 40)),
            longformer(12, 2, causal=True),
            big_bird(4, random=2, length=64),
            big_bird(4, random=2),
        )
    ),
}

BLUE, ORANGE, WHITE, GREY = "#cfe0f3", "#fbd9b0", "#ffffff", "#555555"  # blue: computed, orange: kept
DPI = 120


def main() -> None:
    """Draw all pictures into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/mechanisms"), help="folder of the pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, mask in MASKS.items():
        mask.draw(out / f"{name}.png", 64)
    draw_grouped_query(out / "grouped_query.png")
    draw_mla(out / "mla.png")
    draw_linear(out / "linear.png")


def draw_grouped_query(path: Path, heads: int = 8, head_dim: int = 128) -> None:
    """Query heads over the key/value heads that they share: multi-head, grouped-query, multi-query."""
    figure = Figure(figsize=(13, 2.4), layout="constrained")
    names = ("multi-head (MHA)", "grouped-query (GQA)", "multi-query (MQA)")
    for axes, name, kv_heads in zip(figure.subplots(1, 3), names, (heads, 2, 1), strict=True):
        group = heads // kv_heads
        for kv in range(kv_heads):
            centre = kv * group + (group - 1) / 2
            for q in range(kv * group, (kv + 1) * group):
                axes.plot((q, centre), (2.4, 0.4), color=GREY, linewidth=1, zorder=0)
            axes.add_patch(Rectangle((centre - 0.4, 0), 0.8, 0.8, facecolor=ORANGE, edgecolor="black"))
            axes.text(centre, 0.4, "k, v", ha="center", va="center", fontsize=10)
        for q in range(heads):
            axes.add_patch(Circle((q, 2.4), 0.38, facecolor=BLUE, edgecolor="black"))
            axes.text(q, 2.4, f"q{q}", ha="center", va="center", fontsize=10)
        size = 2 * kv_heads * head_dim * 2
        plural = "" if kv_heads == 1 else "s"
        axes.text((heads - 1) / 2, -0.55, f"{kv_heads} KV head{plural}", ha="center", va="center", fontsize=12)
        cost = f"2 × {kv_heads} × {head_dim} × 2 = {size:,} bytes a token and layer (bf16)"
        axes.text((heads - 1) / 2, -1.05, cost, ha="center", va="center", fontsize=10)
        axes.set_title(name, fontsize=13)
        plain(axes, (-0.7, heads - 0.3), (-1.3, 2.9))
    figure.savefig(path, dpi=DPI)


def draw_mla(path: Path) -> None:
    """The two forms of latent attention over the same cache, with DeepSeek-V3's sizes."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    materialised, absorbed = figure.subplots(2, 1)
    for axes, name in ((materialised, "materialised: keys and values are made"), (absorbed, "absorbed: none is made")):
        axes.set_title(name, fontsize=13, loc="left")
        plain(axes, (0, 120), (0, 36))
        box(axes, (9, 18), "tokens x", WHITE, width=12)
        for y, text, colour in (
            (26, "latent $c_j$  [512]", ORANGE),
            (16, "rope key $r_j$  [64]", ORANGE),
            (5, "$q_h$ [128],  $p_h$ [64]", BLUE),
        ):
            box(axes, (33, y), text, colour)
            arrow(axes, (15, 18), (23, y))
        axes.text(33, 32, "cached, one for all heads", ha="center", va="center", fontsize=11, color=GREY)

    box(materialised, (66, 31), r"$v_{hj} = W_{UV,h}\, c_j$  [128]", BLUE, width=26)
    box(materialised, (66, 22), r"$k_{hj} = W_{UK,h}\, c_j$  [128]", BLUE, width=26)
    arrow(materialised, (43, 26), (53, 31))
    arrow(materialised, (43, 26), (53, 22))
    box(materialised, (70, 9), "$w_{hj}$ = softmax of\n$s\\, (q_h \\cdot k_{hj} + p_h \\cdot r_j)$", BLUE, width=28)
    arrow(materialised, (70, 18.8), (70, 12.4))
    arrow(materialised, (43, 16), (56, 11))
    arrow(materialised, (43, 5), (56, 7.5))
    box(materialised, (106, 22), "$o_h = Σ_j\\, w_{hj} v_{hj}$\n[128]", WHITE)
    arrow(materialised, (79, 31), (96, 24))
    arrow(materialised, (84, 9), (98, 18.4))

    box(absorbed, (66, 5), r"$u_h = W_{UK,h}^T\, q_h$  [512]", BLUE, width=26)
    arrow(absorbed, (43, 4), (53, 4))
    arrow(absorbed, (43, 7), (56, 13.5))
    box(absorbed, (70, 16), "$w_{hj}$ = softmax of\n$s\\, (u_h \\cdot c_j + p_h \\cdot r_j)$", BLUE, width=28)
    arrow(absorbed, (70, 8.2), (70, 12.6))
    arrow(absorbed, (43, 16), (56, 16))
    arrow(absorbed, (43, 25), (56, 18))
    box(absorbed, (70, 29), r"$Σ_j\, w_{hj} c_j$  [512]", BLUE, width=28)
    arrow(absorbed, (43, 27), (56, 29))
    arrow(absorbed, (70, 19.2), (70, 25.6))
    box(absorbed, (106, 29), "$o_h = W_{UV,h}\\, Σ_j\\, w_{hj} c_j$\n[128]", WHITE, width=24)
    arrow(absorbed, (84, 29), (94, 29))
    figure.savefig(path, dpi=DPI)


def draw_linear(path: Path, chunks: int = 3, cells: int = 6) -> None:
    """Chunks of a sequence: all pairs inside one, the state from one to the next."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots()
    step, left, cell = 40, 23, 2.2
    for chunk in range(chunks):
        x = left + chunk * step - cells * cell / 2
        for row in range(cells):
            for column in range(cells):
                colour = BLUE if column <= row else WHITE
                corner = (x + column * cell, 33 - row * cell)
                axes.add_patch(Rectangle(corner, cell, cell, facecolor=colour, edgecolor=GREY, linewidth=0.6))
        centre, bottom, top = left + chunk * step, 33 - (cells - 1) * cell, 33 + cell
        axes.text(centre, top + 9.5, f"chunk {chunk + 1}", ha="center", va="center", fontsize=13)
        axes.text(centre, top + 6, "outputs", ha="center", va="center", fontsize=11)
        arrow(axes, (centre, top + 0.4), (centre, top + 4.6))
        state, following = centre - step / 2, centre + step / 2
        arrow(axes, (state + 1.5, 13.4), (x - 0.4, bottom + 4))
        axes.text(centre - 13.2, 16.5, "φ(q) S", ha="left", va="center", fontsize=11)
        arrow(axes, (centre + 4, bottom - 0.5), (following - 7.5, 11.8))
        axes.text(centre + 6.5, 15.2, "+ Σ φ(k) vᵀ", ha="right", va="center", fontsize=11)
        arrow(axes, (state + 7, 10), (following - 7, 10))
    for number in range(chunks + 1):
        text = "S, z = 0" if number == 0 else f"S, z after\n{number} chunk{'s' if number > 1 else ''}"
        box(axes, (left - step / 2 + number * step, 10), text, ORANGE, width=13.5, height=6.4)
    middle = left + (chunks - 1) * step / 2
    lines = (
        "inside a chunk of 64 tokens: φ(q) · φ(k) of every pair (φ: the feature map);"
        "    between chunks: the state, of constant size",
        "decoding, one token at a time:    S ← d S + φ(k) vᵀ,    z ← d z + φ(k),    out = φ(q) S / (φ(q) · z)",
    )
    for y, line in zip((3, -0.5), lines, strict=True):
        axes.text(middle, y, line, ha="center", va="center", fontsize=11)
    plain(axes, (-5, left + (chunks - 0.5) * step + 8), (-2.5, 46.5))
    figure.savefig(path, dpi=DPI)


def box(
    axes: Axes, centre: tuple[float, float], text: str, colour: str, width: float = 20, height: float = 6.4
) -> None:
    """A filled rectangle with text in its middle."""
    corner = (centre[0] - width / 2, centre[1] - height / 2)
    axes.add_patch(Rectangle(corner, width, height, facecolor=colour, edgecolor="black"))
    axes.text(*centre, text, ha="center", va="center", fontsize=11)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow from one point to another."""
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": GREY, "shrinkA": 0, "shrinkB": 0})


def plain(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    """Show this range, with equal units and no frame."""
    axes.set(xlim=x, ylim=y, aspect="equal")
    axes.axis("off")


if __name__ == "__main__":
    main()
