"""The `attnzoo` command: `attnzoo <command> [overrides]` runs the recipe of that name; Hydra reads the overrides."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from attnzoo import __version__

COMMANDS = {
    "convert": "turn a checkpoint into one with another attention mechanism, shard by shard",
    "swap": "put another attention into a model's layers and save it, code included",
    "uptrain": "convert a model, win the lost quality back by training, report what was won",
    "study": "many runs of uptraining side by side: the curves and figures of conf/experiment's studies",
    "evaluate": "perplexity, KV-cache size and speed of one model or several, side by side",
    "bench": "time attention beside every installed kernel on this GPU, correctness checked in the same run",
    "plan": "parameters, FLOPs, memory and decoding speed of each mechanism, from a config.json alone",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0 done, 1 failed, 2 not understood, 130 interrupted.

    Args:
        argv: the arguments after `attnzoo`; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else None
    if command in ("-h", "--help"):
        print(_usage())
        return 0
    if command == "--version":
        print(f"attnzoo {__version__}")
        return 0
    if command is None:
        print(_usage(), file=sys.stderr)
        return 2
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"The commands are {', '.join(COMMANDS)}."
        print(f"attnzoo: there is no command '{command}'. {hint}", file=sys.stderr)
        return 2
    if command == "bench":  # of the package itself: no recipe, no Hydra
        from attnzoo import bench

        return bench.main(arguments[1:])
    return _run(command, _spelled_out(arguments[1:]))


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return (
        f"usage: attnzoo <command> [key=value ...]\n\n{lines}\n\n"
        "attnzoo <command> --help      shows what the command can be told\n"
        "attnzoo <command> --cfg job   shows its whole configuration\n"
        "attnzoo --version             shows the version"
    )


def _spelled_out(overrides: list[str]) -> list[str]:
    """`--compare a,b` as Hydra wants it: `compare=[a,b]`."""
    if "--compare" not in overrides[:-1]:
        return overrides
    place = overrides.index("--compare")
    return [*overrides[:place], f"compare=[{overrides[place + 1]}]", *overrides[place + 2 :]]


def _run(command: str, overrides: list[str]) -> int:
    with_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        with _process_of(f"recipes.{command}", overrides):
            recipe: Callable[[], object] = importlib.import_module(f"recipes.{command}").main
            recipe()
    except KeyboardInterrupt:
        print(f"attnzoo {command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if with_traceback or not _is_of_the_user(error):
            raise
        print(f"attnzoo {command}: {_message(error)}", file=sys.stderr)
        print("(HYDRA_FULL_ERROR=1 in the environment shows where this was raised)", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _process_of(module: str, overrides: list[str]) -> Iterator[None]:
    """While it lasts the process looks as if `python -m module overrides` had started it.

    Hydra reads sys.argv. Whoever starts this process again (Lightning for each GPU, multiprocessing's spawn) does it
    by __main__.__spec__. And Hydra hands exceptions on only under HYDRA_FULL_ERROR: else it prints a traceback itself.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{module} is not installed beside attnzoo")
    entry = sys.modules["__main__"]
    before = sys.argv, entry.__spec__, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, entry.__spec__ = [spec.origin, *overrides], spec
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv, entry.__spec__ = before[0], before[1]
        if before[2] is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before[2]


def _is_of_the_user(error: Exception) -> bool:
    """Whether the message tells the user all: Hydra's complaints, the system's, and ValueErrors of Hydra's and ours."""
    if isinstance(error, OSError) or _is_hydras(error):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return isinstance(error, ValueError) and raised_in.partition(".")[0] in ("attnzoo", "recipes", "hydra")


def _is_hydras(error: BaseException) -> bool:
    return any(kind.__module__.partition(".")[0] in ("hydra", "omegaconf") for kind in type(error).__mro__)


def _message(error: Exception) -> str:
    cause = error.__cause__
    return f"{error}\n{cause}" if cause is not None and _is_hydras(cause) else str(error)


if __name__ == "__main__":
    sys.exit(main())
