"""What the C-SGD phase costs with the cut at the collapse, beside the cut at the end (as published).

    python experiments/bench_cost.py --repeats 3 centri_strength=auto collapse_by=0.25

Each repeat has its own seed, and so its own base network; within one, the two kinds of run have the same seed,
schedule and base, one after the other, and the next repeat begins with the other kind.  Prints a table and writes
bench_cost.json into the output folder.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from csgd.report import table  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_cost"))
    parser.add_argument("overrides", nargs="*", help="what run.py takes")
    arguments = parser.parse_args()
    runs = {"end": [], "collapse": []}
    for repeat in range(arguments.repeats):
        for trim_at in list(runs)[:: -1 if repeat % 2 else 1]:
            folder = arguments.output / f"{trim_at}-{repeat}"
            command = [
                sys.executable,
                str(ROOT / "run.py"),
                *arguments.overrides,
                f"seed={repeat}",
                f"trim_at={trim_at}",
                "wandb=disabled",
            ]
            print(" ".join(command[1:]), flush=True)
            done = subprocess.run([*command, f"hydra.run.dir={folder}"], stdout=subprocess.DEVNULL, check=False)
            if done.returncode > 1:
                sys.exit(done.returncode)
            runs[trim_at].append(json.loads((folder / "summary.json").read_text()))
    ratios = [
        end["seconds"]["csgd"] / collapse["seconds"]["csgd"]
        for end, collapse in zip(runs["end"], runs["collapse"], strict=True)
    ]
    rows = []
    for trim_at, summaries in runs.items():
        seconds = [summary["seconds"]["csgd"] for summary in summaries]
        cut_at = [summary["cut"]["fraction"] for summary in summaries]
        accuracies = [summary["verdict"]["accuracy"] for summary in summaries]
        rows.append(
            (
                trim_at,
                f"{statistics.median(seconds):.1f}",
                f"{min(seconds):.1f} … {max(seconds):.1f}",
                f"{max(cut_at):.0%}",
                f"{statistics.mean(accuracies):.4f}",
                f"{min(accuracies):.4f} … {max(accuracies):.4f}",
                "yes" if all(summary["verdict"]["lossless"] for summary in summaries) else "no",
            )
        )
    print(table(("trim_at", "C-SGD, seconds", "spread", "cut at", "accuracy", "spread", "lossless"), rows))
    last = runs["collapse"][-1]
    print(
        f"\n{statistics.median(ratios):.2f} times faster ({min(ratios):.2f} … {max(ratios):.2f}, n = {len(ratios)}), "
        f"{last['device']}, {os.cpu_count()} cores, torch {last['versions']['torch']}"
    )
    written = {"ratios": ratios, "runs": runs, "overrides": arguments.overrides}
    (arguments.output / "bench_cost.json").write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
