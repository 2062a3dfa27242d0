"""Text to convert by that is a part of the text to train on, in the proportions of its domains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from recipes.data import TextDataModule

FROM_DATA = "data"  # what convert.calibration says then
SPARE = 1.25  # tokens that are written for one that is to be read: cut out of its text, a piece may be read otherwise


@contextmanager
def calibrated(convert: Mapping[str, Any], data: TextDataModule) -> Iterator[Mapping[str, Any]]:
    """The conf/convert group with the path of its calibration text, which is there while the context lasts."""
    if convert["calibration"] != FROM_DATA:
        yield convert
        return
    with TemporaryDirectory() as folder:
        write_calibration(data, Path(folder), samples=convert["samples"], length=convert["sample_length"])
        yield {**convert, "calibration": folder}


def write_calibration(data: TextDataModule, folder: Path, *, samples: int, length: int) -> None:
    """Writes `samples` pieces of the training text, each of `length` tokens and some more, as text files into `folder`.

    Raises ValueError where no document of the data is that long.
    """
    wanted = min(int(length * SPARE), data.seq_len)
    written = looked_at = 0
    for batch in data.train_loader():
        for start, end in pairwise(batch["cu_seqlens"].tolist()):
            looked_at += 1
            if end - start >= wanted and written < samples:
                text = data.tokenizer.decode(batch["input_ids"][0, start : start + wanted], skip_special_tokens=True)
                (folder / f"{written:05}.txt").write_text(text, encoding="utf-8")
                written += 1
        if written == samples or looked_at > 1000 * (written + 1):
            break
    if not written:
        raise ValueError(
            f"convert.calibration is {FROM_DATA!r}, and data.path has no document of {wanted} tokens; lower "
            f"convert.sample_length ({length}), or name other text"
        )
