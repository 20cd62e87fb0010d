"""Tables of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

CLASSIFICATION = {"criterion": "cross_entropy", "score": "accuracy"}
LAYER_HEADER = ("layer", "width before", "width after", "largest cluster", "stays whole because, or is cut if")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose columns line up; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = numeric(header, rows)

    def line(row: Sequence[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([line(header), rule, *map(line, cells)])


def numeric(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[bool]:
    """Of each column whether it holds nothing but numbers, and gaps in them."""
    starts = [[str(cell)[:1] for cell in row] for row in rows]
    return [all(row[i].isdigit() or row[i] in "-−" for row in starts) for i in range(len(header))]


def task_of(summary: Mapping[str, Any]) -> dict[str, str]:
    """The names of the criterion and of the score of a run; a summary names them where they are the data's own."""
    return summary.get("task", CLASSIFICATION)


def verdict_table(summary: Mapping[str, Any]) -> str:
    """Before and after, as a table."""
    return table(("", "value", ""), verdict_rows(summary))


def verdict_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Before and after: what, its value, and a word on it."""
    base, verdict, cost = summary["base"], summary["verdict"], summary["cost"]
    fraction, seconds = summary["collapse"]["fraction"], summary["seconds"]
    score, stages = task_of(summary)["score"], len(summary["stages"])
    last, of = ("last ", f"stage {stages}") if stages > 1 else ("", "C-SGD")

    def cut(key: str) -> tuple[str, str, str]:
        before, after = cost[f"{key}_before"], cost[f"{key}_after"]
        name = {"macs": "multiply-accumulates", "params": "parameters"}[key]
        return name, f"{after:,}", f"{1 - after / before:.1%} less than {before:,}"

    return [
        (f"test {score}, base network", f"{base['accuracy']:.4f}", _trained(summary)),
        (
            f"… before the {last}cut",
            f"{verdict['accuracy_before_trim']:.4f}",
            f"step {summary['collapse']['step']} of {of}",
        ),
        (f"… after the {last}cut", f"{verdict['accuracy_after_trim']:.4f}", "the same network, narrow"),
        (
            "… at the end",
            f"{verdict['accuracy']:.4f}",
            f"after {_epochs(summary, 'csgd') * stages} more epochs, {1 - fraction:.0%} of their steps narrow",
        ),
        (
            "largest change of an output",
            f"{verdict['max_logit_change']:.1e}",
            f"{verdict['relative_logit_change']:.1e} of the spread of an image's outputs, at worst",
        ),
        (
            "deviation",
            f"{verdict['relative_deviation']:.1e}",
            "before the cut: ‖W − ΓW‖ / ‖W‖, the largest of a tensor",
        ),
        cut("macs"),
        cut("params"),
        _step_cost(summary["seconds_per_step"]),
        ("seconds", f"{seconds['total']:.0f}", _stages(seconds)),
    ]


def _trained(summary: Mapping[str, Any]) -> str:
    """What is behind the accuracy of the base network: what it gains later, it may have gained by being trained on."""
    weights = summary["config"]["base"]["weights"]
    return f"from {weights}" if weights else f"after {_epochs(summary, 'base')} epochs"


def _epochs(summary: Mapping[str, Any], phase: str) -> int:
    return summary["config"]["schedule"][phase]["epochs"]


def _step_cost(seconds_per_step: Mapping[str, float]) -> tuple[str, str, str]:
    wide, trimmed = seconds_per_step["wide"], seconds_per_step.get("trimmed")
    if trimmed is None:
        return "milliseconds a step", f"{1000 * wide:.0f}", "the wide network's, to the end"
    return "milliseconds a step", f"{1000 * trimmed:.0f}", f"{1000 * wide:.0f} before the cut"


def _stages(seconds: Mapping[str, float]) -> str:
    stages = ("base", "cluster", "csgd_wide", "trim", "csgd_trimmed")
    return ", ".join(f"{stage.replace('_', ' ')} {seconds[stage]:.0f}" for stage in stages)


def layer_rows(
    layers: Sequence[Mapping[str, Any]], clusters: Mapping[str, Sequence[Sequence[int]]]
) -> list[tuple[str, int, int, str, str]]:
    """The rows under LAYER_HEADER, one for each channel space: name, width before and after, and why it is pinned
    or on what conditions it is cut."""
    return [
        (
            layer["name"],
            layer["before"],
            layer["after"],
            str(max(map(len, clusters[layer["name"]]))) if layer["name"] in clusters else "-",
            "; ".join(layer["pinned"] or layer.get("conditions", ())),
        )
        for layer in layers
    ]


def milliseconds(seconds: float) -> str:
    """1.25 ms, 12.5 ms, 125 ms, 1254 ms"""
    ms = 1000 * seconds
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min, 4 days 2 h"""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} days {hours % 24} h"
