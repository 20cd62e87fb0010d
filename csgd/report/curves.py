"""What a run measured at its steps, on one axis: report/curves.png."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from csgd.report.paper import BLUE, GRAY, PALE, RED, figure_of, save, summary_of
from csgd.report.tables import milliseconds, task_of, tested_on

GROUPS = {"kernels": BLUE, "vectors": "tab:orange", "filters": BLUE}
FLOAT32 = 2.0**-24  # the largest relative error of rounding to float32


def draw_curves(output_dir: Path) -> Path:
    """Score, loss, what is left of the deviation beside its forecast if there was a pull, and what a step costs, over
    the steps of the run; each cut marked.  report/curves.png"""
    summary, rows = summary_of(output_dir), rows_of(output_dir)
    task, base_steps, judged = task_of(summary), rows.base_steps, tested_on(summary)
    figure = figure_of(10, 7.8)
    (score, loss), (deviation, cost) = grid = figure.subplots(2, 2, sharex=True)
    for axes in grid.flat:
        for number, step in enumerate(rows.cuts):
            axes.axvline(step, color=RED, linestyle="--", linewidth=1, label="cut" if number == 0 else None)
    trained = "C-SGD" if summary["way"]["pulls"] else "narrow network"
    for phase, color, name in (("base", GRAY, "base"), ("csgd", BLUE, trained)):
        here = [(at, row) for at, row in rows.placed if row["phase"] == phase]
        before = [(base_steps, summary["base"]["accuracy"])] if phase == "csgd" else []
        if here:
            for on, line in ((judged, "o-"), ("train", ".:")):
                key = f"{phase}/{on.replace('-', '_')}_{task['score']}"
                if key in here[0][1]:  # of a score of the data's own the test alone
                    points = before * (on == judged) + [(at, row[key]) for at, row in here]
                    score.plot(*zip(*points, strict=True), line, color=color, label=f"{name}, {on}", markersize=4)
            values = [row[f"{phase}/loss"] for _, row in here]
            loss.plot([at for at, _ in here], values, "o-", color=color, label=name, markersize=4)
            edges = [0 if phase == "base" else base_steps, *(at for at, _ in here)]
            spent = [1000 * row[f"{phase}/seconds_per_step"] for _, row in here]
            cost.stairs(spent, edges, fill=True, color=PALE if phase == "csgd" else "#ececec")
            cost.stairs(spent, edges, color=color, label=name)
    cut = [stage["verdict"]["accuracy_after_trim"] for stage in summary["stages"]]
    score.plot(rows.cuts, cut, "D", color=RED, fillstyle="none", label="just after the cut")
    if summary["way"]["pulls"]:
        _draw_deviation(deviation, output_dir, summary, rows)
    else:
        deviation.remove()
    wide, trimmed = (summary["seconds_per_step"].get(phase) for phase in ("wide", "trimmed"))
    last = "last cut" if len(rows.cuts) > 1 else "cut"
    paces = [milliseconds(wide), f"{milliseconds(trimmed)} after the {last}"] if wide and trimmed else []
    saved = ", ".join(paces) or milliseconds(wide or trimmed)
    criterion_name, score_name = (task[key].replace("_", " ") for key in ("criterion", "score"))
    score.set(ylabel=score_name, title=score_name[0].upper() + score_name[1:])
    loss.set(ylabel=criterion_name, title="Training loss", ylim=(0, 1.05 * loss.dataLim.y1))
    cost.set(xlabel="step of the run", ylabel="ms, loading the images included", title=f"A step: {saved}")
    cost.set_ylim(0, 1.05 * cost.dataLim.y1)
    for axes in figure.axes:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=3, frameon=False, fontsize=8.5)
        axes.grid(alpha=0.3)
    for axes in (score, loss):
        axes.tick_params(labelbottom=True)
        _epochs_above(axes, rows)
    return save(figure, output_dir, "curves")


@dataclass(frozen=True)
class Rows:
    """The rows of a run, each with its step of the whole run, and the steps of the cuts.

    firsts  the steps at which the stages begin
    """

    base_steps: int
    placed: list[tuple[int, dict[str, Any]]]
    firsts: list[int]
    cuts: list[int]


def rows_of(output_dir: Path) -> Rows:
    """metrics.jsonl on one axis: the steps of the base network, if it was trained in this run, then those of C-SGD."""
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    stages = summary_of(output_dir)["stages"]
    base_steps = max((row["step"] for row in rows if row["phase"] == "base"), default=0)
    lengths = [stage["forecast"]["steps"] for stage in stages]
    firsts = [base_steps + sum(lengths[:k]) for k in range(len(stages))]
    placed = [(row["step"] + (firsts[row["stage"] - 1] if "stage" in row else 0), row) for row in rows]
    cuts = [first + stage["cut"]["step"] for first, stage in zip(firsts, stages, strict=True)]
    return Rows(base_steps, placed, firsts, cuts)


def _epochs_above(axes, rows: Rows) -> None:
    ends = [(at, row["epoch"]) for at, row in rows.placed if abs(row["epoch"] - round(row["epoch"])) < 1e-6]
    shown = ends[:: max(1, math.ceil(len(ends) / 10))]
    above = axes.secondary_xaxis("top")
    above.set_xticks([at for at, _ in shown], [f"{epoch:.0f}" for _, epoch in shown], fontsize=8)
    above.set_xlabel("epoch", fontsize=8)
    above.spines["top"].set_visible(False)
    above.tick_params(length=2)


def _draw_deviation(axes, output_dir: Path, summary: Mapping[str, Any], rows: Rows) -> None:
    """Measured and forecast, on a logarithmic axis whose bottom edge stands for 0."""
    film = film_of(output_dir)
    tolerance = summary["config"]["tolerance"]["deviation"]
    lowest, zeros = min(tolerance, FLOAT32), []
    for number, (stage, first) in enumerate(zip(summary["stages"], rows.firsts, strict=True), 1):
        for group, curve in stage["forecast"]["curves"].items():
            steps, expected = zip(*curve, strict=True)
            taken = [(at, row[f"left/{group}"]) for at, row in rows.placed if f"left/{group}" in row and at > first]
            taken = [(at, left) for at, left in taken if at <= first + stage["forecast"]["steps"]]
            if f"{number}/left/{group}" in film:
                seen = zip(film[f"{number}/steps"].tolist(), film[f"{number}/left/{group}"].tolist(), strict=True)
                taken = sorted({*taken, *((first + step, left) for step, left in seen)})
            names = (f"{group}, forecast", f"{group}, measured") if number == 1 else (None, None)
            color = GROUPS.get(group, GRAY)
            axes.plot([first + step for step in steps], expected, color=color, alpha=0.6, label=names[0])
            points = [(at, left) for at, left in taken if left > 0]
            axes.plot(*zip(*points, strict=True), ".", color=color, label=names[1])
            zeros += [at for at, left in taken if left == 0]
            lowest = min([lowest, *(left for _, left in points)])
    axes.axhline(tolerance, color=RED, linestyle=":", linewidth=1.2, label=f"tolerance, {tolerance:.0e}")
    axes.axhline(FLOAT32, color=GRAY, linestyle=":", linewidth=1.2, label="float32 rounding")
    axes.set(xlabel="step of the run", ylabel="of its start", title="What is left of the deviation ‖W − ΓW‖")
    axes.set(yscale="log", ylim=(lowest / 20, 3))
    if zeros:
        axes.plot(zeros, [lowest / 20] * len(zeros), "v", color=GROUPS["filters"], clip_on=False, label="exactly 0")


def film_of(output_dir: Path) -> dict[str, NDArray]:
    from safetensors.numpy import load_file

    path = output_dir / "film.safetensors"
    return load_file(path) if path.is_file() else {}
