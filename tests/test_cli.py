"""The command line: what it says, how it ends, and what a recipe sees of the process."""

from __future__ import annotations

import importlib.machinery
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from attnzoo import __version__, cli

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Puts a function in the place of recipes.uptrain:main."""

    def put(main: Callable[[], object]) -> None:
        module = types.ModuleType("recipes.uptrain")
        module.__spec__ = importlib.machinery.ModuleSpec("recipes.uptrain", None, origin="recipes/uptrain.py")
        module.main = main  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "recipes.uptrain", module)

    return put


def raising(error: Exception, module: str) -> Callable[[], object]:
    """A function that raises, as if its code stood in that module."""
    names = {"__name__": module, "error": error}
    exec("def main():\n    raise error", names)
    return names["main"]  # type: ignore[return-value]


def test_help_and_version_answer_without_importing_torch() -> None:
    code = (
        "import sys; from attnzoo.cli import main; assert main(['--help']) == 0 and main(['--version']) == 0;"
        "assert not {'torch', 'hydra', 'transformers', 'lightning'} & set(sys.modules), 'imported too much'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name, summary in cli.COMMANDS.items():
        assert f"  {name} " in done.stdout and summary in done.stdout
    assert f"attnzoo {__version__}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["uptran"], "Did you mean 'uptrain'?"), (["xyz"], "The commands are convert,"), ([], "usage: attnzoo <command>")],
)
def test_what_is_no_command_exits_with_2_and_says_what_is(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_recipe_sees_the_process_that_python_dash_m_would_have_made(recipe: Callable[..., None]) -> None:
    seen: dict[str, object] = {}

    def main() -> None:
        seen.update(argv=sys.argv, spec=sys.modules["__main__"].__spec__)

    before = sys.argv, sys.modules["__main__"].__spec__, dict(os.environ)
    recipe(main)
    assert cli.main(["uptrain", "seed=3", "--multirun"]) == 0
    assert seen["argv"] == ["recipes/uptrain.py", "seed=3", "--multirun"]
    assert seen["spec"].name == "recipes.uptrain"  # type: ignore[attr-defined]
    assert (sys.argv, sys.modules["__main__"].__spec__, dict(os.environ)) == before


@pytest.mark.parametrize(
    "main",
    [
        raising(ValueError("num_kv_heads must divide 9, got 2"), "attnzoo.conversion.merge"),
        raising(FileExistsError("num_kv_heads must divide 9, got 2"), "shutil"),
    ],
    ids=["our ValueError", "the system's error"],
)
def test_an_error_of_the_user_is_one_line_and_exit_1(
    main: Callable[[], object], recipe: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe(main)
    assert cli.main(["uptrain"]) == 1
    first, hint = capsys.readouterr().err.splitlines()
    assert first == "attnzoo uptrain: num_kv_heads must divide 9, got 2"
    assert "HYDRA_FULL_ERROR=1" in hint


def test_hydra_full_error_shows_the_traceback(recipe: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    recipe(raising(ValueError("bad"), "attnzoo.specs"))
    with pytest.raises(ValueError, match="bad"):
        cli.main(["uptrain"])
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


@pytest.mark.parametrize("error", [ValueError("dim 3"), RuntimeError("out of memory")])
def test_a_bug_keeps_its_traceback(error: Exception, recipe: Callable[..., None]) -> None:
    recipe(raising(error, "torch.nn.modules.linear"))
    with pytest.raises(type(error), match=str(error)):
        cli.main(["uptrain"])


def test_an_interrupt_ends_with_130(recipe: Callable[..., None]) -> None:
    recipe(raising(KeyboardInterrupt(), "lightning.fabric"))  # type: ignore[arg-type]
    assert cli.main(["uptrain"]) == 130


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("heads=2", "attnzoo uptrain: heads must divide 9, got 2"),
        ("haeds=2", "attnzoo uptrain: Could not override 'haeds'"),
        ("heads=[", "attnzoo uptrain: "),
        ("model=null", "attnzoo uptrain: Config group override must be a string or a list"),
    ],
    ids=["a value that the recipe refuses", "a key that does not exist", "a syntax error", "no choice of a group"],
)
def test_errors_under_hydra_show_no_traceback(
    override: str,
    said: str,
    recipe: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    hydra = pytest.importorskip("hydra")
    (tmp_path / "job.yaml").write_text("defaults: [{model: small}, _self_]\nheads: 3\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "small.yaml").write_text("dim: 8\n")
    monkeypatch.chdir(tmp_path)

    def job(config: dict[str, int]) -> None:
        raising(ValueError(f"heads must divide 9, got {config['heads']}"), "attnzoo.specs")()

    recipe(hydra.main(config_path=str(tmp_path), config_name="job", version_base="1.3")(job))
    assert cli.main(["uptrain", override]) == 1
    err = capfd.readouterr().err
    assert said in err and "Traceback" not in err
