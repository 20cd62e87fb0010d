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

    def cut(key: str) -> str:
        return f"{1 - cost[f'{key}_after'] / cost[f'{key}_before']:.1%} less"

    rows = [
        ("test accuracy, base network", f"{base['accuracy']:.4f}", ""),
        (
            "test accuracy, before the cut",
            f"{verdict['accuracy_before_trim']:.4f}",
            f"trained by C-SGD to step {summary['collapse']['step']}",
        ),
        ("test accuracy, after the cut", f"{verdict['accuracy_after_trim']:.4f}", "the same network, narrow"),
        (
            "largest logit change",
            f"{verdict['max_logit_change']:.1e}",
            f"relative {verdict['relative_logit_change']:.1e}",
        ),
        ("deviation", f"{verdict['deviation']:.1e}", f"relative {verdict['relative_deviation']:.1e}"),
        ("multiply-accumulates", f"{cost['macs_after']:,}", f"{cut('macs')} than {cost['macs_before']:,}"),
        ("parameters", f"{cost['params_after']:,}", f"{cut('params')} than {cost['params_before']:,}"),
        ("seconds", f"{summary['seconds']['total']:.0f}", _seconds(summary["seconds"])),
    ]
    return table(("", "value", ""), rows)


def _remark(summary: dict) -> str:
    fraction = summary["collapse"]["fraction"]
    return (
        "no step after the cut" if fraction == 1 else f"the same run, the last {1 - fraction:.0%} of its steps narrow"
    )


def _seconds(seconds: dict) -> str:
    return ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items() if stage != "total")


def draw_curves(output_dir: Path, forecast: dict[str, list[tuple[int, float]]], cut_step: int) -> Path:
    """Draws metrics.jsonl: accuracy over the whole run, and the deviation beside its forecast, with the cut marked.

    `forecast` holds, per group, (step, deviation) pairs of the C-SGD phase; `cut_step` is a step of that phase.
    """
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for phase, color in (("base", "tab:gray"), ("csgd", "tab:blue")):
        points = [(row["epoch"], row[f"{phase}/test_accuracy"]) for row in rows if f"{phase}/test_accuracy" in row]
        if points:
            left.plot(*zip(*points, strict=True), "o-", color=color, label={"base": "base", "csgd": "C-SGD"}[phase])
    left.set(xlabel="epoch", ylabel="test accuracy", title="Accuracy")
    for (group, expected), color in zip(forecast.items(), ("tab:blue", "tab:orange", "tab:green"), strict=False):
        measured = [(row["step"], row[f"deviation/{group}"]) for row in rows if f"deviation/{group}" in row]
        right.plot(*zip(*expected, strict=True), "-", color=color, alpha=0.6, label=f"{group}, forecast")
        right.plot(*zip(*measured, strict=True), "o", color=color, label=f"{group}, measured")
    right.set(xlabel="C-SGD step", ylabel="‖W − ΓW‖²", title="Deviation", yscale="log")
    if forecast:
        lowest = min(
            (row[f"deviation/{g}"] for row in rows for g in forecast if row.get(f"deviation/{g}")), default=1e-12
        )
        right.set_ylim(bottom=lowest / 10)
    cut_epoch = next(row["epoch"] for row in rows if row["phase"] == "csgd" and row["step"] == cut_step)
    for axes, position in ((left, cut_epoch), (right, cut_step)):
        axes.axvline(position, color="tab:red", linestyle="--", linewidth=1, label="cut")
        axes.legend(loc="best", framealpha=0.9, edgecolor="none")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path = output_dir / "report" / "curves.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
