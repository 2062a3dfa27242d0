"""`python -m attnzoo.bench.warm SUITE ... --share N/M`: run every M-th case once, to have its kernels in the caches."""

from __future__ import annotations

import argparse
import contextlib
import os

os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # read when the package is imported

import torch

from attnzoo.bench.cases import cases
from attnzoo.bench.contestants import Unavailable, draw, prepare

COMPILED = ("peer:flex", "peer:fa4", "via:triton")


def main() -> None:
    """Forward and backward of this process's share of the contestants that are compiled on first use."""
    parser = argparse.ArgumentParser()
    parser.add_argument("suites", nargs="+")
    parser.add_argument("--share", default="0/1")
    options = parser.parse_args()
    number, of = map(int, options.share.split("/"))
    work = [(case, name) for name in COMPILED for case in cases(tuple(options.suites)) if name in case.contestants]
    for case, name in work[number::of]:
        # What does not run is reported where it is timed.
        with contextlib.suppress(Unavailable, Exception):
            data = draw(case)
            torch.autograd.grad(prepare(name, case, data)(), data.leaves, data.d_out)


if __name__ == "__main__":
    main()
