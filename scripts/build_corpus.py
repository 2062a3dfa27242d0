"""Builds the corpus of the studies: plays, the King James Bible, source and docs of Python and installed packages.

    python scripts/build_corpus.py FOLDER [--site SITE_PACKAGES] [--stdlib FOLDER]

`data=corpus` builds it by itself, from this Python, at its first use; this is for another place or other packages. The
folder may not exist. Prints what it wrote, domain by domain.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from recipes.corpus import build_corpus
from recipes.samples import ensure_sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--site", type=Path, help="installed packages to read; those of this Python by default")
    parser.add_argument("--stdlib", type=Path, help="the standard library to read; this Python's by default")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists already")
    plays, bible = ensure_sample("shakespeare"), ensure_sample("bible")
    build_corpus(options.out, plays=plays, bible=bible, site=options.site, stdlib=options.stdlib)
    manifest = json.loads((options.out / "manifest.json").read_text(encoding="utf-8"))
    for name, splits in manifest["domains"].items():
        for split, about in splits.items():
            print(f"{name:>8} {split:>8}: {about['bytes'] / 1e6:6.2f} MB, {len(about['documents']):5} documents")


if __name__ == "__main__":
    main()
