"""The plan of the house, checked on the source: who may import whom, and what every public name owes its reader."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first. A room imports only from floors below its own; specs name masks, so they stand above them.
FLOORS = ["masks", "specs", "ops", "caches", "layers", "conversion", "planning", "hf", "recipes", "bench", "cli"]

# The heavy libraries, and the only rooms that may know them.
KEYS = {
    "transformers": {"hf", "recipes"},
    "accelerate": {"hf", "recipes"},
    "lightning": {"recipes"},
    "pytorch_lightning": {"recipes"},
    "datasets": {"recipes"},
    "hydra": {"recipes"},
    "omegaconf": {"recipes"},
    "matplotlib": {"masks", "recipes", "bench"},
}

# What computes an op. They share code through the other files of their folder (common.py, rows.py).
BACKENDS = {
    "blocked",
    "chunked",
    "cudnn",
    "fa3",
    "flash",
    "flash4",
    "recurrent",
    "reference",
    "sdpa",
    "tiled",
    "triton",
}

SOURCES = sorted([*(ROOT / "attnzoo").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")])


def name_of(path: Path) -> str:
    """The dotted module name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """`attnzoo.ops.softmax.api` stands in `ops`; None for the root of attnzoo, which only hands names on."""
    parts = module.split(".")
    return "recipes" if parts[0] == "recipes" else parts[1] if len(parts) > 1 else None


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of a file, those inside functions and import_module("...") too."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (
                (node.lineno, part.value)
                for part in node.args[:1]
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            )


def test_a_room_imports_only_from_below() -> None:
    wrong = []
    for path in SOURCES:
        room = room_of(name_of(path))
        if room is None:
            continue
        assert room in FLOORS, f"{path} stands in a room that has no floor yet"
        for line, name in imports_of(path):
            if name.split(".")[0] not in ("attnzoo", "recipes"):
                continue
            target = room_of(name)
            if target == room:
                continue
            if target not in FLOORS:  # a public name, from attnzoo itself
                if room not in ("recipes", "cli"):
                    wrong.append(f"{path}:{line} imports {name}: take it from the room that it stands in")
            elif FLOORS.index(target) >= FLOORS.index(room):
                wrong.append(f"{path}:{line} ({room}) imports {name}, which is not below it")
    assert not wrong, "\n".join(wrong)


def test_only_the_rooms_with_a_key_know_a_heavy_library() -> None:
    wrong = [
        f"{path}:{line} imports {name}"
        for path in SOURCES
        for line, name in imports_of(path)
        if (room := room_of(name_of(path))) not in KEYS.get(name.split(".")[0], {room})
    ]
    assert not wrong, "\n".join(wrong)


def test_backends_of_an_op_never_import_one_another() -> None:
    wrong = []
    for path in SOURCES:
        op, _, rest = name_of(path).removeprefix("attnzoo.ops.").partition(".")
        backend = rest.split(".")[0]
        if backend not in BACKENDS:
            continue
        others = tuple(f"attnzoo.ops.{op}.{other}" for other in BACKENDS - {backend})
        wrong += [f"{path}:{line} imports {name}" for line, name in imports_of(path) if name.startswith(others)]
    assert not wrong, "\n".join(wrong)


def public_definitions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """The functions and classes at the top of a file whose names have no leading underscore; overloads left out."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list):
            yield node


def test_public_functions_and_classes_have_docstrings() -> None:
    bare = [
        f"{path}:{node.lineno} {node.name}"
        for path in SOURCES
        if path.is_relative_to(ROOT / "attnzoo")
        for node in public_definitions(path)
        if not ast.get_docstring(node)
    ]
    assert not bare, "\n".join(bare)


def test_every_source_file_says_what_it_is_for() -> None:
    silent = [
        str(path) for path in SOURCES if (text := path.read_text(encoding="utf-8")) and not text.startswith('"""')
    ]
    assert not silent, "\n".join(silent)


def texts() -> Iterator[Path]:
    """Every text file of the project, without asking git."""
    folders = ["attnzoo", "recipes", "conf", "scripts", "tests", "docs", ".ci", ".github"]
    yield from (path for path in ROOT.iterdir() if path.is_file())
    for folder in folders:
        yield from (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def test_no_file_names_a_path_of_the_machine_that_it_was_written_on() -> None:
    here = [re.escape(f"{path}/") for path in (ROOT, Path.home()) if len(path.parts) > 1]
    personal = re.compile("|".join([*here, r"(?<![\w.])/(?:home|Users)/[a-z]\w*/"]))
    found = []
    for path in texts():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path}: {match.group()}" for match in personal.finditer(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f():\n    from ..hf import swap", "attnzoo.hf.swap"),
        ("from . import rope", "attnzoo.layers.rope"),
        ("import importlib\nimportlib.import_module('transformers')", "transformers"),
    ],
)
def test_the_checks_see_relative_and_lazy_imports(
    source: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "attnzoo" / "layers" / "gqa.py"
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert expected in [name for _, name in imports_of(path)]


def test_every_library_that_is_imported_is_declared() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = [lines for extra, lines in project["optional-dependencies"].items() if extra != "dev"]
    lines = [*project["dependencies"], *(line for lines in extras for line in lines)]
    declared = {re.split(r"[^\w-]", line)[0].lower() for line in lines}
    distributions = {"hydra": "hydra-core", "yaml": "pyyaml", "pytorch_lightning": "lightning"}
    distributions |= {"flash_attn": "flash-attn-4", "fa3_fwd_interface": "fa3-fwd", "lm_eval": "lm-eval"}
    ours = {"attnzoo", "recipes", "conf"}
    wrong = [
        f"{path}:{line} imports {top}, and pyproject.toml does not name it"
        for path in SOURCES
        for line, name in imports_of(path)
        if (top := name.split(".")[0]) not in sys.stdlib_module_names | ours
        and distributions.get(top, top.replace("_", "-")) not in declared
    ]
    assert not wrong, "\n".join(wrong)
