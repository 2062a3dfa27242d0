"""From a conf/data group to documents: finds the files, splits them, and opens them with `datasets`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import glob
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset

from recipes.data_config import DataConfig
from recipes.samples import resolve_sample

log = logging.getLogger(__name__)

SUFFIXES = {".txt": "text", ".md": "text", ".rst": "text"} | {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
SUFFIXES |= {".parquet": "parquet"}
COMPRESSED = {".gz", ".zst", ".bz2", ".xz"}
READERS = {"text": "from_text", "jsonl": "from_json", "parquet": "from_parquet"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

Documents = Dataset | IterableDataset


@dataclass(frozen=True)
class Corpus:
    """Documents with their text in `column`; `held_out` is None when a fraction of `train` is to be held out."""

    train: Documents
    held_out: Documents | None
    column: str


def open_corpus(config: DataConfig) -> Corpus:
    """Opens what the config names; raises ValueError for what is missing, empty or without the column."""
    path = resolve_sample(config.path)
    kind = _format(path, config.format, "path")
    if kind == "hub":
        return _hub_corpus(path, config)
    column = "text" if kind == "text" else config.column
    files = _files(path, kind, "path")
    if config.val_path is not None:
        held_out = _files(resolve_sample(config.val_path), kind, "val_path")
        both = set(files) & set(held_out)
        if both:
            raise ValueError(f"data.val_path is {config.val_path!r}, which shares {min(both)} with data.path")
    else:
        files, held_out = _split_files(files, config)
    return Corpus(
        train=_open_files(files, kind, column, config, "path"),
        held_out=_open_files(held_out, kind, column, config, "val_path") if held_out else None,
        column=column,
    )


def texts(documents: Documents, column: str) -> Iterator[str]:
    """The documents' texts, the empty ones as well."""
    for row in documents:
        yield _text(row, column)


def _text(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"data.column is {column!r}, which holds {type(value).__name__}, not text")
    return value or ""


def _format(path: str, given: str, name: str) -> str:
    if given != "auto":
        return given
    found = Path(path).expanduser()
    if found.is_dir():
        kinds = {SUFFIXES[_suffix(file)] for file in _visible(found) if _suffix(file) in SUFFIXES}
        if len(kinds) != 1:
            holds = f"both {' and '.join(sorted(kinds))} files" if kinds else f"no {', '.join(SUFFIXES)} file"
            raise ValueError(f"data.{name} is {path!r}, which holds {holds}; data.format or a glob can choose")
        return kinds.pop()
    suffix = _suffix(found)
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    if found.exists() or "*" in path:
        raise ValueError(f"data.format is auto, which does not know what {path!r} holds; allowed: text, jsonl, parquet")
    if HUB_ID.fullmatch(path):
        return "hub"
    raise ValueError(f"data.{name} is {path!r}: there is no such file or folder")


def _files(path: str, kind: str, name: str) -> list[Path]:
    found = Path(path).expanduser()
    if found.is_file():
        files = [found]
    elif found.is_dir():
        files = [file for file in _visible(found) if SUFFIXES.get(_suffix(file)) == kind]
        if not files:
            raise ValueError(f"data.{name} is {path!r}, a folder without {kind} files")
    else:
        files = [Path(match) for match in glob(str(found), recursive=True) if Path(match).is_file()]
        if not files:
            raise ValueError(f"data.{name} is {path!r}: there is no such file or folder")
    return sorted(file.resolve() for file in files)


def _visible(folder: Path) -> Iterable[Path]:
    return (
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def _suffix(file: Path) -> str:
    return Path(file.stem).suffix.lower() if file.suffix in COMPRESSED else file.suffix.lower()


def _split_files(files: list[Path], config: DataConfig) -> tuple[list[Path], list[Path]]:
    """Train and held-out files by `val_files`; no held-out files when the corpus knows none of these names."""
    held_out = [file for file in files if any(fnmatch(file.name, pattern) for pattern in config.val_files)]
    if not held_out:
        if config.val_files:
            log.warning(
                "none of data.val_files is in %s, so %g of its documents are held out", config.path, config.val_fraction
            )
        return files, []
    for pattern in config.val_files:
        if not any(fnmatch(file.name, pattern) for file in held_out):
            raise ValueError(f"data.val_files has {pattern!r}, but {config.path!r} holds no such file")
    train = [file for file in files if file not in held_out]
    if not train:
        raise ValueError(f"data.val_files is {list(config.val_files)!r}, which leaves no file of {config.path!r}")
    return train, held_out


def _open_files(files: list[Path], kind: str, column: str, config: DataConfig, name: str) -> Documents:
    extra = {"sample_by": config.sample_by} if kind == "text" else {}
    where = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"data.{name}: {where} is empty")
    try:
        # Not load_dataset, which tells the hub of every local file that it opens, and waits where there is no network.
        read = getattr(IterableDataset if config.streaming else Dataset, READERS[kind])
        documents = read([str(file) for file in files], **extra)
        return _only(documents, column)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"data.{name}: {where} could not be read as {kind}: {error.__cause__ or error}") from error


def _hub_corpus(path: str, config: DataConfig) -> Corpus:
    def open_split(split: str) -> Documents:
        try:
            documents = load_dataset(path, config.subset, split=split, streaming=config.streaming)
        except Exception as error:
            raise ValueError(
                f"data.path is {path!r}: there is no such file or folder here, and as a hub dataset (subset "
                f"{config.subset!r}, split {split!r}) it could not be opened: {error}"
            ) from error
        return _only(documents, config.column)

    held_out = None if config.val_split is None else open_split(config.val_split)
    if config.val_split == config.split:
        raise ValueError(f"data.val_split is {config.val_split!r}, which is data.split as well")
    return Corpus(train=open_split(config.split), held_out=held_out, column=config.column)


def _only(documents: Documents, column: str) -> Documents:
    names = documents.column_names
    if names is None:  # a stream that does not know its columns before the first row
        names = list(next(iter(documents), {column: ""}))
    if column not in names:
        raise ValueError(f"data.column is {column!r}; the data has {', '.join(names)}")
    return documents.select_columns([column])
