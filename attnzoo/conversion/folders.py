"""A folder that appears whole or not at all: written beside its place, synced, and renamed into it."""

import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attnzoo.conversion.errors import ConversionError


def check_free(out: str | Path, *, overwrite: bool) -> Path:
    """The resolved path of an output folder that may be written; raises ConversionError where it may not.

    An existing folder may be replaced with `overwrite`, if it is empty or a checkpoint (has a config.json): no mistyped
    path deletes anything else.
    """
    out = Path(out).expanduser().resolve()
    if not out.exists():
        return out
    if not overwrite:
        raise ConversionError(f"out {out} exists already; choose another folder, or pass overwrite=True to replace it")
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise ConversionError(f"out {out} exists and is no checkpoint folder (no config.json), so it is not replaced")
    return out


@contextmanager
def whole_folder(out: str | Path, *, overwrite: bool = False, size: int = 0) -> Iterator[Path]:
    """A new empty folder beside `out`, which becomes `out` when the block ends without an exception.

    On any exception, Ctrl-C among them, it is removed and `out` stays as it was. A killed process leaves a hidden
    `.NAME.XXXXXXXX.partial` behind, which no later run reads or trips over; it can be deleted. With `overwrite`, an old
    `out` is exchanged for the complete new one: in one step where the system can (Linux), by renames elsewhere.

    Args:
        out: where the folder shall appear; parents are created.
        size: bytes that will be written; checked against the free space first.

    Raises:
        ConversionError: `out` exists and may not be replaced, or the disk is (or becomes) full.
    """
    out = check_free(out, overwrite=overwrite)
    _check_space(out, size)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir()
        yield partial
        _sync(partial)
        if out.exists():
            check_free(out, overwrite=overwrite)  # it may have appeared in the meantime
            _exchange(partial, out)
        else:
            os.rename(partial, out)
        to_disk(out.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConversionError(_no_space(out, size)) from error
        raise
    finally:
        # The unfinished folder, or the old one after an exchange.
        shutil.rmtree(partial, ignore_errors=True)


def to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, have reached the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_space(out: Path, size: int) -> None:
    there = next(parent for parent in out.parents if parent.exists())
    if shutil.disk_usage(there).free < size:
        raise ConversionError(_no_space(out, size))


def _no_space(out: Path, size: int) -> str:
    there = next(parent for parent in out.parents if parent.exists())
    free = shutil.disk_usage(there).free
    return f"out {out} needs {size / 1e6:,.1f} MB on its disk, and {free / 1e6:,.1f} MB are free; nothing was kept"


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        to_disk(path)
    to_disk(folder)


def _exchange(new: Path, old: Path) -> None:
    """Give each the other's name."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        at_cwd, exchange = -100, 2
        if hasattr(libc, "renameat2") and not libc.renameat2(at_cwd, bytes(new), at_cwd, bytes(old), exchange):
            return
    aside = new.with_name(new.name + ".old")
    os.rename(old, aside)
    os.rename(new, old)
    os.rename(aside, new)
