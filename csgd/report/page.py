"""One page that tells a run, readable without a network: report.html."""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from csgd.report.tables import LAYER_HEADER, layer_rows, numeric, verdict_rows

CAPTIONS = {
    "curves": "Score and loss over the whole run; the deviation beside what was forecast before the first batch; "
    "the cost of a step. The cut is marked.",
    "filters": "The filters of the first layer that was cut, those of one cluster on one field. At the collapse they "
    "are equal, so that one of each cluster is enough. Each picture in the scale of its own largest weight.",
    "widths": "The width of every layer before and after.",
    "sizes": "How many filters were trained into one.",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2733; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem }
h1, h2 { line-height: 1.2; font-weight: 600 } h2 { margin-top: 2.5rem }
.verdict { padding: .6rem 1rem; border-left: .4rem solid; font-weight: 600 }
.lossless { color: #17603a; background: #e9f6ee } .lossy { color: #94231a; background: #fcecea }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #dde3e9; text-align: left; vertical-align: top }
.wide { overflow-x: auto } .number { text-align: right } td:first-child { white-space: nowrap }
figure { margin: 1.5rem 0; break-inside: avoid } img { max-width: 100%; height: auto } figcaption { color: #51606e }
pre { background: #f5f7f9; padding: 1rem; overflow-x: auto; font-size: .85rem; white-space: pre-wrap }
@media print { body { margin: 0; max-width: none } pre { font-size: .7rem } }
"""


def write_page(output_dir: Path) -> Path:
    """Writes report.html from summary.json, clusters.json and the pictures that are in report/."""
    summary = json.loads((output_dir / "summary.json").read_text())
    clusters = json.loads((output_dir / "clusters.json").read_text())
    title = f"{_name(summary['config'])}: {_fate(summary)}"
    parts = [
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(_name(summary['config']))}</h1>",
        _verdict(summary),
        _table(("", "value", ""), verdict_rows(summary)),
        *(_figure(output_dir / "report" / f"{name}.png", caption) for name, caption in CAPTIONS.items()),
        "<h2>Layers</h2>",
        _table(LAYER_HEADER, layer_rows(summary["layers"], clusters)),
        "<h2>Where it comes from</h2>",
        _table(("", ""), _origin(summary)),
        "<h2>Configuration</h2>",
        "<pre>" + escape("\n".join(_lines(summary["config"]))) + "</pre>\n</body>\n</html>\n",
    ]
    path = output_dir / "report.html"
    path.write_text("\n".join(filter(None, parts)), encoding="utf-8")
    return path


def _name(config: Mapping[str, Any]) -> str:
    model, dataset = (config[group].get("name") or config[group]["_target_"] for group in ("model", "dataset"))
    return f"{model.rsplit('.', 1)[-1]} on {dataset.rsplit('.', 1)[-1]}, seed {config['seed']}"


def _fate(summary: Mapping[str, Any]) -> str:
    return "lossless" if summary["verdict"]["lossless"] else "not lossless"


def _verdict(summary: Mapping[str, Any]) -> str:
    verdict, cost = summary["verdict"], summary["cost"]
    saved = 1 - cost["macs_after"] / cost["macs_before"]
    if verdict["lossless"]:
        change = f"{verdict['relative_logit_change']:.1e}"
        told = f"LOSSLESS: the cut changed no image's outputs by more than {change} of their spread"
    elif verdict["collapsed"]:
        told = "NOT LOSSLESS: the cut changed the outputs"
    else:
        told = "NOT LOSSLESS: the filters had not collapsed, or what follows them"
    kind = "lossless" if verdict["lossless"] else "lossy"
    return f'<p class="verdict {kind}">{escape(told)}, and saved {saved:.1%} of the multiply-accumulates.</p>'


def _figure(path: Path, caption: str) -> str:
    if not path.exists():
        return ""
    image = base64.b64encode(path.read_bytes()).decode()
    shown = f'<img alt="{escape(path.stem)}" src="data:image/png;base64,{image}">'
    return f"<figure>\n{shown}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    kinds = [' class="number"' if right and any(header) else "" for right in numeric(header, rows)]

    def line(tag: str, row: Sequence[object]) -> str:
        cells = (f"<{tag}{kind}>{escape(str(cell))}</{tag}>" for cell, kind in zip(row, kinds, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    head = [line("th", header)] if any(header) else []
    lines = "\n".join(head + [line("td", row) for row in rows])
    return f'<div class="wide"><table>\n{lines}\n</table></div>'


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
