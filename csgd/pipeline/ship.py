"""What a run hands to other programs: the pruned network in their formats, its size and latency, and its card."""

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

from csgd import card, export
from csgd.build import build
from csgd.checkpoint import write_json
from csgd.data import Data
from csgd.errors import line_of
from csgd.pipeline.build import device_name, placed
from csgd.pruned import load_pruned

log = logging.getLogger("csgd")

FILES = {"onnx": "pruned.onnx", "torch": "pruned.pt2"}


def ship(cfg: Any, data: Data, summary: dict[str, Any], sizes: dict[str, int], output_dir: Path) -> None:
    """Exports if cfg.export says so, adds to the summary what came of it, and writes the card.

    The run is done and saved: what fails here is reported, and nothing else.
    """
    if cfg.export:
        try:
            summary["export"] = _exported(cfg, data, output_dir)
            write_json(output_dir / "summary.json", summary)
            log.info("export\n\n%s\n", card.export_table(summary["export"]))
        except Exception as error:  # whatever a network of the user's raises when it is built anew
            log.warning("export=%s failed: %s", cfg.export, line_of(error))
    try:
        (output_dir / "pruned.md").write_text(card.card(summary, sizes))
    except Exception as error:  # a card never loses a run
        log.warning("pruned.md could not be written: %s", line_of(error))


def _exported(cfg: Any, data: Data, output_dir: Path) -> dict[str, Any]:
    """The files, and the saved network beside one as it was before the run: latency does not depend on the weights."""
    started = time.perf_counter()
    device, size = data.example.device, data.example.size(-1)
    wide = partial(build, "model", cfg.model, num_classes=data.num_classes, image_size=size)
    pruned, files = load_pruned(output_dir, wide()), {}
    for kind in export.FORMATS[cfg.export]:
        path = output_dir / FILES[kind]
        try:
            change = export.export(kind, pruned, data.example.cpu(), path)
        except Exception as error:  # whatever the exporters raise
            log.warning("%s could not be exported: %s", path.name, line_of(error))
            continue
        parts = output_dir.glob(f"{path.name}*")  # the weights of large networks lie in a file of their own
        files[path.name] = {"bytes": sum(part.stat().st_size for part in parts), "relative_change": change}
    models = {"dense": placed(wide().eval(), device), "pruned": placed(pruned, device)}
    example, batches = data.example, (1, cfg.schedule.batch_size)
    images = {batch: example[[i % len(example) for i in range(batch)]] for batch in batches}
    return {
        "files": files,
        "weight_bytes": {name: export.weight_bytes(model) for name, model in models.items()},
        "latency": [{"batch": batch, **export.latency(models, images[batch])} for batch in batches],
        "device": device_name(device),
        "seconds": time.perf_counter() - started,
    }
