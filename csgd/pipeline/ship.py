"""What a run hands to other programs: the pruned network in their formats, its size and latency, and its card."""

import json
import logging
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from csgd import card, export
from csgd.build import build
from csgd.checkpoint import write_json
from csgd.errors import line_of
from csgd.folder import RunFolder
from csgd.pipeline.device import device_name, place
from csgd.pipeline.provenance import versions
from csgd.pipeline.setup import Setup
from csgd.pruned import DESCRIPTION, load_pruned, save_pruned

log = logging.getLogger("csgd")

FILES = {"onnx": "pruned.onnx", "torch": "pruned.pt2"}


def keep(setup: Setup, folder: Path, **facts: Any) -> None:
    """Writes the network as it is into a folder that loads; `facts` are told beside where it comes from.

    What was exported of other weights, as of an older run, is removed.
    """
    spec, data, older = setup.spec, setup.data, _weights_in(folder)
    facts |= {"seed": spec.seed, "versions": versions(), "commit": setup.commit, "dataset": spec.dataset}
    facts |= {"validation": spec.validation} if spec.validation else {}
    facts |= {"class_names": data.class_names, "mean": data.mean, "std": data.std}
    save_pruned(folder, setup.model, spec.model, data.example, data.num_classes, **facts)
    if _weights_in(folder) != older:
        for path in (path for name in FILES.values() for path in folder.glob(f"{name}*")):
            if path.is_file():
                path.unlink()


def _weights_in(folder: Path) -> str | None:
    """The SHA-256 of the weights that a folder describes."""
    with suppress(OSError, ValueError, KeyError):
        return json.loads((folder / DESCRIPTION).read_text("utf-8"))["sha256"]
    return None


def ship(setup: Setup, summary: dict[str, Any], folder: RunFolder) -> None:
    """Exports if that is asked for, adds to the summary what came of it, and writes the card.

    The run is done and saved: what fails here is reported, and nothing else.
    """
    kind = setup.spec.export
    if kind:
        try:
            summary["export"] = _exported(setup, kind, folder)
            write_json(folder.summary, summary)
            log.info("export\n\n%s\n", card.export_table(summary["export"]))
        except Exception as error:  # whatever a network of the user's raises when it is built anew
            log.warning("export=%s failed: %s", kind, line_of(error))
    try:
        told = card.card(summary, {space.name: space.size for space in setup.spaces})
        folder.card.write_text(told, "utf-8")
    except Exception as error:  # a card never loses a run
        log.warning("pruned.md could not be written: %s", line_of(error))


def _exported(setup: Setup, kind: str, folder: RunFolder) -> dict[str, Any]:
    """The files, and the saved network beside one as it was before the run: latency does not depend on the weights."""
    started, example = time.perf_counter(), setup.data.example
    wide = partial(build, "model", setup.spec.model, num_classes=setup.data.num_classes, image_size=example.size(-1))
    pruned, files = load_pruned(folder.path, wide()), {}
    for one in export.FORMATS[kind]:
        path = folder.path / FILES[one]
        try:
            change = export.export(one, pruned, example.cpu(), path)
        except Exception as error:  # whatever the exporters raise
            log.warning("%s could not be exported: %s", path.name, line_of(error))
            continue
        parts = folder.path.glob(f"{path.name}*")  # the weights of large networks lie in a file of their own
        files[path.name] = {"bytes": sum(part.stat().st_size for part in parts), "relative_change": change}
    models = {"dense": place(wide().eval(), example.device), "pruned": place(pruned, example.device)}
    images = {batch: example[[i % len(example) for i in range(batch)]] for batch in (1, setup.spec.batch_size)}
    return {
        "files": files,
        "weight_bytes": {name: export.weight_bytes(model) for name, model in models.items()},
        "latency": [{"batch": batch, **export.latency(models, images[batch])} for batch in images],
        "device": device_name(example.device),
        "seconds": time.perf_counter() - started,
    }
