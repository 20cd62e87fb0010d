"""Widths that go by what each layer of the base network can spare: measured once, and kept beside it."""

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csgd import ranks
from csgd.checkpoint import write_json
from csgd.data import Batches
from csgd.errors import InputError, line_of
from csgd.folder import RunFolder
from csgd.graph.twin import keep_random_state, twin_of
from csgd.pipeline.base import cache_path, locked, weights_at_hand
from csgd.pipeline.deps import check_narrower, met
from csgd.pipeline.foresee import RunPlan, foresee, levelled
from csgd.pipeline.progress import Progress
from csgd.pipeline.provenance import versions
from csgd.pipeline.setup import Setup
from csgd.pipeline.ways import MEASURED, WAYS, batches_seen, some_batches
from csgd.sensitivity import sensitivity
from csgd.train import loss_of

log = logging.getLogger("csgd")


def settle(setup: Setup, progress: Progress) -> tuple[Setup, RunPlan]:
    """The setup and the plan of a run whose base network is there, with the widths that this asks for."""
    with progress.seconds.spent("cluster"):
        setup = settled(setup, progress.folder)
        progress.widths = setup.widths
        return setup, foresee(setup)


def settled(setup: Setup, folder: RunFolder) -> Setup:
    """With the widths that meet the budget by the sensitivity of the base network, which is there by now."""
    spec, measured = setup.spec, _shared(_of_base(setup))
    budget = met(spec.deps, setup.spaces, setup.model, setup.data.example, measured["changes"])
    check_narrower(setup.spaces, [budget.widths])
    if ranks.is_first():
        write_json(folder.sensitivity, measured | {"threshold": budget.threshold})
    return levelled(replace(setup, widths=[budget.widths], settled=True))


def _of_base(setup: Setup) -> Setup:
    """With the base network; of a run that trains none with that of another way, as it lies in base.cache."""
    if WAYS[setup.spec.cut.way].trained:
        return setup
    other = replace(setup, model=twin_of(setup.model))
    if ranks.is_first() and not weights_at_hand(other):
        raise InputError(
            f"deps.allot=sensitivity: method={setup.spec.cut.way} trains no base network, and base.cache holds none "
            "with these settings; a run by another method leaves one there"
        )
    return other


def _shared(setup: Setup) -> dict[str, Any]:
    """What merging each space alone does to the loss, on every rank: as it was kept, or measured and then kept.

    The others hear from the first rank after each loss, else they would give up on it.
    """
    path = ranks.from_first(_path(setup) if ranks.is_first() else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(Path(f"{path}.lock"), "sensitivity: another run is measuring it"):
        found = None
        if ranks.is_first() and path.exists():
            log.info("sensitivity: from the cache, %s", path)
            found = json.loads(path.read_text("utf-8"))
        elif ranks.is_first():
            found = _measured(setup)
            try:
                write_json(path, found)
            except OSError as error:  # a full disk: the run goes on all the same
                log.warning("sensitivity: could not be kept in base.cache: %s", line_of(error))
        while (told := ranks.from_first(found)) is None:
            pass
        return told


def _measured(setup: Setup) -> dict[str, Any]:
    """On images held out of the training set where the run holds some out, else on the first batches of an epoch: the
    test set is for the end."""
    how, model, told = setup.spec.clustering, setup.model, "held-out" if setup.spec.validation else "training"
    with keep_random_state(model):
        trained_on = list(some_batches(setup, images=MEASURED))
        batches = list(_first(setup.data.test_batches(), MEASURED)) if setup.spec.validation else trained_on
        count = sum(len(images) for images, _ in batches)

        def mean_loss(network: nn.Module) -> float:
            losses = (len(images) * loss_of(setup.data, network(images), targets) for images, targets in batches)
            mean = float(sum(losses)) / count
            ranks.from_first(None)
            return mean

        log.info("sensitivity: each layer merged alone at several widths, on %d %s images", count, told)
        seen = [images for images, _ in trained_on] if how.of == "outputs" else None
        changes = sensitivity(model, setup.spaces, mean_loss, of=how.of, seed=setup.spec.seed, data=seen)
    return {"images": count, "changes": changes}


def _first(batches: Batches, count: int) -> Batches:
    """Those with the first `count` images, the last one whole."""
    while count > 0 and (batch := next(batches, None)):
        yield batch
        count -= len(batch[0])


def _path(setup: Setup) -> Path:
    """Where in base.cache the sensitivities of these weights and spaces are kept, on these images, by this code."""
    spec, digest = setup.spec, hashlib.sha256()
    for name, value in setup.model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(name.encode() + value.cpu().flatten().view(torch.uint8).numpy().tobytes())
    seen = batches_seen(setup, MEASURED), ranks.own_share().ranks
    names = [space.name for space in setup.spaces if space.trimmable]
    digest.update(f"{spec.clustering.of} {seen} {spec.validation} {names} {versions()['csgd']}".encode())
    base = cache_path(spec, setup.model, setup.data)
    return base.with_name(f"{base.stem}-{digest.hexdigest()[:12]}.sensitivity.json")
