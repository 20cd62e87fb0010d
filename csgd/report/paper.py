"""The paper that pictures are drawn on: sizes, colours, files."""

import json
from pathlib import Path
from typing import Any

BLUE, GRAY, RED = "tab:blue", "tab:gray", "tab:red"
PALE = "#d4dae1"


def figure_of(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure, output_dir: Path, name: str) -> Path:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path = output_dir / "report" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def summary_of(output_dir: Path) -> dict[str, Any]:
    return json.loads((output_dir / "summary.json").read_text("utf-8"))
