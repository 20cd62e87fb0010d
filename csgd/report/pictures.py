"""Pictures of a run, each drawn from its files alone into report/*.png."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csgd.report.tables import milliseconds, task_of

BLUE, GRAY, RED = "tab:blue", "tab:gray", "tab:red"
GROUPS = {"kernels": BLUE, "vectors": "tab:orange", "filters": BLUE}
PALE = "#d4dae1"
ROWS = 40  # layers in a picture of one column; more make two
SIZES = (("alone", 1, 1), ("2", 2, 2), ("3 to 4", 3, 4), ("5 to 8", 5, 8), ("9 or more", 9, math.inf))
SHADES = ("#eef3f8", "#c6dbef", "#85b8dc", "#3d8bc2", "#0b4f94")
WHEN = {"start": "at the start", "collapse": "at the collapse", "cut": "after the cut"}
TILE = 24  # pixels of a filter's picture, at least


def draw_curves(output_dir: Path) -> Path:
    """Score and loss over the whole run; over the C-SGD phase the deviation beside its forecast, and what a step
    costs; each cut marked.  report/curves.png"""
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    summary = _summary(output_dir)
    stages, task = summary["stages"], task_of(summary)
    figure = _figure(10, 7.4)
    (score, loss), (deviation, cost) = figure.subplots(2, 2)
    for phase, color, name in (("base", GRAY, "base"), ("csgd", BLUE, "C-SGD")):
        here = [row for row in rows if row["phase"] == phase]
        if here:
            epochs = [row["epoch"] for row in here]
            for on, line in (("test", "o-"), ("train", ".:")):
                if (key := f"{phase}/{on}_{task['score']}") in here[0]:  # of a score of the data's own the test alone
                    score.plot(epochs, [row[key] for row in here], line, color=color, label=f"{name}, {on}")
            loss.plot(epochs, [row[f"{phase}/loss"] for row in here], "o-", color=color, label=name)
    first, lowest, edges, spent = 0, 1.0, [0], []
    for number, stage in enumerate(stages, 1):
        here = [row for row in rows if row.get("stage") == number]
        for group, curve in stage["forecast"]["curves"].items():
            steps, expected = zip(*curve, strict=True)
            measured = [(first + row["step"], row[f"left/{group}"]) for row in here if f"left/{group}" in row]
            names = (f"{group}, forecast", f"{group}, measured") if number == 1 else (None, None)
            color = GROUPS.get(group, GRAY)
            deviation.plot([first + step for step in steps], expected, color=color, alpha=0.6, label=names[0])
            deviation.plot(*zip(*measured, strict=True), "o", color=color, label=names[1])
            lowest = min([lowest, *(value for _, value in measured if value > 0)])  # a Collapse ends at 0
        edges += [first + row["step"] for row in here]
        spent += [1000 * row["csgd/seconds_per_step"] for row in here]
        cut_epoch = next(row["epoch"] for row in here if row["step"] == stage["collapse"]["step"])
        for axes in (score, loss, deviation, cost):
            position = cut_epoch if axes in (score, loss) else first + stage["collapse"]["step"]
            axes.axvline(position, color=RED, linestyle="--", linewidth=1, label="cut" if number == 1 else None)
        first += stage["forecast"]["steps"]
    cost.stairs(spent, edges, fill=True, color=PALE, label="with loading the images")
    cost.stairs(spent, edges, color=BLUE)
    wide, trimmed = (summary["seconds_per_step"].get(phase) for phase in ("wide", "trimmed"))
    last = "last cut" if len(stages) > 1 else "cut"
    saved = milliseconds(wide) + (f", {milliseconds(trimmed)} after the {last}" if trimmed else "")
    criterion_name, score_name = (task[key].replace("_", " ") for key in ("criterion", "score"))
    score.set(xlabel="epoch", ylabel=score_name, title=score_name[0].upper() + score_name[1:])
    loss.set(xlabel="epoch", ylabel=criterion_name, title="Training loss", ylim=(0, 1.05 * loss.dataLim.y1))
    title = "What is left of the deviation ‖W − ΓW‖"
    deviation.set(xlabel="C-SGD step", ylabel="of its start", title=title, yscale="log")
    deviation.set_ylim(bottom=lowest / 10)
    cost.set(xlabel="C-SGD step", ylabel="milliseconds", title=f"A step: {saved}", ylim=(0, 1.15 * max(spent)))
    for axes in (score, loss, deviation, cost):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=3, frameon=False, fontsize=9)
        axes.grid(alpha=0.3)
    for axes in (score, loss):
        axes.xaxis.get_major_locator().set_params(integer=True)
    return _save(figure, output_dir, "curves")


def draw_widths(output_dir: Path) -> Path:
    """The width of every layer before and after; report/widths.png"""
    layers = _summary(output_dir)["layers"]
    figure = _figure(*_size(len(layers)))
    widest = max(layer["before"] for layer in layers)
    for axes, part in _columns(figure, layers, "name"):
        pinned = [(y, layer["before"]) for y, layer in enumerate(part) if layer["pinned"]]
        live = [(y, layer) for y, layer in enumerate(part) if not layer["pinned"]]
        rows = [y for y, _ in live]
        axes.barh(rows, [layer["before"] for _, layer in live], color=PALE, label="before")
        axes.barh(rows, [layer["after"] for _, layer in live], color=BLUE, height=0.5, label="after")
        axes.barh([y for y, _ in pinned], [width for _, width in pinned], color=GRAY, alpha=0.35, label="stays whole")
        for y, layer in enumerate(part):
            before, after = layer["before"], layer["after"]
            text = f" {before} → {after}" if before != after else f" {before}"
            axes.text(before, y, text, va="center", fontsize=8)
        axes.set(xlim=(0, 1.3 * widest), xlabel="width")
    _title(figure, "Widths before and after")
    return _save(figure, output_dir, "widths")


def draw_sizes(output_dir: Path) -> Path:
    """Into clusters of how many filters each layer was parted, at the last cut; report/sizes.png"""
    clusters = json.loads((output_dir / "clusters.json").read_text())
    stages = _summary(output_dir)["stages"]
    figure = _figure(*_size(len(clusters)))
    layers = [{"name": name, "sizes": [len(part) for part in parts]} for name, parts in clusters.items()]
    for axes, part in _columns(figure, layers, "name"):
        left = np.zeros(len(part))
        for (name, least, most), shade in zip(SIZES, SHADES, strict=True):
            held = [sum(size for size in layer["sizes"] if least <= size <= most) for layer in part]
            share = np.array(held) / [sum(layer["sizes"]) for layer in part]
            axes.barh(range(len(part)), share, left=left, color=shade, edgecolor=GRAY, linewidth=0.4, label=name)
            left += share
        for y, layer in enumerate(part):
            told = f"{len(layer['sizes'])} clusters, largest {max(layer['sizes'])}"
            axes.text(1.02, y, told, va="center", fontsize=8)
        axes.set(xlim=(0, 1.75), xticks=(0, 0.5, 1), xticklabels=("0", "50 %", "100 %"))
        axes.set_xlabel("share of the filters", loc="left")
        axes.spines["bottom"].set_bounds(0, 1)
    which = f", at cut {len(stages)} of {len(stages)}" if len(stages) > 1 else ""
    _title(figure, f"Filters by the size of their cluster{which}")
    return _save(figure, output_dir, "sizes")


def draw_filters(output_dir: Path) -> Path | None:
    """The filters of the first layer that was cut, by cluster: at the start, at the collapse and after the cut.

    A row for each stage; report/filters.png.  None if no layer that was cut has filters of more than one pixel.
    """
    from safetensors.numpy import load_file

    if not (output_dir / "filters.safetensors").exists():
        return None
    kept = load_file(output_dir / "filters.safetensors")
    stages = sorted({key.rsplit("/", 1)[0] for key in kept}, key=lambda prefix: int(prefix.split("/")[0]))
    arranged = []
    for prefix in stages:
        of = kept[f"{prefix}/cluster"]
        clusters = [np.flatnonzero(of == c).tolist() for c in range(of.max() + 1)]
        by_size = sorted(clusters, key=len, reverse=True)
        arranged.append((clusters, *_places(by_size, kept[f"{prefix}/start"].shape[2:])))
    figure = _figure(12, sum(0.6 + 4 * canvas.shape[0] / canvas.shape[1] for *_, canvas in arranged))
    figure.get_layout_engine().set(wspace=0.06, h_pad=0.1)
    rows = figure.subplots(len(stages), 3, squeeze=False)
    for row, prefix, (clusters, places, canvas) in zip(rows, stages, arranged, strict=True):
        number, layer = prefix.split("/", 1)
        for axes, when in zip(row, WHEN, strict=True):
            slots = [part[0] for part in clusters] if when == "cut" else range(len(places))
            picture = canvas.copy()
            for slot, tile in zip(slots, _tiles(kept[f"{prefix}/{when}"]), strict=True):
                y, x = places[slot]
                picture[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
            stage = f" (stage {number})" if len(stages) > 1 else ""
            axes.set_title(f"{layer}{stage}, {WHEN[when]}: {len(slots)} filters", fontsize=11)
    return _save(figure, output_dir, "filters")


def _tiles(kernels: NDArray) -> NDArray:
    """Kernels [c, k, h, w] as pictures [c, H, W, 3]: the colours of three inputs, or in gray the sum over all
    others, which a cut leaves as it is; the largest weight black or white, 0 in the middle."""
    colours = kernels if kernels.shape[1] == 3 else kernels.sum(1, keepdims=True).repeat(3, 1)
    shown = 0.5 + 0.5 * colours / max(np.abs(colours).max(), 1e-30)
    zoom = _zoom(kernels.shape[2:])
    return shown.transpose(0, 2, 3, 1).repeat(zoom, 1).repeat(zoom, 2)


def _zoom(shape: Sequence[int]) -> int:
    return max(1, TILE // max(shape))


def _places(clusters: Sequence[Sequence[int]], shape: Sequence[int]) -> tuple[dict[int, tuple[int, int]], NDArray]:
    """Where the filters go, {slot: (y, x)}, in lines of whole clusters; and the paper, each cluster a pale field."""
    border, gap = 2, 8
    height, width = (side * _zoom(shape) + 2 * border for side in shape)
    count, longest = sum(map(len, clusters)), max(map(len, clusters))
    line = max(round((1.4 * count) ** 0.5), min(longest, round(2 * count**0.5))) * (width + gap // 2)
    y = x = right = 0
    places, fields = {}, []
    for part in clusters:
        if x and x + len(part) * width > line:
            y, x = y + height + gap, 0
        for slot in part:
            if x and x + width > line:
                y, x = y + height, 0
            places[slot] = y + border, x + border
            fields.append((y, x))
            x += width
            right = max(right, x)
        x += gap if len(part) * width <= line else line  # after a cluster of several lines, a new one
    canvas = np.ones((y + height, right, 3))
    for top, left in fields:
        canvas[top : top + height, left : left + width] = 0.88
    return places, canvas


def _summary(output_dir: Path) -> dict[str, Any]:
    return json.loads((output_dir / "summary.json").read_text())


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _size(layers: int) -> tuple[float, float]:
    columns = _column_count(layers)
    return 5.5 * columns + 1.5, 0.19 * math.ceil(layers / columns) + 1.5


def _column_count(layers: int) -> int:
    return 1 if layers <= ROWS else 2


def _columns(figure, layers: Sequence[Mapping[str, Any]], name: str) -> Iterator[tuple[Any, Sequence[Mapping]]]:
    """Axes with the names of some layers down their left side, and these layers."""
    count = _column_count(len(layers))
    rows = math.ceil(len(layers) / count)
    for column, axes in enumerate(figure.subplots(1, count, squeeze=False)[0]):
        part = layers[column * rows : (column + 1) * rows]
        yield axes, part
        axes.set_yticks(range(len(part)), [layer[name] for layer in part], fontsize=8)
        axes.set_ylim(rows - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)


def _title(figure, title: str) -> None:
    """The title, and under it one legend for all axes."""
    figure.suptitle(title)
    shown = [axes.get_legend_handles_labels() for axes in figure.axes]
    named = {label: handle for handles, labels in shown for handle, label in zip(handles, labels, strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncol=len(named), frameon=False, fontsize=9)


def _save(figure, output_dir: Path, name: str) -> Path:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path = output_dir / "report" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
