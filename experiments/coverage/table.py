"""docs/coverage.md, from the rows of measure.py: python experiments/coverage/table.py"""

import json
import re
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from csgd.report import table

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "coverage.md"
ROUNDED = 1e-11  # a larger change is that of a network whose own rounding changes as much
OTHERS = {"torch_pruning": "Torch-Pruning", "torch_kirigami": "torch-kirigami"}
ABOUT = """# Coverage

<!-- Made by `python experiments/coverage/table.py` from committed rows; edits here are lost. -->

What csgd cuts of networks that people use, built without weights, with every space at half of its width: the share of
the multiply-accumulates and of the parameters that goes, and the largest relative change of an output in float64, in
eval and in train mode, with all weights and statistics random. The control is what the same cut changes while members
are not equal. Seconds are those of one thread in `find_spaces` with its trial, of CPU time, since the machine had other
work.

Beside it two other tools cut the same network to half, as their READMEs do, without code for a network:
[Torch-Pruning](https://github.com/VainF/Torch-Pruning) by magnitude, with the layers that end in outputs left out, and
[torch-kirigami](https://github.com/ZaberKo/torch-kirigami) every second channel of each axis that it lists and whose
cut it can resolve. Both change what a network computes in any case, so what is told is whether they raise, and whether
the network still runs and answers in the same shapes; then the share of the multiply-accumulates that goes, counted
alike, and the seconds."""
KINDS = (  # of reasons: words of theirs, what they have in common, what would free it
    (("typed in",), "a number of channels that is typed in", "the width of the tensor, or an attribute, in its place"),
    (("no rule for",), "an operator without a rule", "`csgd.rule`"),
    (("does not reach",), "a layer that the example does not reach", "`examples=` or `unused=`"),
    (("rotary",), "queries and keys that are turned or normalised", "nothing; whole heads are free"),
    (
        ("as wide as", "cut with it", "cut together"),
        "an attention that is as wide as its stream",
        "nothing; the stream is cut with it",
    ),
    (("weights that are computed",), "a sum over channels with computed weights", "whole heads, where it has them"),
    (("tied together",), "channels that are all tied together", "nothing: no two of them are apart"),
    (("several dims",), "channels that lie along several dims", "a rule that follows them"),
    (
        ("some must stay", "must stay", "one size"),
        "a norm or a mean over channels of which some stay",
        "what frees those",
    ),
    (("picks channels",), "channels that are picked", "a rule that follows the pick"),
    (("trial trim raises",), "code that raises once it is narrow", "sizes read from tensors, not kept"),
    (("trial",), "a cut that its trial shows to be inexact, or not at all", "a rule that sees what mixes them"),
    (
        ("meets", "operand"),
        "values of the code that meet the channels",
        "a parameter or a buffer of one value per channel",
    ),
    (("parameter",), "a parameter that no layer holds, or a weight that is computed", "a layer that holds it"),
    (("not called", "plain"), "a weight that is not used as a layer's", "calling its layer"),
    (("no layer is seen",), "channels that no layer is seen to read", "a rule for what reads them"),
    (("random",), "random numbers in eval mode", "a network that is deterministic in eval mode"),
)


