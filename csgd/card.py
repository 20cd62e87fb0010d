"""The model card: what a pruned network is, what was proved of it, and how to use it."""

from typing import Any

from csgd.build import label
from csgd.report import table, verdict_table


def card(summary: dict[str, Any], sizes: dict[str, int]) -> str:
    """pruned.md of a finished run; `sizes` are the widths before the cut."""
    config, cost = summary["config"], summary["cost"]
    target = config["model"]["_target_"]
    verdict = "LOSSLESS" if summary["verdict"]["lossless"] else "NOT LOSSLESS"
    targets = [config[group]["_target_"] for group in ("model", "dataset")]
    own = [name.split(".")[0] for name in targets if not name.startswith(("csgd.", "torchvision.", "torch."))]
    allow = (
        f', allow=["{own[0]}"]' if target.split(".")[0] in own else ""
    )  # the user's word, without which nothing runs
    options = "".join(f" --allow {name}" for name in dict.fromkeys(own))
    widths = [(name, sizes[name], width) for name, width in summary["widths"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    origin = f"commit `{summary['commit']}`" if summary["commit"] else "outside of a checkout"
    parts = [
        f"# {label(config['model'])} on {label(config['dataset'])}, pruned",
        f"`{target}` after Centripetal SGD (Ding et al., CVPR 2019): the filters of each cluster were trained into one "
        f"and the duplicates cut. {cost['params_after']:,} parameters are left of {cost['params_before']:,}. Made by",
        f"    {summary['command'] or 'csgd.pipeline.run, with the configuration in summary.json'}",
        f"## Verdict: {verdict}",
        verdict_table(summary),
        "## Widths",
        table(("layer", "width before", "width after"), widths),
        *(["## Export", export_table(summary["export"])] if "export" in summary else []),
        "## Use",
        "```python\n"
        "import csgd\n"
        "\n"
        f'model = csgd.load_pruned("path/to/this/folder"{allow})  # in eval mode, on the CPU\n'
        "logits = model(images)  # normalised as in csgd/data.py\n"
        "```",
        "`pruned.safetensors` and `pruned.json` are all it needs. "
        f"`python -m csgd.evaluate path/to/this/folder{options}` tests it again, on the dataset of the run "
        "or on another one.",
        "## Origin",
        f"Seed {summary['seed']}, on {summary['device']}, {origin}; {versions}. "
        f"Base network: `{summary['base']['source']}`.",
        "csgd is under the MIT licence; these weights are under the terms of the data and of the base network they "
        "come from.",
    ]
    return "\n\n".join(parts) + "\n"


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
