"""The main job with five seeds, in three ways: the default pull, the same beside SGD, and the pull as published.

    OMP_NUM_THREADS=1 python experiments/main_job.py          adds the runs that main_job.jsonl lacks, one row a run

A row is told by its own run of run.py (offline, one thread).  The three runs of a seed start from one base network.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
ROWS = Path(__file__).with_suffix(".jsonl")
OVERRIDES, SEEDS = ("", "schedule.csgd.optimizer=sgd", "centri_strength=auto"), range(5)


def main() -> None:
    rows = map(json.loads, ROWS.read_text().splitlines() if ROWS.exists() else [])
    done = {(row["overrides"], row["seed"]) for row in rows}
    with TemporaryDirectory() as scratch:
        for seed in SEEDS:
            for overrides in OVERRIDES:
                if (overrides, seed) not in done:
                    row = measured_row(overrides, seed, Path(scratch))
                    print(row, flush=True)
                    with ROWS.open("a") as file:
                        file.write(json.dumps(row) + "\n")


def measured_row(overrides: str, seed: int, scratch: Path) -> dict:
    out = scratch / f"{seed}-{overrides}"
    command = [sys.executable, str(ROOT / "run.py"), "model=vgg16", "deps='5_8'", f"seed={seed}", *overrides.split()]
    settings = ["threads=1", "wandb=disabled", "quiet=true", f"base.cache={scratch / 'base'}", f"hydra.run.dir='{out}'"]
    subprocess.run([*command, *settings], cwd=ROOT, check=True)
    told = json.loads((out / "summary.json").read_text())
    verdict, schedule, steps = told["verdict"], told["config"]["schedule"], told["stages"][-1]["forecast"]["steps"]
    return {
        "overrides": overrides,
        "seed": seed,
        "base": told["base"]["accuracy"],
        "before_cut": verdict["accuracy_before_trim"],
        "after_cut": verdict["accuracy_after_trim"],
        "end": verdict["accuracy"],
        "relative_logit_change": verdict["relative_logit_change"],
        "relative_deviation": verdict["relative_deviation"],
        "lossless": verdict["lossless"],
        "cut_step": told["cut"]["step"],
        "steps": steps,
        "base_steps": steps * schedule["base"]["epochs"] // schedule["csgd"]["epochs"],
        "commit": told["commit"].removesuffix("-dirty"),  # the rows that were written so far
        "torch": told["versions"]["torch"],
        "threads": 1,
    }


if __name__ == "__main__":
    main()
