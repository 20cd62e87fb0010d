"""Tables and pictures of a run."""

import json
from collections.abc import Sequence
from pathlib import Path


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose columns line up; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [all(row[i][:1].isdigit() or row[i][:1] in "-−" for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([line(header), rule, *map(line, cells)])


def verdict_table(summary: dict) -> str:
    """Before and after, as a table."""
    base, verdict, cost = summary["base"], summary["verdict"], summary["cost"]
    fraction, seconds = summary["collapse"]["fraction"], summary["seconds"]

    def cut(key: str) -> tuple[str, str, str]:
        before, after = cost[f"{key}_before"], cost[f"{key}_after"]
        name = {"macs": "multiply-accumulates", "params": "parameters"}[key]
        return name, f"{after:,}", f"{1 - after / before:.1%} less than {before:,}"

    rows = [
        ("test accuracy, base network", f"{base['accuracy']:.4f}", ""),
        ("… before the cut", f"{verdict['accuracy_before_trim']:.4f}", f"step {summary['collapse']['step']} of C-SGD"),
        ("… after the cut", f"{verdict['accuracy_after_trim']:.4f}", "the same network, narrow"),
        ("… at the end", f"{verdict['accuracy']:.4f}", f"{1 - fraction:.0%} of the steps were narrow"),
        (
            "largest logit change",
            f"{verdict['max_logit_change']:.1e}",
            f"{verdict['relative_logit_change']:.1e} of the largest",
        ),
        ("deviation", f"{verdict['deviation']:.1e}", f"{verdict['relative_deviation']:.1e} of the weights"),
        cut("macs"),
        cut("params"),
        ("seconds", f"{seconds['total']:.0f}", _seconds(seconds)),
    ]
    return table(("", "value", ""), rows)


def _seconds(seconds: dict) -> str:
    stages = ("base", "cluster", "csgd_wide", "trim", "csgd_trimmed")
    return ", ".join(f"{stage.replace('_', ' ')} {seconds[stage]:.0f}" for stage in stages)


def draw_curves(output_dir: Path) -> Path:
    """Draws a finished run from its files: accuracy over all of it, and the deviation of the C-SGD phase beside its
    forecast, with each cut marked; report/curves.png."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    stages = json.loads((output_dir / "summary.json").read_text())["stages"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for phase, color, name in (("base", "tab:gray", "base"), ("csgd", "tab:blue", "C-SGD")):
        points = [(row["epoch"], row[f"{phase}/test_accuracy"]) for row in rows if row["phase"] == phase]
        if points:
            left.plot(*zip(*points, strict=True), "o-", color=color, label=name)
    first, lowest = 0, 1.0
    for number, stage in enumerate(stages, 1):
        here = [row for row in rows if row.get("stage") == number]
        for (group, curve), color in zip(
            stage["forecast"]["curves"].items(), ("tab:blue", "tab:orange", "tab:green"), strict=False
        ):
            steps, expected = zip(*curve, strict=True)
            measured = [(first + row["step"], row[f"deviation/{group}"]) for row in here if f"deviation/{group}" in row]
            names = (f"{group}, forecast", f"{group}, measured") if number == 1 else (None, None)
            right.plot([first + step for step in steps], expected, color=color, alpha=0.6, label=names[0])
            right.plot(*zip(*measured, strict=True), "o", color=color, label=names[1])
            lowest = min(lowest, *(deviation for _, deviation in measured if deviation > 0))
        cut_epoch = next(row["epoch"] for row in here if row["step"] == stage["collapse"]["step"])
        for axes, position in ((left, cut_epoch), (right, first + stage["collapse"]["step"])):
            axes.axvline(position, color="tab:red", linestyle="--", linewidth=1, label="cut" if number == 1 else None)
        first += stage["forecast"]["steps"]
    left.set(xlabel="epoch", ylabel="test accuracy", title="Accuracy")
    right.set(xlabel="C-SGD step", ylabel="‖W − ΓW‖²", title="Deviation", yscale="log")
    right.set_ylim(bottom=lowest / 10)
    for axes in (left, right):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=3, frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path = output_dir / "report" / "curves.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
