"""The model card: what a pruned network is, what was proved of it, and how to use it."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from csgd.build import label
from csgd.report import table, verdict_table

CARD = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=False,  # it is Markdown, in which a command stays as it was typed
    trim_blocks=True,
    keep_trailing_newline=True,
)


def card(summary: dict[str, Any], sizes: dict[str, int]) -> str:
    """pruned.md of a finished run; `sizes` are the widths before the cut."""
    config = summary["config"]
    target, *_ = targets = [config[group]["_target_"] for group in ("model", "dataset")]
    own = [name.split(".")[0] for name in targets if not name.startswith(("csgd.", "torchvision.", "torch."))]
    is_own = target.split(".")[0] in own  # which does not run without the user's word
    return CARD.get_template("card.md.j2").render(
        name=label(config["model"]),
        dataset=label(config["dataset"]),
        target=target,
        summary=summary,
        verdict=verdict_table(summary),
        widths=table(
            ("layer", "width before", "width after"),
            [(name, sizes[name], width) for name, width in summary["widths"].items()],
        ),
        export=export_table(summary["export"]) if "export" in summary else "",
        allow=f', allow=["{own[0]}"]' if is_own else "",
        options="".join(f" --allow {name}" for name in dict.fromkeys(own)),
        versions=", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
    )


def export_table(export: dict[str, Any]) -> str:
    """Dense and pruned side by side: bytes, milliseconds, and the exported files with their check."""
    dense, pruned = (export["weight_bytes"][name] for name in ("dense", "pruned"))
    rows = [("weights", f"{dense / 1e6:.2f} MB", f"{pruned / 1e6:.2f} MB", f"{1 - pruned / dense:.1%} less")]
    for timed in export["latency"]:
        wide, narrow = timed["dense"], timed["pruned"]
        faster = f"{wide['median_ms'] / narrow['median_ms']:.2f} times as fast, {narrow['rounds']} rounds"
        rows.append((f"latency, batch {timed['batch']}", _milliseconds(wide), _milliseconds(narrow), faster))
    for name, file in export["files"].items():
        checked = f"differs from PyTorch by {file['relative_change']:.1e} of an image's spread"
        rows.append((name, "", f"{file['bytes'] / 1e6:.2f} MB", checked))
    return table((export["device"], "dense", "pruned", ""), rows)


def _milliseconds(timed: dict[str, float]) -> str:
    """Median, and half of what lies between the quartiles."""
    return f"{timed['median_ms']:.2f} ± {(timed['upper_quartile_ms'] - timed['lower_quartile_ms']) / 2:.2f} ms"
