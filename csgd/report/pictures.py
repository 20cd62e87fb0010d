"""Pictures of a run, each drawn from its files alone into report/*.png."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csgd.report.paper import BLUE, GRAY, PALE, RED, figure_of, save, summary_of
from csgd.report.tables import tested_on

ROWS = 40  # layers in a picture of one column; more make two
SIZES = (("alone", 1, 1), ("2", 2, 2), ("3 to 4", 3, 4), ("5 to 8", 5, 8), ("9 or more", 9, math.inf))
SHADES = ("#eef3f8", "#c6dbef", "#85b8dc", "#3d8bc2", "#0b4f94")
WHEN = {"start": "at the start", "collapse": "at the collapse", "cut": "after the cut"}
STAGES = (BLUE, "tab:orange", "tab:green", "tab:purple", "tab:brown")
LEAST = 1e-9  # where a change of 0 is drawn
DECADES = 1e-3  # of the largest sensitivity: by its shade what is less looks like 0
TILE = 24  # pixels of a filter's picture, at least


def draw_outputs(output_dir: Path) -> Path | None:
    """What the network says of the images that it is tested on before each cut and after it; and of every image by how
    much of its spread that differs.  report/outputs.png; None if that was not kept"""
    from safetensors.numpy import load_file

    if not (path := output_dir / "outputs.safetensors").is_file():
        return None
    kept, summary = load_file(path), summary_of(output_dir)
    tolerance, on = summary["config"]["tolerance"]["logits"], tested_on(summary)
    figure = figure_of(10, 4.3)
    scatter, change = figure.subplots(1, 2)
    numbers = sorted({int(key.split("/")[0]) for key in kept})
    for number in numbers:
        before, after = kept[f"{number}/before"], kept[f"{number}/after"]
        name = f"cut {number}" if len(numbers) > 1 else f"an output of a {on} image"
        color = STAGES[(number - 1) % len(STAGES)]
        scatter.scatter(before, after, s=7, alpha=0.4, color=color, linewidths=0, label=name)
        changes = np.sort(kept[f"{number}/change"])[::-1]
        shown = np.maximum(changes, LEAST)
        share = 100 * (np.arange(len(changes)) + 1) / len(changes)
        change.plot(share, shown, ".", markersize=4, color=color, label=name.replace("an output of a", "a"))
    ends = [scatter.dataLim.x0, scatter.dataLim.x1]
    scatter.plot(ends, ends, color=GRAY, linewidth=0.8, zorder=0, label="no change")
    scatter.set(xlabel="before the cut", ylabel="after the cut", title="Outputs")
    change.axhline(tolerance, color=RED, linestyle=":", linewidth=1.2, label=f"tolerance, {tolerance:.0e}")
    change.set(xlabel=f"% of the {on} images, those that changed most first", yscale="log")
    change.set(ylabel="of the spread of its outputs", title="Change of an image's outputs")
    for axes in (scatter, change):
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=3, frameon=False, fontsize=8.5)
    return save(figure, output_dir, "outputs")


def draw_widths(output_dir: Path) -> Path:
    """The width of every layer before and after; report/widths.png"""
    layers = summary_of(output_dir)["layers"]
    figure = figure_of(*_size(len(layers)))
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
    return save(figure, output_dir, "widths")


def draw_sensitivity(output_dir: Path) -> Path | None:
    """By how much the loss grows where a layer alone is merged to a fraction of its width, and the width it got;
    report/sensitivity.png.  None if that was not measured"""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    if not (path := output_dir / "sensitivity.json").is_file():
        return None
    measured = json.loads(path.read_text("utf-8"))
    layers = [layer for layer in summary_of(output_dir)["layers"] if measured["changes"].get(layer["name"])]
    most = max(change for rows in measured["changes"].values() for _, change in rows)
    least = min(DECADES * most, (measured["threshold"] or most) / 10)  # so that the threshold is on the scale
    shades = ScalarMappable(LogNorm(max(least, LEAST), max(most, 10 * LEAST), clip=True), "YlOrRd")
    width, height = _size(len(layers))
    figure = figure_of(width, height + 0.8)
    for axes, part in _columns(figure, layers, "name"):
        for y, layer in enumerate(part):
            size, rows = layer["before"], measured["changes"][layer["name"]]
            at = [1.0, *(width / size for width, _ in rows)]
            edges = [(a + b) / 2 for a, b in pairwise([*at, 2 * at[-1] - at[-2]])]
            for (left, right), (_, change), x in zip(pairwise(edges), rows, at[1:], strict=True):
                color = shades.to_rgba(max(change, LEAST))
                axes.barh(y, right - left, left=left, height=0.92, color=color, edgecolor="white", linewidth=0.5)
                ink = "white" if sum(color[:3]) < 1.5 else "black"
                axes.text(x, y - 0.05, _change(change), ha="center", va="center", fontsize=6, color=ink)
        got = [layer["after"] / layer["before"] for layer in part]
        under = [y + 0.36 for y in range(len(part))]
        axes.plot(got, under, "^", color=BLUE, markeredgecolor="white", markersize=7, label="the width it got")
        axes.set(xlim=(1.03, 0.03), xticks=[n / 8 for n in range(8, 0, -1)], xlabel="fraction of the channels left")
        axes.set_xticklabels(["1", "7/8", "3/4", "5/8", "1/2", "3/8", "1/4", "1/8"])
    _title(figure, "Growth of the loss where this layer alone is merged, without training")
    bar = figure.colorbar(shades, ax=figure.axes, orientation="horizontal", fraction=0.04, pad=0.02, aspect=60)
    bar.set_label(f"of the mean loss of {measured['images']:,} training images")
    if measured["threshold"]:
        bar.ax.axvline(measured["threshold"], color=BLUE, linewidth=2)
    return save(figure, output_dir, "sensitivity")


def _change(value: float) -> str:
    """0.0001 → 0, 0.0123 → .012, 0.123 → .12, 3.21 → 3.2, 32.1 → 32"""
    if abs(value) < 0.0005:
        return "0"
    digits = next((count for count, below in ((3, 0.1), (2, 1), (1, 10)) if abs(value) < below), 0)
    return f"{value:.{digits}f}" if abs(value) >= 1 else f"{value:.{digits}f}".replace("0.", ".")


def draw_sizes(output_dir: Path) -> Path | None:
    """Into clusters of how many filters each layer was parted, at the last cut; report/sizes.png

    None where every filter was alone: some were kept, and no two became one.
    """
    clusters = json.loads((output_dir / "clusters.json").read_text("utf-8"))
    if all(len(members) == 1 for parts in clusters.values() for members in parts):
        return None
    stages = summary_of(output_dir)["stages"]
    figure = figure_of(*_size(len(clusters)))
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
    return save(figure, output_dir, "sizes")


def draw_filters(output_dir: Path) -> Path | None:
    """The filters of the first layer that was cut, by cluster: at the start, at the collapse if there was one, and
    after the cut.

    A row for each stage; report/filters.png.  None if no layer that was cut has filters of more than one pixel.
    """
    from safetensors.numpy import load_file

    if not (output_dir / "filters.safetensors").exists():
        return None
    kept = load_file(output_dir / "filters.safetensors")
    stages = sorted({key.rsplit("/", 1)[0] for key in kept}, key=lambda prefix: int(prefix.split("/")[0]))
    laid = []
    for prefix in stages:
        of = kept[f"{prefix}/cluster"]
        clusters = [np.flatnonzero(of == c).tolist() for c in range(of.max() + 1)]
        by_size = sorted(clusters, key=len, reverse=True)
        laid.append((clusters, *arranged(by_size, kept[f"{prefix}/start"].shape[2:])))
    figure = figure_of(12, sum(0.6 + 4 * canvas.shape[0] / canvas.shape[1] for *_, canvas in laid))
    figure.get_layout_engine().set(wspace=0.06, h_pad=0.1)
    shown = [when for when in WHEN if f"{stages[0]}/{when}" in kept]
    rows = figure.subplots(len(stages), len(shown), squeeze=False)
    for row, prefix, (clusters, places, canvas) in zip(rows, stages, laid, strict=True):
        number, layer = prefix.split("/", 1)
        for axes, when in zip(row, shown, strict=True):
            slots = [part[0] for part in clusters] if when == "cut" else range(len(places))
            picture = canvas.copy()
            for slot, tile in zip(slots, _tiles(kept[f"{prefix}/{when}"]), strict=True):
                y, x = places[slot]
                picture[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
            stage = f" (stage {number})" if len(stages) > 1 else ""
            axes.set_title(f"{layer}{stage}, {WHEN[when]}: {len(slots)} filters", fontsize=11)
    return save(figure, output_dir, "filters")


def _tiles(kernels: NDArray) -> NDArray:
    """Kernels [c, k, h, w] as pictures [c, H, W, 3]: the colours of three inputs, or in gray the sum over all
    others, which a cut leaves as it is; the largest weight black or white, 0 in the middle."""
    colours = kernels if kernels.shape[1] == 3 else kernels.sum(1, keepdims=True).repeat(3, 1)
    shown = 0.5 + 0.5 * colours / max(np.abs(colours).max(), 1e-30)
    return enlarged(shown.transpose(0, 2, 3, 1))


def enlarged(pictures: NDArray) -> NDArray:
    """[c, h, w, 3] with tiles of pixels for pixels."""
    zoom = _zoom(pictures.shape[1:3])
    return pictures.repeat(zoom, 1).repeat(zoom, 2)


def _zoom(shape: Sequence[int]) -> int:
    return max(1, TILE // max(shape))


def arranged(clusters: Sequence[Sequence[int]], shape: Sequence[int]) -> tuple[dict[int, tuple[int, int]], NDArray]:
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
