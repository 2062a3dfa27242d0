"""Pictures of masks: `mask.draw(path)`, or `python -m attnzoo.masks.causal`."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from attnzoo.masks.base import Mask

_PANELS = 4  # heads that a picture shows beside one another
_PRINTED = 32  # queries and keys of the small form in text


def draw(mask: Mask, path: str | Path, q_len: int, k_len: int) -> None:
    """Save `mask.dense(q_len, k_len)` as a picture, one panel a head; the format follows the file's ending."""
    from matplotlib.figure import Figure

    heads = mask.heads or 1
    columns = min(heads, _PANELS)
    rows = -(-heads // columns)
    figure = Figure(figsize=(5 * columns, rows * (5 * q_len / k_len + 1)), layout="constrained")
    for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if number >= heads:
            axes.axis("off")
            continue
        visible = mask.head(number).dense(q_len, k_len)
        axes.imshow(visible.int().numpy(), cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest", aspect="equal")
        axes.set(xlabel="key", ylabel="query")
        name = textwrap.fill(str(mask.head(number)), 60, max_lines=3)
        axes.set_title(f"{name}\n{visible.float().mean():.1%} of the pairs visible", fontsize=9)
        if max(q_len, k_len) <= 64:
            axes.set_xticks([x - 0.5 for x in range(1, k_len)], minor=True)
            axes.set_yticks([y - 0.5 for y in range(1, q_len)], minor=True)
            axes.grid(which="minor", color="white", linewidth=0.4)
            axes.tick_params(which="minor", length=0)
    figure.savefig(path, dpi=110)


def sketch(mask: Mask, q_len: int, k_len: int) -> str:
    """The mask in characters, a line a query; a mask that differs by head gives one drawing below another."""
    blocks = mask.dense(q_len, k_len).reshape(-1, q_len, k_len).tolist()
    return "\n\n".join("\n".join(" ".join("■" if seen else "·" for seen in row) for row in rows) for rows in blocks)


def main(mask: Mask, name: str | None = None) -> None:
    """Command line of a pattern's file: save an example's picture and print the example small.

    Args:
        mask: the example.
        name: of the picture, without its ending; None: the pattern's.
    """
    parser = argparse.ArgumentParser(description=f"draw {mask}")
    parser.add_argument("--length", type=int, default=64, help="queries and keys (default 64)")
    parser.add_argument("--out", type=Path, default=Path(f"{name or mask.pattern}.png"), help="the picture's path")
    args = parser.parse_args()
    if args.length < 1:
        parser.error(f"--length must be at least 1, got {args.length}")
    mask.draw(args.out, args.length)
    small = min(args.length, _PRINTED)
    print(sketch(mask, small, small))
    share = mask.density(args.length, args.length)
    print(f"{mask}: {share:.1%} of the pairs visible at length {args.length}; {args.out}")
