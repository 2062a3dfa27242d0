"""Pictures of masks: `mask.draw(path)`, or `python -m attnzoo.masks.causal`."""

from __future__ import annotations

import argparse
from pathlib import Path

from attnzoo.masks.base import Mask


def draw(mask: Mask, path: str | Path, q_len: int, k_len: int) -> None:
    """Save `mask.dense(q_len, k_len)` as a picture; the format follows the file's ending."""
    from matplotlib.figure import Figure

    visible = mask.dense(q_len, k_len)
    figure = Figure(figsize=(5, 5 * q_len / k_len + 0.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(visible, cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest", aspect="equal")
    axes.set(xlabel="key", ylabel="query")
    axes.set_title(f"{mask}\n{visible.float().mean():.1%} of the pairs visible", fontsize=9, wrap=True)
    if max(q_len, k_len) <= 64:
        axes.set_xticks([x - 0.5 for x in range(1, k_len)], minor=True)
        axes.set_yticks([y - 0.5 for y in range(1, q_len)], minor=True)
        axes.grid(which="minor", color="white", linewidth=0.4)
        axes.tick_params(which="minor", length=0)
    figure.savefig(path, dpi=150)


def main(mask: Mask) -> None:
    """Command line of a pattern's file: draw an example and print a small one."""
    parser = argparse.ArgumentParser(description=f"draw {mask}")
    parser.add_argument("--length", type=int, default=64, help="queries and keys (default 64)")
    parser.add_argument("--out", type=Path, default=Path(f"{mask.pattern}.png"), help="the picture's path")
    args = parser.parse_args()
    mask.draw(args.out, args.length)
    print(
        f"{mask}: {mask.density(args.length, args.length):.1%} of the pairs visible at length {args.length}; {args.out}"
    )
