"""Does the runs of a study's plan one after the other, beside other workers: `python -m recipes.study_worker PLAN`.

A run is taken by holding its lock, which ends with the process, so that no run is lost with a worker and none is done
twice, also by workers of several machines on one file system.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from recipes.run_folder import RunFolder, write_whole
from recipes.study_plan import Arm, arm_folder

log = logging.getLogger(__name__)

DONE, FAILED = "report.json", "failed.json"
FAILURE = 3  # the exit status of a worker that a run failed in: what it held of the GPU may be broken


def work(arms: Sequence[Arm], folder: Path, since: float, run_arm: Callable[[Arm, Path], None]) -> bool:
    """Runs what no other worker runs until nothing is left to take; False at once when a run fails.

    Runs that failed after `since` are left alone, and so are those that need them.
    """
    while True:
        waiting = False
        for arm in arms:
            here = arm_folder(folder, arm.key)
            if (here / DONE).is_file() or has_failed(here, since):
                continue
            needed = [arm_folder(folder, key) for key in arm.needs]
            if any(has_failed(other, since) for other in needed):
                continue
            if not all((other / DONE).is_file() for other in needed):
                waiting = True
                continue
            here.parent.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(here.with_name(f".{here.name}.lock"), timeout=0):
                    if (here / DONE).is_file() or has_failed(here, since):
                        continue
                    if not _ran(arm, here, run_arm):
                        return False
            except Timeout:
                continue
            break  # from the first arm again: another may have become free
        else:
            if not waiting:
                return True
            time.sleep(1.0)


def has_failed(here: Path, since: float) -> bool:
    failed = here.parent / f"{here.name}.{FAILED}"
    return failed.is_file() and failed.stat().st_mtime >= since


def _ran(arm: Arm, here: Path, run_arm: Callable[[Arm, Path], None]) -> bool:
    failed = here.parent / f"{here.name}.{FAILED}"
    failed.unlink(missing_ok=True)
    started = time.time()
    print(f"{time.strftime('%H:%M:%S')} {arm.name}, seed {arm.seed}: starts in {here}", flush=True)
    try:
        run_arm(arm, here)
    except Exception:
        write_whole(failed, json.dumps({"arm": arm.name, "seed": arm.seed, "error": traceback.format_exc()}))
        traceback.print_exc()
        print(f"{time.strftime('%H:%M:%S')} {arm.name}, seed {arm.seed}: failed", flush=True)
        return False
    print(f"{time.strftime('%H:%M:%S')} {arm.name}, seed {arm.seed}: {time.time() - started:.0f} s", flush=True)
    return True


def run_uptraining(arm: Arm, here: Path) -> None:
    """One run of `attnzoo uptrain` in this process; its checkpoint goes, since its model is exported."""
    import torch

    from recipes.uptrain import uptrain

    run = RunFolder(here)
    started = time.time()
    uptrain(OmegaConf.create(dict(arm.config)), run)
    write_whole(here / "timing.json", json.dumps({"seconds": time.time() - started}))
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> int:
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    arms = [Arm(**{**arm, "needs": tuple(arm["needs"])}) for arm in plan["arms"]]
    return 0 if work(arms, Path(plan["folder"]), plan["since"], run_uptraining) else FAILURE


if __name__ == "__main__":
    sys.exit(main())
