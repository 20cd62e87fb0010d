"""Tables of a run."""

from collections.abc import Callable, Mapping, Sequence
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


def tested_on(summary: Mapping[str, Any]) -> str:
    """What its scores are of: "test", or "held-out" of the training images; in files held_out."""
    return "held-out" if summary["config"].get("validation") else "test"


def _tuned(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The learning rate, where trials gave it."""
    if not (tuned := summary.get("tuned")):
        return []
    scores = (
        f"{one['lr']:g}: " + (f"{one['score']:.4f}" if one["failure"] == "" else "failed") for one in tuned["trials"]
    )
    taken = sum(one["seconds"] for one in tuned["trials"])
    about = f"tried on {tuned['held_out']:.0%} of the training images, {taken:.0f} s: {', '.join(scores)}"
    return [("learning rate", f"{tuned['lr']:g}", about)]


def verdict_table(summary: Mapping[str, Any]) -> str:
    """Before and after, as a table."""
    return table(("", "value", ""), verdict_rows(summary))


def verdict_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Before and after: what, its value, and a word on it."""
    base, verdict, cost = summary["base"], summary["verdict"], summary["cost"]
    fraction, seconds = summary["cut"]["fraction"], summary["seconds"]
    score, stages = task_of(summary)["score"], len(summary["stages"])
    tolerance, pulls = summary["config"]["tolerance"], summary["way"]["pulls"]
    last, of = ("last ", f"stage {stages}") if stages > 1 else ("", "C-SGD" if pulls else f"{_steps(summary)}")
    told, lossless, deviation = summary["way"]["told"], "", []
    if pulls:
        told, lossless = "the same network, narrow", f"; at most {tolerance['logits']:.0e} is lossless"
        about = "before the cut: ‖W − ΓW‖ / ‖W‖, the largest of a tensor; "
        about += f"at most {tolerance['deviation']:.0e} is collapsed"
        deviation = [("deviation", f"{verdict['relative_deviation']:.1e}", about)]

    def cut(key: str) -> tuple[str, str, str]:
        before, after = cost[f"{key}_before"], cost[f"{key}_after"]
        name = {"macs": "multiply-accumulates", "params": "parameters"}[key]
        return name, f"{after:,}", f"{1 - after / before:.1%} less than {before:,}"

    return [
        *_tuned(summary),
        (
            f"{tested_on(summary)} {score}, base network",
            f"{base['accuracy']:.4f}",
            _trained(summary),
        ),
        (
            f"… before the {last}cut",
            f"{verdict['accuracy_before_trim']:.4f}",
            f"step {summary['cut']['step']} of {of}",
        ),
        (f"… after the {last}cut", f"{verdict['accuracy_after_trim']:.4f}", told),
        (
            "… at the end",
            f"{verdict['accuracy']:.4f}",
            f"after {_steps(summary) * stages} more steps, {1 - fraction:.0%} of them narrow; "
            "what training alone gains was not measured",
        ),
        (
            "largest change of an output",
            f"{verdict['max_logit_change']:.1e}",
            f"{verdict['relative_logit_change']:.1e} of the spread of an image's outputs, at worst{lossless}",
        ),
        *deviation,
        cut("macs"),
        cut("params"),
        _step_cost(summary["seconds_per_step"]),
        ("seconds", f"{seconds['total']:.0f}", _stages(seconds)),
    ]


def baseline_note(summary: Mapping[str, Any]) -> str:
    """Why the gain of a run over its base network is not the method's alone."""
    weights, way, steps = summary["config"]["base"]["weights"], summary["way"], _steps(summary) * len(summary["stages"])
    if not way["trained"]:
        return f"There is no base network: the narrow one was trained for {steps} steps."
    base = f"came from {weights}" if weights else f"had {_counted(_epochs(summary, 'base'))} of training"
    who = "C-SGD" if way["pulls"] else "this run"
    return (
        f"The base network {base}, and {who} trained it for {steps} steps more. "
        "More training gains by itself, and how much was not measured."
    )


def _steps(summary: Mapping[str, Any]) -> int:
    """Of a stage."""
    return summary["stages"][-1]["forecast"]["steps"]


def _counted(epochs: int) -> str:
    return "1 epoch" if epochs == 1 else f"{epochs} epochs"


def _trained(summary: Mapping[str, Any]) -> str:
    """What is behind the accuracy of the base network: what it gains later, it may have gained by being trained on."""
    weights = summary["config"]["base"]["weights"]
    if not summary["way"]["trained"]:
        return "not trained"
    return f"from {weights}" if weights else f"after {_counted(_epochs(summary, 'base'))}"


def _epochs(summary: Mapping[str, Any], phase: str) -> int:
    return summary["config"]["schedule"][phase]["epochs"]


def _step_cost(seconds_per_step: Mapping[str, float]) -> tuple[str, str, str]:
    wide, trimmed = seconds_per_step.get("wide"), seconds_per_step.get("trimmed")
    if wide is None:
        return "milliseconds a step", f"{1000 * trimmed:.0f}", "the narrow network's"
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


def cost_header(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """Of a table with what each layer costs; without latencies where these could not be measured."""
    latency = summary["latency"]
    timed = (f"ms, {latency['images']} images",) if latency else ()
    costs = ("width", "clusters of", "MACs", "parameters", *timed, "deviation")
    return ("layer", "moves together with", *costs, LAYER_HEADER[-1])


def cost_rows(summary: Mapping[str, Any], clusters: Mapping[str, Sequence[Sequence[int]]]) -> list[tuple[str, ...]]:
    """The rows under `cost_header`: a channel space each, then what is in none of them, then the whole network.

    Costs are before and after the run; deviations at the start and at the cut of the last stage that cut the space.
    """
    latency, layers = summary["latency"], summary["layers"]
    apart = {name: pair for stage in summary["stages"] for name, pair in stage["apart"].items()}
    of_layers = {key: [layer[key] for layer in layers] for key in ("macs", "params")}
    of_all = {key: [summary["cost"][f"{key}_{when}"] for when in ("before", "after")] for key in of_layers}
    told = {"macs": short, "params": short}
    if latency:
        of_layers["ms"] = [latency["layers"][layer["name"]] for layer in layers]
        of_all["ms"], told["ms"] = latency["whole"], _ms
    rows = []
    for number, layer in enumerate(layers):
        name, sizes = layer["name"], [len(part) for part in clusters.get(layer["name"], ())]
        rows.append(
            (
                name,
                ", ".join(layer["together"]) or "–",
                _change(layer["before"], layer["after"], str),
                _range(sizes),
                *(_change(*pairs[number], told[key]) for key, pairs in of_layers.items()),
                f"{apart[name][0]:.2f} → {_small(apart[name][1])}" if name in apart else "-",
                "; ".join(layer["pinned"] or layer["conditions"]),
            )
        )
    rest = {
        key: [whole - sum(pair[when] for pair in of_layers[key]) for when, whole in enumerate(pair_of_all)]
        for key, pair_of_all in of_all.items()
    }
    for name, costs in (("everything else", rest), ("the network", of_all)):
        rows.append((name, "", "-", "-", *(_change(*pair, told[key]) for key, pair in costs.items()), "-", ""))
    return rows


def _range(sizes: Sequence[int]) -> str:
    if not sizes:
        return "-"
    return f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else str(sizes[0])


def _change(before: float, after: float, told: Callable[[float], str]) -> str:
    return told(before) if told(before) == told(after) else f"{told(before)} → {told(after)}"


def _small(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def short(count: float) -> str:
    """950, 2.34 k, 23.4 k, 234 k, 2.34 M"""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}" if count < 999.5 * size else f"{count / size:.0f}{unit}"
    return f"{count:.0f}"


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
