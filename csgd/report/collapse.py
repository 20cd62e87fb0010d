"""The collapse of one layer's filters as an animation: report/collapse.gif."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csgd.report.curves import Rows, film_of, rows_of
from csgd.report.paper import BLUE, GRAY, RED, figure_of, summary_of
from csgd.report.pictures import arranged, enlarged
from csgd.report.tables import task_of, tested_on

PALETTE = 8  # frames that the colours of all are taken from
MILLISECONDS, HELD, LAST = 90, 1200, 3000  # of a frame, of the first and of that at the cut, and of the last
GOING_ON = 8  # frames of the narrow network


@dataclass(frozen=True)
class Frame:
    """What a frame shows, and for how many milliseconds.

    step     of the stage
    filters  [c, h, w] by slot, summed over their inputs;  places  [c, 2] of them in the plane
    left     of the distance between members at the start of the stage
    """

    step: int
    filters: NDArray
    places: NDArray
    left: float
    is_cut: bool
    lasts: int


def draw_collapse(output_dir: Path) -> Path | None:
    """The filters of the first layer that was cut, in the first stage: as pictures by cluster, and as points in the
    plane in which they differ most at the start; with the score of the run.

    report/collapse.gif; None where no layer that was cut has filters of more than one pixel.
    """
    from PIL import Image

    film = film_of(output_dir)
    if "1/tiles" not in film:
        return None
    drawn, lasts = zip(*_pictures(output_dir, film), strict=True)
    some = [*drawn[:: max(1, len(drawn) // PALETTE)], drawn[-1]]
    common = Image.fromarray(np.concatenate(some)).quantize(256, dither=Image.Dither.NONE)
    pictures = [Image.fromarray(pixels).quantize(palette=common, dither=Image.Dither.NONE) for pixels in drawn]
    palette = common.getpalette()
    paper = 3 * pictures[0].getpixel((0, 0))
    palette[paper : paper + 3] = 255, 255, 255  # which was the mean of what is nearly white
    for picture in pictures:
        picture.putpalette(palette)
    path = output_dir / "report" / "collapse.gif"
    path.parent.mkdir(exist_ok=True)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=list(lasts), loop=0, optimize=False)
    return path


def _frames(film: dict[str, NDArray], cut: int, steps: int) -> Iterator[Frame]:
    group = next(key for key in film if key.startswith("1/left/"))
    shown = [k for k, step in enumerate(film["1/steps"].tolist()) if step <= cut]
    for k in shown:
        is_end = k in (shown[0], shown[-1])
        what = film["1/tiles"][k], film["1/places"][k], float(film[group][k])
        yield Frame(int(film["1/steps"][k]), *what, False, HELD if is_end else MILLISECONDS)
    for at in np.linspace(cut, steps, GOING_ON).round():
        yield Frame(int(at), *what, True, LAST if at == steps else HELD if at == cut else MILLISECONDS)


def _pictures(output_dir: Path, film: dict[str, NDArray]) -> Iterator[tuple[NDArray, int]]:
    """Each frame [height, width, 3] and its milliseconds; what does not move is drawn once."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from safetensors.numpy import load_file

    kept = load_file(output_dir / "filters.safetensors")
    (layer,) = (key.split("/")[1] for key in kept if key.startswith("1/") and key.endswith("/cluster"))
    of, summary, rows = kept[f"1/{layer}/cluster"], summary_of(output_dir), rows_of(output_dir)
    clusters = [np.flatnonzero(of == c).tolist() for c in range(of.max() + 1)]
    several = sorted((part for part in clusters if len(part) > 1), key=len, reverse=True)
    spots, canvas = arranged(several, film["1/tiles"].shape[2:])
    largest = np.abs(film["1/tiles"][0]).max()
    times, values = _scores(summary, rows)
    first, stage = rows.firsts[0], summary["stages"][0]

    figure = figure_of(7.8, 4.2)
    figure.set_dpi(100)
    figure.get_layout_engine().set(h_pad=0.08)
    agg = FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    tiles, (plane, score) = left.subplots(), right.subplots(2, 1, height_ratios=(1.5, 1))
    tiles.set_title(f"{layer}: {len(several)} clusters of several filters", fontsize=10)
    image = tiles.imshow(canvas, interpolation="nearest", animated=True)
    tiles.set_axis_off()
    told = left.supxlabel("step", fontsize=10, animated=True)
    points, threads = _points(plane, film["1/places"][0], clusters)
    score.axvline(first + stage["cut"]["step"], color=RED, linestyle="--", linewidth=1)
    now = _line(score, times, values, task_of(summary)["score"], tested_on(summary))
    agg.draw()
    paper = agg.copy_from_bbox(figure.bbox)
    for frame in _frames(film, stage["cut"]["step"], stage["forecast"]["steps"]):
        agg.restore_region(paper)
        slots = [part[0] for part in several] if frame.is_cut else list(spots)
        colours = colormaps["RdBu_r"](0.5 + 0.5 * frame.filters / largest)[..., :3]
        image.set_data(_laid(canvas, enlarged(colours), spots, slots))
        points.set_offsets(frame.places)
        threads.set_segments(_to_the_middle(frame.places, clusters))
        now.set_data([first + frame.step], [np.interp(first + frame.step, times, values)])
        told.set_text(f"step {first + frame.step}: {_told(frame)}")
        for axes, artist in ((tiles, image), (plane, threads), (plane, points), (score, now)):
            axes.draw_artist(artist)
        told.draw(agg.get_renderer())
        yield np.asarray(agg.buffer_rgba())[..., :3].copy(), frame.lasts


