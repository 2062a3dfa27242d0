"""What a user gets from `pip install .`: what it costs to import, what it holds, and that it works from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import attnzoo
from attnzoo.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGES = ("attnzoo", "recipes", "conf")


def python(code: str, folder: Path, cwd: Path) -> str:
    """What a fresh process prints that finds our packages in `folder` alone."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that nothing appears in the working tree."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").touch()
    python("from setuptools.build_meta import build_wheel; build_wheel('.')", source, cwd=source)
    return next(source.glob("attnzoo-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is unpacked into."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.serial
def test_importing_attnzoo_costs_at_most_half_a_second_more_than_torch(tmp_path: Path) -> None:
    code = "import torch, time; t = time.perf_counter(); import attnzoo; print(time.perf_counter() - t)"
    # The least of three is the package's own cost; the rest is what else the machine was doing.
    assert any(float(python(code, ROOT, tmp_path)) <= 0.5 for _ in range(3))


def test_the_rooms_below_hf_import_neither_transformers_nor_lightning(tmp_path: Path) -> None:
    code = (
        "import sys, attnzoo; attnzoo.GQA, attnzoo.masks, attnzoo.ops, attnzoo.caches, attnzoo.GroupedQueryAttention;"
        "import attnzoo.conversion;"
        "print({'transformers', 'lightning', 'pytorch_lightning', 'datasets', 'hydra'} & set(sys.modules) or 'none')"
    )
    assert python(code, ROOT, tmp_path).strip() == "none"


def test_every_public_name_is_listed_and_resolves() -> None:
    assert set(attnzoo.__all__) <= set(dir(attnzoo))
    for name in attnzoo.__all__:
        assert getattr(attnzoo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        attnzoo.nonsense  # noqa: B018


def test_the_wheel_holds_the_three_packages_with_every_config_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".yaml") or path.name in ("py.typed", "times.json")
    }
    assert held == wanted
    assert any(name.startswith("conf/") and name.endswith(".yaml") for name in held)


@pytest.mark.slow
def test_every_command_explains_itself_from_any_folder(installed: Path, tmp_path: Path) -> None:
    code = f"""
import pathlib, attnzoo, recipes, conf
from attnzoo import cli
for package in (attnzoo, recipes, conf):
    assert pathlib.Path(package.__file__).is_relative_to({str(installed)!r}), package.__file__
for command in {list(COMMANDS)!r}:
    print('command', command)
    try:
        assert cli.main([command, '--help']) == 0
    except SystemExit as end:
        assert end.code in (0, None), end.code
"""
    said = python(code, installed, tmp_path).split("command ")[1:]
    for command, text in zip(COMMANDS, said, strict=True):
        assert len(text.splitlines()) > 5, f"attnzoo {command} --help says too little:\n{text}"
    assert not list(tmp_path.iterdir()), "asking for help wrote something"
