"""`attnzoo study EXPERIMENT [overrides]`: many runs of uptraining side by side, one JSON file and figures of them.

The arms stand in conf/experiment/EXPERIMENT.yaml, under `study`. Each run takes one GPU, and all GPUs are used;
without one the runs follow one another. What has ended is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from recipes.run_folder import write_whole
from recipes.study_plan import Arm, arm_folder, plan_arms, read_study


def main() -> None:
    options = _arguments(sys.argv[1:])
    folder = options.folder.expanduser().resolve()
    here = folder / options.experiment
    if not options.draw:
        arms = plan_arms(options.experiment, options.overrides, folder)
        print(_listed(arms), flush=True)
        if options.list:
            return
        here.mkdir(parents=True, exist_ok=True)
        run_all(chosen(arms, options.only), folder, here, visible_gpus())
        from recipes.study_results import collect

        study = read_study(options.experiment, options.overrides)
        record = collect(options.experiment, study, arms, folder, overrides=options.overrides)
        write_whole(here / "results.json", json.dumps(record, indent=1))
    if not (here / "results.json").is_file():
        raise ValueError(f"{here} has no results.json; without --draw the study is run")
    from recipes.study_draw import draw

    for path in draw(here / "results.json"):
        print(f"written: {path}")
    missing = [arm["name"] for arm in json.loads((here / "results.json").read_text(encoding="utf-8"))["missing"]]
    missing = [name for name in missing if _matches(name, options.only)]
    if missing:
        raise ValueError(f"{len(missing)} runs did not end, see the logs in {here}: {', '.join(missing)}")


def chosen(arms: Sequence[Arm], only: Sequence[str]) -> list[Arm]:
    """The arms whose names match a pattern, in the order of the patterns, and those that they need; else all."""
    ranks: dict[str, int] = {}
    for arm in reversed(arms):  # what an arm needs stands before it
        found = [rank for rank, pattern in enumerate(only) if fnmatch(arm.name, pattern)]
        found += [0] if not only else []
        found += [ranks[other.key] for other in arms if arm.key in other.needs and other.key in ranks]
        if found:
            ranks[arm.key] = min(found)
    return sorted((arm for arm in arms if arm.key in ranks), key=lambda arm: ranks[arm.key])


def run_all(arms: Sequence[Arm], folder: Path, here: Path, gpus: Sequence[str]) -> None:
    """Runs the arms by one worker a GPU, or by a single one; one in which a run failed is followed by another.

    Args:
        arms: of the study.
        folder: of all studies.
        here: where the plan and the workers' logs go.
        gpus: as CUDA_VISIBLE_DEVICES names them.
    """
    from recipes.study_worker import DONE, FAILURE

    if all((arm_folder(folder, arm.key) / DONE).is_file() for arm in arms):
        return
    plan = here / f"plan_{os.getpid()}.json"
    described = [dataclasses.asdict(arm) for arm in arms]
    write_whole(plan, json.dumps({"folder": str(folder), "since": time.time(), "arms": described}))
    command = [sys.executable, "-m", "recipes.study_worker", str(plan)]
    workers: dict[str, subprocess.Popen[bytes]] = {}

    def start(gpu: str) -> None:
        alone = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        with (here / f"worker_{gpu or 'cpu'}.log").open("ab") as log:
            workers[gpu] = subprocess.Popen(command, env=os.environ | alone, stdout=log, stderr=subprocess.STDOUT)

    def stop(number: int, frame: object) -> None:
        for worker in workers.values():
            worker.send_signal(number)  # each saves a checkpoint
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        for gpu in gpus or [""]:
            start(gpu)
        while workers:
            time.sleep(0.2)
            for gpu, worker in list(workers.items()):
                status = worker.poll()
                if status is None:
                    continue
                del workers[gpu]
                if status == FAILURE:
                    start(gpu)
                elif status:
                    print(f"the worker of {gpu or 'the CPU'} ended with status {status}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        for worker in workers.values():
            worker.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        plan.unlink(missing_ok=True)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch(name, pattern) for pattern in patterns)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return [one for one in named.split(",") if one.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


def _listed(arms: Sequence[Arm]) -> str:
    return "\n".join(f"{arm.key}  seed {arm.seed}  {arm.name}: {' '.join(arm.overrides) or '-'}" for arm in arms)


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="attnzoo study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", help="of conf/experiment, with a `study` in it: recovery, gqa_paper, compare ...")
    parser.add_argument("overrides", nargs="*", help="of all arms, as attnzoo uptrain takes them")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/study"), help="for all studies; runs/study by default"
    )
    parser.add_argument("--only", nargs="+", default=[], help="patterns of names of arms, as 'svd*'; in this order")
    parser.add_argument("--list", action="store_true", help="show the arms and run nothing")
    parser.add_argument("--draw", action="store_true", help="draw the figures from results.json alone")
    return parser.parse_intermixed_args(given)


if __name__ == "__main__":
    main()