def page() -> str:
    rows = [json.loads(line) for line in (HERE / "rows.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: (row["package"], row["name"].lower()))
    built = [row for row in rows if "ours" in row]
    parts = [ABOUT, _summary(built), _networks(built), *_failures(rows), _reasons(built), _raised(built), _made(rows)]
    return "\n\n".join(parts) + "\n"


def _summary(rows: list[dict[str, Any]]) -> str:
    exact = [row["ours"] for row in rows if row["ours"]["outcome"] == "exact"]
    changes = {row["name"]: _change(row["ours"]) for row in rows if row["ours"]["outcome"] == "exact"}
    grown = sorted((name for name, change in changes.items() if change > ROUNDED), key=changes.get)
    told = "".join(f", but for {name}, which makes rounding grow: {changes[name]:.1e}" for name in grown)
    small = max(change for change in changes.values() if change <= ROUNDED)
    many = sum(ours["macs"] >= 0.6 for ours in exact)
    seconds = [row["ours"]["cpu_seconds"] for row in rows if "cpu_seconds" in row["ours"]]
    lines = [
        f"Of {len(rows)} networks {len(exact)} are cut exactly, the largest change being {small:.1e}{told}. Of {many} "
        f"({many / len(rows):.0%}) at least 60 % of the multiply-accumulates go. Analysis takes {median(seconds):.1f} s"
        f" (median; the longest {max(seconds):.0f} s; {sum(s > 10 for s in seconds)} more than 10 s)."
    ]
    outcomes = ("runs", "raises", "breaks", "other shapes", "over time")
    counts = {"csgd": Counter(_outcome(row["ours"]) for row in rows)}
    counts |= {name: Counter(_outcome(row[tool]) for row in rows) for tool, name in OTHERS.items()}
    counts["csgd"]["runs"] = counts["csgd"].pop("exact")
    more = sorted({outcome for of_tool in counts.values() for outcome in of_tool} - {*outcomes})
    cut = {"csgd": [ours["macs"] for ours in exact]}
    cut |= {name: [row[tool]["macs"] for row in rows if _outcome(row[tool]) == "runs"] for tool, name in OTHERS.items()}
    body = [
        (
            name,
            *(str(of_tool[outcome]) for outcome in (*outcomes, *more)),
            f"{median(cut[name]):.0%}" if cut[name] else "–",
        )
        for name, of_tool in counts.items()
    ]
    return "\n\n".join([*lines, table(("", *outcomes, *more, "MACs cut where it runs (median)"), body)])


def _change(ours: dict[str, Any]) -> float:
    return max(change for change in ours["changes"].values() if change is not None)


def _outcome(row: dict[str, Any]) -> str:
    if row["outcome"] == "runs" and row["macs"] < 0.005:
        return "cuts nothing"
    return "over time" if row["outcome"].startswith("no answer") else row["outcome"]


def _networks(rows: list[dict[str, Any]]) -> str:
    header = ("network", "parameters", "s", "MACs cut", "parameters cut", "change", "control", *OTHERS.values())
    return table(header, [_row(row) for row in rows])


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    ours = row["ours"]
    changes = [change for change in ours.get("changes", {}).values() if change is not None]
    cut = [f"{ours[key]:.0%}" if key in ours else "–" for key in ("macs", "params")]
    proof = (f"{max(changes):.0e}", f"{ours['control']:.0e}") if changes else (_outcome(ours), "–")
    took = f"{ours['cpu_seconds']:.1f}" if "cpu_seconds" in ours else "–"
    name = f"{row['name']} ({row['package'].split('.')[0].replace('_', '-')})"
    return (name, f"{row['params'] / 1e6:.1f} M", took, *cut, *proof, *(_of_other(row[tool]) for tool in OTHERS))


def _of_other(row: dict[str, Any]) -> str:
    if "macs" not in row or _outcome(row) == "cuts nothing":
        return _outcome(row)
    shapes = "" if row["outcome"] == "runs" else f"{row['outcome']}, "
    return f"{shapes}{row['macs']:.0%} in {row['cpu_seconds']:.1f} s"


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
    """The ten kinds of reasons that keep most, beside outputs, which have to stay."""
    work, networks, most, cures = Counter(), Counter(), {}, {}
    for row in rows:
        of_row = Counter()
        for reason, keeps in row["ours"].get("pinned", {}).items():
            if reason != "network output":
                kind, cures[kind] = _kind(reason)
                of_row[kind] += keeps["macs"]
        for kind, share in of_row.items():
            work[kind] += share
            networks[kind] += share >= 0.01
            most[kind] = max(most.get(kind, (0.0, "")), (share, row["name"]))
    body = [
        (kind, f"{share / len(rows):.1%}", str(networks[kind]), f"{most[kind][0]:.0%} of {most[kind][1]}", cures[kind])
        for kind, share in work.most_common(10)
    ]
    return (
        "## What stays, and why\n\nThe ten most expensive kinds of reasons: what half of the widths would leave out "
        "besides, were it not for them, as a share of the network's multiply-accumulates (the mean over all networks, "
        "and the network where it is largest), and in how many networks it is 1 % or more.\n\n"
        + table(("what stays is pinned by", "MACs", "networks", "most", "what would free it"), body)
    )


def _kind(reason: str) -> tuple[str, str]:
    """What a reason has in common with others, and what would free it."""
    for words, kind, cure in KINDS:
        if any(word in reason for word in words):
            return kind, cure
    of_all = (word for word in reason.split(": ")[-1].split() if not any(sign in word for sign in "._0123456789"))
    return " ".join(of_all), "–"


def _raised(rows: list[dict[str, Any]]) -> str:
    """Of each other tool what it says most often where it raises, or what the network says that it broke."""
    lines = []
    for tool, name in OTHERS.items():
        whys = Counter(_said(row[tool]["why"]) for row in rows if "why" in row[tool])
        lines += [f"- {name}, {count} ×: {why}" for why, count in whys.most_common(5)]
    return "## What the others say where they fail\n\n" + "\n".join(lines)


def _said(why: str) -> str:
    """The first words of an error without what is of one network alone."""
    return re.sub(r"(\S*[\d_./'\"\[\]]\S*\s*)+", "… ", why)[:90].replace("|", "/").strip()


def _made(rows: list[dict[str, Any]]) -> str:
    versions = {f"{name} {value}" for row in rows for name, value in row["versions"].items()}
    commits, threads = ({str(row[key]) for row in rows} for key in ("commit", "threads"))
    made_with = ", ".join([*(f"`{one}`" for one in sorted(commits)), *sorted(versions)])
    return (
        f"Commit {made_with}; {'/'.join(threads)} thread, n = 1: `python experiments/coverage/measure.py`. "
        "Reasons are the eight of each network that keep most."
    )


if __name__ == "__main__":
    PAGE.write_text(page())