def _points(axes, places: NDArray, clusters: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """The filters as points, and the threads to the means of their clusters: both move."""
    from matplotlib.collections import LineCollection

    colours = _colours(clusters)
    points = axes.scatter(*places.T, s=22, c=colours, animated=True, zorder=3, edgecolors="none")
    threads = LineCollection([], colors=colours, linewidths=0.8, alpha=0.6, animated=True)
    axes.add_collection(threads)
    axes.set(xticks=[], yticks=[])
    axes.margins(0.08)
    axes.set_title("all filters of the layer, as points", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return points, threads


def _line(axes, times: Sequence[int], values: Sequence[float], name: str, on: str) -> Any:
    """The score of the run, and the point that moves along it."""
    axes.plot(times, values, "-", color=BLUE, linewidth=1.3)
    if name == "accuracy":
        axes.set_ylim(0, 1.05)
    axes.set_title(f"{on} {name.replace('_', ' ')}", fontsize=10)
    axes.set_xlabel("step of the run; the cut is marked", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    (now,) = axes.plot(times[:1], values[:1], "o", color=BLUE, animated=True)
    return now


def _told(frame: Frame) -> str:
    if frame.is_cut:
        return "cut, one of each cluster is left"
    if not frame.left:
        return "the filters of a cluster are equal"
    told = f"{frame.left:.0%}" if frame.left > 0.005 else f"{frame.left:.0e}"
    return f"{told} of their distance is left"


def _scores(summary: dict[str, Any], rows: Rows) -> tuple[list[int], list[float]]:
    """The score over the steps of the run, with that of the base network and those around each cut."""
    key = f"csgd/{tested_on(summary).replace('-', '_')}_{task_of(summary)['score']}"
    found = [(rows.base_steps, 0, summary["base"]["accuracy"])]
    found += [(at, 0, row[key]) for at, row in rows.placed if key in row]
    cuts = zip(rows.cuts, summary["stages"], strict=True)
    found += [(at, 1, stage["verdict"]["accuracy_after_trim"]) for at, stage in cuts]
    times, _, values = zip(*sorted(found), strict=True)
    return list(times), list(values)


def _colours(clusters: Sequence[Sequence[int]]) -> list:
    """Of each slot that of its cluster; gray for one that is alone."""
    from matplotlib import colormaps

    found, palette, number = {}, colormaps["tab20"].colors[::2] + colormaps["Dark2"].colors, 0
    for part in sorted(clusters, key=len, reverse=True):
        colour = palette[number % len(palette)] if len(part) > 1 else GRAY
        number += len(part) > 1
        found |= dict.fromkeys(part, colour)
    return [found[slot] for slot in range(len(found))]


def _to_the_middle(places: NDArray, clusters: Sequence[Sequence[int]]) -> list[NDArray]:
    """From each filter to the mean of its cluster, by slot."""
    middles = np.empty_like(places)
    for part in clusters:
        middles[part] = places[part].mean(0)
    return list(np.stack([places, middles], 1))


def _laid(canvas: NDArray, tiles: NDArray, spots: dict[int, tuple[int, int]], slots: Sequence[int]) -> NDArray:
    picture = canvas.copy()
    for slot in slots:
        y, x = spots[slot]
        picture[y : y + tiles.shape[1], x : x + tiles.shape[2]] = tiles[slot]
    return picture
