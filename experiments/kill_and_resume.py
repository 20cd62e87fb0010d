"""Does a run that is killed at any moment end with the weights of one that was left alone?

    python experiments/kill_and_resume.py --kills 20

Runs once undisturbed, then again and again, each time killed with SIGKILL at a random moment and resumed with
resume=auto; exits with 1 unless every pruned.safetensors has the same bytes.  Two stages, checkpoints every 7 steps.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
OVERRIDES = [
    "experiment=smoke", "dataset.image_size=16", "deps.stages=[0.75,0.5]", "schedule.batch_size=16",
    "schedule.csgd={epochs: 3, lr: 0.05, max_steps: 50}", "checkpoint_every=7", "resume=auto", "wandb=disabled",
    "hydra.run.dir=out",
]  # fmt: skip


def start(folder: Path, overrides: list[str]) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / "run.py"), *OVERRIDES, *overrides]
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)


def finish(process: subprocess.Popen, folder: Path) -> bytes:
    if process.wait() > 1:
        sys.exit((folder / "log.txt").read_text()[-3000:])
    return (folder / "out" / "pruned.safetensors").read_bytes()


def reached(folder: Path) -> str:
    """What the last row of metrics says of the moment of the kill."""
    path = folder / "out" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    row = json.loads(lines[-1]) if lines else {}
    return f"{row.get('phase', 'before the first row')} {row.get('stage', '')} step {row.get('step', 0)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="what run.py takes")
    arguments = parser.parse_args()
    rng, same = random.Random(arguments.seed), 0
    with TemporaryDirectory() as scratch:
        folder, began = Path(scratch) / "whole", time.perf_counter()
        expected = finish(start(folder, arguments.overrides), folder)
        seconds = time.perf_counter() - began
        for kill in range(1, arguments.kills + 1):
            folder, moment = Path(scratch) / f"killed-{kill}", rng.uniform(0.1, 0.98) * seconds
            process = start(folder, arguments.overrides)
            time.sleep(moment)
            process.kill()
            process.wait()
            at = reached(folder)
            equal = finish(start(folder, arguments.overrides), folder) == expected
            same += equal
            print(f"kill {kill}: after {moment:.1f} s ({at}): {'same bytes' if equal else 'DIFFERENT'}", flush=True)
    print(f"{same} of {arguments.kills} runs that were killed ended with the same bytes")
    sys.exit(same != arguments.kills)


if __name__ == "__main__":
    main()
