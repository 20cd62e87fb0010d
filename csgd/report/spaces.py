"""The channel spaces of a network as a graph, drawn from summary.json into report/spaces.png."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csgd.report.paper import BLUE, GRAY, figure_of, save

WIDE = 11.5  # inches of a line
TALL = 9  # spaces in one column
MOST = 250  # spaces that a picture can show
ROW, GAP = 0.46, 0.34  # inches: of a box with what is below it, and between columns
OVER = 0.2  # inches above a box in which arrows pass
CUT, WHOLE = "#cfe3f5", "#e4e7ea"


@dataclass(frozen=True)
class Box:
    """Where a space is drawn, in inches from the left and from the top; line  of boxes, counted from 0"""

    left: float
    top: float
    width: float
    height: float
    line: int

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height


def draw_spaces(output_dir: Path) -> Path | None:
    """A box for each channel space, an arrow where a layer reads one and writes another; None of more than 250.

    Spaces that read each other stand together: a residual stream as a tall box beside the spaces within its blocks.
    Arrows that follow from others are left out.  report/spaces.png
    """
    from matplotlib.patches import FancyBboxPatch

    layers = {layer["name"]: layer for layer in json.loads((output_dir / "summary.json").read_text("utf-8"))["layers"]}
    if len(layers) > MOST:
        return None
    boxes, arrows = placed(layers)
    width, height = max(box.right for box in boxes.values()), max(box.bottom for box in boxes.values())
    figure = figure_of(width + 0.5, height + 0.75)
    axes = figure.subplots()
    axes.set(xlim=(-0.25, width + 0.25), ylim=(height + 0.1, -OVER - 0.05))
    axes.set_axis_off()
    for name, box in boxes.items():
        layer = layers[name]
        is_cut = layer["after"] < layer["before"]
        look = dict(facecolor=CUT if is_cut else WHOLE, edgecolor=BLUE if is_cut else GRAY, linewidth=0.8)
        style = "round,pad=0,rounding_size=0.06"
        axes.add_patch(FancyBboxPatch((box.left, box.top), box.width, box.height, boxstyle=style, **look))
        told = f"{layer['before']} → {layer['after']}" if is_cut else str(layer["before"])
        if layer["together"]:
            separator = "\n" if box.height > ROW else ", "
            told += f"{separator}{len(layer['together']) + 1} layers"
        middle = (box.left + box.width / 2, box.top + box.height / 2)
        axes.text(*middle, f"{name}\n{told}", ha="center", va="center", fontsize=6.5, linespacing=1.15)
    for source, target, both in arrows:
        edge = max(box.right for box in boxes.values() if box.line == boxes[source].line)
        _arrow(axes, boxes[source], boxes[target], both, edge)
    figure.suptitle("Which layers move together: a box is a channel space, an arrow a layer", fontsize=11)
    return save(figure, output_dir, "spaces")


def placed(layers: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Box], list[tuple[str, str, bool]]]:
    """Where each space is drawn; and the arrows (from, to, whether it goes both ways)."""
    import networkx

    graph = networkx.DiGraph()
    graph.add_nodes_from(layers)
    graph.add_edges_from((name, by) for name, layer in layers.items() for by in layer["read_by"] if by in layers)
    graph.remove_edges_from(list(networkx.selfloop_edges(graph)))
    order = {name: position for position, name in enumerate(layers)}
    groups = networkx.condensation(graph)
    boxes, left, line, top, lowest = {}, 0.0, 0, 0.0, 0.0
    for generation in networkx.topological_generations(groups):
        columns = _columns(graph, [sorted(groups.nodes[g]["members"], key=order.get) for g in generation], order)
        widths = [max(_width(layers[name]) for name, _, _ in column) for column in columns]
        wide = sum(widths) + GAP * (len(widths) - 1)
        if left and left + wide > WIDE:
            left, line, top = 0.0, line + 1, lowest + 0.5
        for column, width in zip(columns, widths, strict=True):
            for name, first, rows in column:
                boxes[name] = Box(left, top + first * ROW, width, rows * ROW - 0.1, line)
                lowest = max(lowest, boxes[name].bottom)
            left += width + GAP
    within = {edge for g in groups for edge in graph.subgraph(groups.nodes[g]["members"]).edges}
    arrows = [(a, b, (b, a) in within) for a, b in within if (b, a) not in within or order[a] < order[b]]
    reduced = networkx.transitive_reduction(groups)
    home = groups.graph["mapping"]
    between = {(home[a], home[b]): (a, b) for a, b in sorted(graph.edges, key=lambda e: (-order[e[0]], order[e[1]]))}
    arrows += [(*between[edge], False) for edge in reduced.edges]
    return boxes, arrows


def _columns(graph, groups: Sequence[Sequence[str]], order: Mapping[str, int]) -> list[list[tuple[str, int, int]]]:
    """The columns of some groups that stand beside each other, as (name, first row, rows).

    In a group the space with the most neighbours stands left of the others, and is as tall as they are together.
    """
    columns: list[list[tuple[str, int, int]]] = []
    row = 0
    for group in groups:
        if len(group) == 1:
            parts = [[(group[0], 0, 1)]]
        else:
            hub = max(group, key=lambda name: (graph.degree(name), -order[name]))
            rest = [name for name in group if name != hub]
            rows = min(TALL, len(rest))
            stacks = [rest[k : k + rows] for k in range(0, len(rest), rows)]
            parts = [[(hub, 0, rows)], *([(name, place, 1) for place, name in enumerate(stack)] for stack in stacks)]
        columns += [[] for _ in range(len(parts) - len(columns))]
        for column, part in zip(columns, parts, strict=False):
            column += [(name, row + first, rows) for name, first, rows in part]
        row += max(rows for _, _, rows in parts[0])
    return columns


def _width(layer: Mapping[str, Any]) -> float:
    return max(0.85, 0.06 * len(layer["name"]) + 0.15)


def _arrow(axes, source: Box, target: Box, both: bool, edge: float) -> None:
    """edge  of the line that the source stands in, on the right"""
    from matplotlib.patches import FancyArrowPatch

    look = dict(arrowstyle="<|-|>" if both else "-|>", mutation_scale=6, shrinkA=0, shrinkB=0)
    line = dict(color=GRAY, linewidth=0.8, zorder=0.5)  # behind the boxes

    def straight(*ends: tuple[float, float], **more: Any) -> None:
        axes.add_patch(FancyArrowPatch(*ends, **look | line | more))

    half = target.left + target.width / 2
    if source.line != target.line:  # to the start of the next line, round the end of this one
        gutter, end = target.top - OVER, edge + GAP / 2
        if source.right < edge - 1e-6:
            middle = source.left + source.width / 2
            path = [(middle, source.top), (middle, source.top - OVER), (end, source.top - OVER)]
        else:
            level = source.top + min(source.height, ROW - 0.1) / 2
            path = [(source.right, level), (end, level)]
        axes.plot(*zip(*path, (end, gutter), (half, gutter), strict=True), **line)
        straight((half, gutter), (half, target.top))
    elif math.isclose(source.left, target.left):  # one above the other
        upper, lower = sorted((source, target), key=lambda box: box.top)
        x = upper.left + upper.width / 2
        if lower.top - upper.bottom < ROW / 2:
            ends = ((x, upper.bottom), (x, lower.top))
            straight(*(ends if both or upper is source else ends[::-1]))
        else:
            middles = ((box.right, box.top + box.height / 2) for box in (source, target))
            straight(*middles, connectionstyle="arc3,rad=-0.4")
    else:
        left, right = sorted((source, target), key=lambda box: box.left)
        level = [box.top + min(box.height, ROW - 0.1) / 2 for box in (left, right)]
        if left.top <= right.top and right.bottom <= left.bottom + 1e-6:
            level[0] = level[1]
        near = right.left - left.right < 1.5 * GAP
        ends = ((left.right, level[0]), (right.left, level[1]))
        if near:
            straight(*(ends if both or left is source else ends[::-1]))
        else:  # over what stands between
            middle, over = source.left + source.width / 2, min(source.top, target.top) - OVER
            axes.plot([middle, middle, half], [source.top, over, over], **line)
            straight((half, over), (half, target.top))
