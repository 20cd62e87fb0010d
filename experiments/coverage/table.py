"""docs/coverage.md, from the rows of measure.py: python experiments/coverage/table.py"""

import json
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from csgd.report import table

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "coverage.md"
ABOUT = """# Coverage

<!-- Made by `python experiments/coverage/table.py` from committed rows; edits here are lost. -->

What csgd cuts of networks that people use, built without weights, with every space at half of its width: the share of
the multiply-accumulates and of the parameters that goes, and the largest relative change of an output in float64, in
eval and in train mode, with all weights and statistics random. The control is what the same cut changes while members
are not equal. Seconds are those of `find_spaces` with its trial, once, on a machine that had other work. Beside it
[Torch-Pruning](https://github.com/VainF/Torch-Pruning) cuts the same network to half by magnitude; that changes what a
network computes in any case, so what is told is whether it raises, and whether the network still runs and answers in
the same shapes."""


def page() -> str:
    rows = [json.loads(line) for line in (HERE / "rows.jsonl").read_text().splitlines()]
    built = [row for row in rows if "ours" in row]
    return (
        "\n\n".join([ABOUT, _summary(built), _networks(built), *_failures(rows), _reasons(built), _made(rows)]) + "\n"
    )


def _summary(rows: list[dict[str, Any]]) -> str:
    exact = [row["ours"] for row in rows if row["ours"]["outcome"] == "exact"]
    changes = [change for ours in exact for change in ours["changes"].values() if change is not None]
    theirs = Counter(row["torch_pruning"]["outcome"] for row in rows)
    others = ", ".join(f"{count} {outcome}" for outcome, count in theirs.most_common() if outcome != "runs")
    many = sum(ours["macs"] >= 0.6 for ours in exact)
    seconds = [row["ours"]["seconds"] for row in rows if "seconds" in row["ours"]]
    return (
        f"Of {len(rows)} networks {len(exact)} are cut exactly, the largest change being {max(changes):.1e}; of {many} "
        f"at least 60 % of the multiply-accumulates go. Analysis takes {median(seconds):.1f} s (median; the longest "
        f"{max(seconds):.0f} s). Of Torch-Pruning's cuts {theirs['runs']} run afterwards ({others})."
    )


def _networks(rows: list[dict[str, Any]]) -> str:
    header = (
        "network",
        "parameters",
        "s",
        "MACs cut",
        "parameters cut",
        "change",
        "control",
        "Torch-Pruning",
        "MACs",
        "s ",
    )
    return table(header, [_row(row) for row in sorted(rows, key=lambda row: (row["package"], row["name"].lower()))])


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    ours, theirs = row["ours"], row["torch_pruning"]
    changes = [change for change in ours.get("changes", {}).values() if change is not None]
    cut = [f"{ours[key]:.0%}" if key in ours else "–" for key in ("macs", "params")]
    proof = (f"{max(changes):.0e}", f"{ours['control']:.0e}") if changes else (ours["outcome"], "–")
    took = [f"{tool['seconds']:.1f}" if "seconds" in tool else "–" for tool in (ours, theirs)]
    their_cut = f"{theirs['macs']:.0%}" if "macs" in theirs else "–"
    name = f"{row['name']} ({row['package'].split('.')[0].replace('_', '-')})"
    return (name, f"{row['params'] / 1e6:.1f} M", took[0], *cut, *proof, theirs["outcome"], their_cut, took[1])


def _failures(rows: list[dict[str, Any]]) -> list[str]:
    """What is not cut, or not exactly, each in a line; what could not be tried."""
    lines = [f"- {row['name']} was not tried: {row['outcome']}{_why(row)}" for row in rows if "ours" not in row]
    for row in rows:
        ours = row.get("ours", {"outcome": "exact"})
        if ours["outcome"] != "exact":
            lines.append(f"- {row['name']}: {ours['outcome']}{_why(ours)}")
    return ["## What is not cut\n\n" + "\n".join(lines)] if lines else []


def _why(row: dict[str, Any]) -> str:
    return f", {' '.join(row['why'].split())[:120]}" if "why" in row else ""


def _reasons(rows: list[dict[str, Any]]) -> str:
    """The reasons that pin most channels, beside outputs, which have to stay."""
    channels, networks = Counter(), Counter()
    for row in rows:
        for reason, count in row["ours"].get("pinned", {}).items():
            if reason != "network output":
                channels[_kind(reason)] += count
                networks[_kind(reason)] += 1
    body = [(reason, f"{count:,}", str(networks[reason])) for reason, count in channels.most_common(10)]
    return "## What stays, and why\n\n" + table(("reason", "channels", "networks"), body)


def _kind(reason: str) -> str:
    """A reason without what is of one network alone."""
    return " ".join(word for word in reason.split(": ")[-1].split() if not any(sign in word for sign in "._0123456789"))


def _made(rows: list[dict[str, Any]]) -> str:
    versions = {f"{name} {value}" for row in rows for name, value in row["versions"].items()}
    commits, threads = ({str(row[key]) for row in rows} for key in ("commit", "threads"))
    made_with = ", ".join([*(f"`{one}`" for one in sorted(commits)), *sorted(versions)])
    return (
        f"Commit {made_with}; {'/'.join(threads)} thread, n = 1: `python experiments/coverage/measure.py`. "
        "Reasons are the five of each network that pin most channels."
    )


if __name__ == "__main__":
    PAGE.write_text(page())
