"""Benchmarks that run from an installed package: `attnzoo bench attention`, `attnzoo bench generation`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

SUITES = ("dense", "window", "sparse", "features", "table")
USAGE = """attnzoo bench attention [--suite SUITE ...] [--table FILE] [options]
       attnzoo bench generation [--mechanisms NAME ...] [--batches B ...] [--length N] [options]
options: [--out FOLDER] [--jobs N] [--draw] [--commit HASH]"""


def main(argv: Sequence[str]) -> int:
    """`attnzoo bench`: time the library beside every installed peer, correctness checked in the same run.

    Returns:
        0, 1 if a contestant gave wrong results, 2 for arguments that are not understood or a machine without a GPU.
    """
    from attnzoo.bench import generation, report

    parser = argparse.ArgumentParser("attnzoo bench", usage=USAGE, description=main.__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("what", choices=["attention", "generation"], help="an op, or a whole model's decoding")
    parser.add_argument("--suite", nargs="+", choices=[*SUITES, "all"], default=["all"], help="all: without table")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder of the JSON files and plots")
    parser.add_argument("--table", type=Path, help="write the measured order of backends into this times.json")
    parser.add_argument("--jobs", type=int, default=7, help="processes that set up and compile side by side")
    names = list(generation.MECHANISMS)
    parser.add_argument("--mechanisms", nargs="+", choices=names, default=names, help="of generation")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], help="of generation")
    parser.add_argument("--length", type=int, default=8192, help="tokens in the cache, of generation")
    parser.add_argument("--draw", action="store_true", help="only redo tables and plots from the JSON files in --out")
    parser.add_argument("--commit", help="the commit that is measured; asked from git unless given")
    try:
        options = parser.parse_args(argv)
    except SystemExit as end:
        return int(end.code or 0)
    if options.draw:
        (report if options.what == "attention" else generation).draw(options.out)
        return 0
    import torch

    if not torch.cuda.is_available():
        print("attnzoo bench: needs a CUDA GPU, and there is none", file=sys.stderr)
        return 2
    if options.what == "generation":
        cases = [(name, batch) for batch in sorted(options.batches, reverse=True) for name in options.mechanisms]
        return generation.run(cases, options.out, options.jobs, options.length, options.commit)
    from attnzoo.bench import running

    suites = SUITES[:-1] if "all" in options.suite else tuple(options.suite)
    return running.run(suites, options.out, options.table, options.jobs, options.commit)
