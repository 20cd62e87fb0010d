"""One page that tells a run, readable without a network: report.html."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from csgd.report.tables import LAYER_HEADER, layer_rows, numeric, verdict_rows

CAPTIONS = {
    "curves": "Score and loss over the whole run; the deviation beside what was forecast before the first batch; "
    "the cost of a step. The cut is marked.",
    "filters": "The filters of the first layer that was cut, those of one cluster on one field. At the collapse they "
    "are equal, so that one of each cluster is enough. Each picture in the scale of its own largest weight.",
    "widths": "The width of every layer before and after.",
    "sizes": "How many filters were trained into one.",
}
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
    summary = json.loads((output_dir / "summary.json").read_text())
    clusters = json.loads((output_dir / "clusters.json").read_text())
    pictures = {name: output_dir / "report" / f"{name}.png" for name in CAPTIONS}
    page = PAGE.get_template("page.html.j2").render(
        name=_name(summary["config"]),
        summary=summary,
        verdict_rows=verdict_rows(summary),
        figures=[(name, _encoded(path), CAPTIONS[name]) for name, path in pictures.items() if path.exists()],
        layer_header=LAYER_HEADER,
        layer_rows=layer_rows(summary["layers"], clusters),
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


def _encoded(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode()


def _origin(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    commit = summary["commit"] or "outside of a checkout"
    return [
        ("base network", summary["base"]["source"]),
        ("device", summary["device"]),
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
