"""The base network: from a file, from the cache, or trained."""

import hashlib
import inspect
import json
import logging
import sys
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

import csgd.data
import csgd.folders
import csgd.optim
import csgd.schedule
import csgd.seeds
import csgd.train
from csgd import ranks
from csgd.build import label, named
from csgd.checkpoint import load_weights, save_weights
from csgd.data import Data
from csgd.errors import InputError
from csgd.models import published_weights
from csgd.optim import CSGD
from csgd.pipeline.build import as_trained, scaler_of, versions
from csgd.pipeline.clock import Clock, bar_of
from csgd.pipeline.journal import Journal
from csgd.pipeline.launch import rank_count
from csgd.pipeline.phase import log_epoch, timetable_of, train_spec
from csgd.tracking import Tracker
from csgd.train import Learner, Sums, accuracy, predict, train

log = logging.getLogger("csgd")


def base_network(
    cfg: Any, model: nn.Module, data: Data, journal: Journal, tracker: Tracker, clock: Clock
) -> dict[str, Any]:
    """Loads the base network, from the file or the cache if it is there, or trains it."""
    pretrained = cfg.base.weights and _load(cfg, model)
    if pretrained:
        source = cfg.base.weights
    else:
        path = cached(cfg, model)
        path.parent.mkdir(parents=True, exist_ok=True)
        first = ranks.is_first()
        lock = FileLock(f"{path}.lock") if first else nullcontext()
        with lock:  # the jobs of a parallel sweep wait for the first one
            if weights := ranks.from_first(load_weights(path) if first and path.exists() else None):
                journal.take("base")
                model.load_state_dict(weights)
                log.info("base network: from the cache, %s", path)
            else:
                _train(cfg, model, data, journal, tracker, clock)
                if first:
                    save_weights(path, model.state_dict())
        source = str(path)
    measured = accuracy(*predict(model, data))
    log.info("base network: test accuracy %.4f", measured)
    return {"accuracy": measured, "source": source}


def weights_at_hand(cfg: Any, model: nn.Module) -> bool:
    """Loads the base network if that takes neither training nor a download; whether it did."""
    if cfg.base.weights:
        return not _published(cfg.base.weights) and _load(cfg, model)
    if (path := cached(cfg, model)).exists():
        model.load_state_dict(load_weights(path))
        return True
    return False


def cached(cfg: Any, model: nn.Module) -> Path:
    """Where a base network that was trained is kept."""
    name = f"{label(cfg.model)}-{label(cfg.dataset)}-s{cfg.seed}-{_key(cfg, model)}.safetensors"
    return Path(cfg.base.cache) / name


def _train(cfg: Any, model: nn.Module, data: Data, journal: Journal, tracker: Tracker, clock: Clock) -> None:
    schedule = cfg.schedule
    scaler = scaler_of(cfg, data.example.device)
    constants = dict(lr=schedule.base.lr, weight_decay=schedule.weight_decay)
    if schedule.base.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), **constants, fused=scaler is None)
    else:  # without clusters it is SGD, also for parameters whose first gradient comes later than that of others
        inertia = dict(momentum=schedule.momentum, nesterov=schedule.nesterov)
        optimizer = CSGD(model.parameters(), **constants, **inertia)
    timetable, done, sums = timetable_of(cfg, data, "base"), 0, Sums()
    learner = Learner(model, optimizer, as_trained(cfg, model), scaler)
    if saved := journal.take("base"):
        learner.load_state_dict(saved)
        done, sums = saved["step"], saved["sums"]
    clock.start(done)
    with bar_of(cfg, "base", range(done, timetable.steps)) as bar:
        for moment in train(learner, data, timetable, train_spec(cfg, "base"), range(done, timetable.steps), sums):
            bar.update()
            if moment.epoch_ends:
                test_accuracy = accuracy(*predict(model, data))
                clock.tick(moment.step)
                bar.set_description(f"base, {clock.ends()}", refresh=False)
                row = {"epoch": moment.epoch}
                log_epoch("base", moment, sums.shared(), test_accuracy, tracker, row, clock.seconds_left)
                sums.clear()
            if moment.epoch_ends or (cfg.checkpoint_every and moment.step % cfg.checkpoint_every == 0):
                journal.save("base", moment.step, learner.state_dict(), sums, tracker)


def _load(cfg: Any, model: nn.Module) -> bool:
    """Loads base.weights; True if they are all the network needs, False if its head has to be trained first."""
    weights, published = cfg.base.weights, _published(cfg.base.weights)
    state = published_weights(label(cfg.model), weights) if published else load_weights(Path(weights))
    own = model.state_dict()
    other = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    odd = sorted(own.keys() ^ state.keys())
    if not other and not odd:
        model.load_state_dict(state)
        return True
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not published or not all(
        any(key.startswith(f"{layer.split('.')[0]}.") for layer in head) for key in other + odd
    ):
        key = (other + odd)[0]
        raise InputError(f"base.weights '{weights}' are of another architecture than the model: '{key}' does not fit")
    fitting = {key: value for key, value in state.items() if key in own and key not in other}
    model.load_state_dict(fitting, strict=False)
    log.info(
        "base network: the head of %s does not fit %d classes and is trained anew", weights, own[other[-1]].size(0)
    )
    return False


def _published(weights: str) -> bool:
    """Whether base.weights is a name of published weights; a path otherwise."""
    path = Path(weights)
    return not path.exists() and path.suffix == "" and path.parent == Path()


def _key(cfg: Any, model: nn.Module) -> str:
    """A hash of everything that determines the base network."""
    shared = ("batch_size", "momentum", "nesterov", "weight_decay", "label_smoothing", "accumulation")
    schedule = {key: getattr(cfg.schedule, key) for key in shared}
    weights = cfg.base.weights
    parts = [cfg.model, cfg.dataset, schedule, asdict(cfg.schedule.base), cfg.seed, weights, versions()["torch"]]
    parts += [cfg.precision, cfg.compile]
    if (count := rank_count(cfg)) > 1:  # they see the statistics of batch norm of their own images
        parts += [count, cfg.distributed.sync_bn]
    parts += [str(next(model.parameters()).device.type), *_sources(cfg, model)]
    parts += [(name, value.shape) for name, value in model.state_dict().items() if isinstance(value, Tensor)]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:12]


def _sources(cfg: Any, model: nn.Module) -> list[str]:
    """The files that the network, each of its modules, its data and its training are written in."""
    targets = {group: getattr(cfg, group)["_target_"] for group in ("model", "dataset")}
    made = [named(group, target) for group, target in targets.items()]
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    written_in = [sys.modules.get(target.rpartition(".")[0]) for target in targets.values()]
    written_in += map(inspect.getmodule, [*made, *kinds])
    own = (csgd.data, csgd.folders, csgd.optim, csgd.schedule, csgd.seeds, csgd.train)
    files = {*own, *filter(None, written_in)}
    sources = []
    for file in sorted(files, key=lambda module: module.__name__):
        with suppress(OSError, TypeError):  # of a session without files, or of compiled code
            sources.append(inspect.getsource(file))
    return sources
