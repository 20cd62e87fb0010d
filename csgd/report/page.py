"""One page that tells a run, readable without a network: report.html."""

import base64
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from csgd.report.tables import baseline_note, cost_header, cost_rows, numeric, tested_on, verdict_rows

CAPTIONS = {
    "collapse": "The first layer that was cut, over the first stage. On the left its filters that are not alone in "
    "their cluster, those of one cluster on one field: the sum over their inputs, red above 0 and blue below. On the "
    "right all of them as points, in the plane in which they differ most at the start, with threads to the mean of "
    "their cluster.",
    "curves": "Score and loss over the steps of the run, and the cost of a step; of a pull also the deviation, beside "
    "what was forecast before the first batch. Below the red dotted line filters have collapsed: in units of the "
    "weights, in which the tolerance is told, what is left is smaller still. The gray one is how finely float32 can "
    "tell weights apart: the published pull comes to rest about there, while a Collapse makes members equal and ends "
    "at exactly 0.",
    "outputs": "What the network says of {on} images before the cut and after it, the worst image among "
    "them; and of every image how much its outputs changed, divided by their own spread (max − min).",
    "spaces": "Layers whose filters must move together share a box (a residual stream is one, however many layers add "
    "to it). An arrow is a layer that reads one box and writes another; those that follow from others are left out. "
    "Blue boxes were cut.",
    "filters": "The filters of the first layer that was cut, those of one cluster on one field. Of equal filters one "
    "is enough. Each picture in the scale of its own largest weight.",
    "sensitivity": "How much the loss grows where a layer alone is merged to a fraction of its channels, without "
    "training: what that layer can spare. All were narrowed up to one growth of the loss (the blue line on the scale), "
    "with which the budget is met; triangles are the widths that came of it. Between the fractions that were measured "
    "the growth is on a straight line, and a narrower width never counts less than a wider one.",
    "widths": "The width of every layer before and after.",
    "sizes": "How many filters became one.",
}
KINDS = {"collapse": "gif"}  # the others are PNG
PLAIN = ("collapse", "filters")  # whose black and white mean something, so that they stay as they are in the dark
NAMED = 100  # classes
PAGE = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def write_page(output_dir: Path) -> Path:
    """Writes report.html from summary.json, clusters.json and the pictures that are in report/."""
    summary = json.loads((output_dir / "summary.json").read_text("utf-8"))
    clusters = json.loads((output_dir / "clusters.json").read_text("utf-8"))
    pictures = {name: output_dir / "report" / f"{name}.{KINDS.get(name, 'png')}" for name in CAPTIONS}
    captions = {name: caption.replace("{on}", tested_on(summary)) for name, caption in CAPTIONS.items()}
    page = PAGE.get_template("page.html.j2").render(
        name=_name(summary["config"]),
        summary=summary,
        verdict_rows=verdict_rows(summary),
        note=baseline_note(summary),
        figures=[(name, _encoded(path), captions[name]) for name, path in pictures.items() if path.exists()],
        kinds=KINDS,
        plain=PLAIN,
        layer_header=cost_header(summary),
        layer_rows=cost_rows(summary, clusters),
        run=_run(summary),
        origin=_origin(summary),
        configuration="\n".join(_lines(summary["config"])),
        numeric=numeric,
    )
    path = output_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _name(config: Mapping[str, Any]) -> str:
    model, dataset = (config[group].get("name") or config[group]["_target_"] for group in ("model", "dataset"))
    return f"{model.rsplit('.', 1)[-1]} on {dataset.rsplit('.', 1)[-1]}, seed {config['seed']}"


def _run(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    data, config = summary["data"], summary["config"]["dataset"]
    name = (config.get("name") or config["_target_"]).rsplit(".", 1)[-1]
    size = "×".join(map(str, data["image"]))
    rows = [
        ("command", summary["command"] or "from Python, with the configuration below"),
        ("date", datetime.fromisoformat(summary["date"]).strftime("%d %B %Y, %H:%M %z")),
        ("data", f"{name}: {data['train']:,} images to train on and {_judged(summary)}, each {size}"),
    ]
    if data["classes"]:
        names = ", ".join(data["class_names"][:NAMED]) + (", …" if len(data["class_names"]) > NAMED else "")
        rows.append(("classes", f"{data['classes']}" + (f": {names}" if names else "")))
    if data["mean"]:
        mean, std = (", ".join(f"{value:.3f}" for value in data[key]) for key in ("mean", "std"))
        rows.append(("normalised", f"(image − mean) / std of each channel, mean {mean}, std {std}"))
    return [*rows, ("device", summary["device"])]


def _judged(summary: Mapping[str, Any]) -> str:
    held_out = summary["data"].get("held_out")
    return f"{held_out:,} held out of them to judge by" if held_out else f"{summary['data']['test']:,} to test"


def _encoded(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode()


def _origin(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    commit = summary["commit"] or "outside of a checkout"
    return [
        ("base network", summary["base"]["source"]),
        ("versions", versions),
        ("commit", commit),
    ]


def _lines(values: Mapping[str, Any], indent: str = "") -> list[str]:
    """Nested values as in a YAML file."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {'null' if value is None else json.dumps(value, ensure_ascii=False)}")
    return lines
