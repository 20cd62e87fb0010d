"""The base network: from a file, from the cache, or trained."""

import hashlib
import inspect
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor, nn

from csgd import folders, ranks
from csgd.build import label, named
from csgd.checkpoint import load_weights, save_weights
from csgd.data import Data, image_folder
from csgd.errors import InputError, line_of
from csgd.models import published_weights
from csgd.pipeline.launch import rank_count
from csgd.pipeline.learners import base_learner
from csgd.pipeline.progress import BaseResult, Part, Progress
from csgd.pipeline.provenance import is_free, versions
from csgd.pipeline.setup import Setup
from csgd.pipeline.spec import RunSpec
from csgd.pipeline.watch import Watch
from csgd.pipeline.ways import WAYS
from csgd.train import measured

log = logging.getLogger("csgd")

SIGN_OF_LIFE = 60  # seconds; ranks wait for each other for some minutes

OWN = (  # modules of csgd that a base network is trained by
    "centripetal", "data", "folders", "optim", "ranks", "schedule", "seeds", "stacks", "train",
    "pipeline.device", "pipeline.learners", "pipeline.spec",
)  # fmt: skip


def base(setup: Setup, progress: Progress, watch: Watch) -> None:
    """Loads the base network, from the file or the cache if it is there, or trains it, if the run needs one."""
    with progress.seconds.spent("base"):
        if not WAYS[setup.spec.cut.way].trained:
            source = "not trained"
        elif has_weights(setup):
            source = setup.spec.base.weights
            log.info("base network: from base.weights, so schedule.base is left out")
        else:
            source = _cached_or_trained(setup, progress, watch)
        score = measured(setup.model, setup.data)
    log.info("base network: %s %s %.4f", setup.spec.tested_on, setup.data.task["score"], score)
    progress.base = BaseResult(score, source)
    progress.sums.clear()  # of a training that was killed, where another run has left its weights meanwhile
    progress.part, progress.step, progress.learner = Part.BETWEEN, 0, None


def has_weights(setup: Setup) -> bool:
    """Loads base.weights if they are given; whether they are all that the network needs."""
    return bool(setup.spec.base.weights) and _load(setup.spec, setup.model, setup.data.num_classes)


def weights_at_hand(setup: Setup) -> bool:
    """Loads the base network if that takes neither training nor a download; whether it did."""
    if setup.spec.base.weights:
        return not _published(setup.spec.base.weights) and has_weights(setup)
    if (path := cache_path(setup.spec, setup.model, setup.data)).exists():
        setup.model.load_state_dict(load_weights(path))
        return True
    return False


def cache_path(spec: RunSpec, model: nn.Module, data: Data) -> Path:
    """Where a base network that was trained on these data is kept."""
    name = f"{label(spec.model)}-{label(spec.dataset)}-s{spec.seed}-{_key(spec, model, data)}.safetensors"
    return Path(spec.base.cache) / name


def _cached_or_trained(setup: Setup, progress: Progress, watch: Watch) -> str:
    """The path in the cache, where the weights then are."""
    first = ranks.is_first()
    path = ranks.from_first(cache_path(setup.spec, setup.model, setup.data) if first else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The jobs of a parallel sweep wait for the first one.
    with locked(Path(f"{path}.lock"), "base network: another run is training it"):
        if weights := ranks.from_first(load_weights(path) if first and path.exists() else None):
            setup.model.load_state_dict(weights)
            log.info("base network: from the cache, %s", path)
        else:
            _train(setup, progress, watch)
            if first:
                try:
                    save_weights(path, setup.model.state_dict())
                except Exception as error:  # a full disk: the run has its network all the same
                    log.warning("base network: could not be kept in base.cache: %s", line_of(error))
    return str(path)


@contextmanager
def locked(path: Path, waits: str) -> Iterator[None]:
    """Within it rank 0 holds a lock; the others hear from it while it waits, else they would give up on it.

    waits  the line that is told meanwhile
    """
    lock = FileLock(path)

    def tried() -> bool:
        with suppress(Timeout):
            lock.acquire(timeout=SIGN_OF_LIFE)
        return lock.is_locked

    while not ranks.from_first(tried() if ranks.is_first() else None):
        log.info(waits)
    try:
        yield
    finally:
        lock.release()


def _train(setup: Setup, progress: Progress, watch: Watch) -> None:
    progress.learner = progress.learner or base_learner(setup)
    watch.starts(setup, progress)
    for moment in progress.train(setup, setup.base, setup.spec.base.train):
        watch.after(setup, progress, moment)


def _load(spec: RunSpec, model: nn.Module, num_classes: int) -> bool:
    """Loads base.weights; True if they are all the network needs, False if its head has to be trained first."""
    weights, published = spec.base.weights, _published(spec.base.weights)
    state = published_weights(label(spec.model), weights) if published else load_weights(Path(weights))
    if broken := next((key for key, value in state.items() if not value.isfinite().all()), None):
        raise InputError(f"base.weights '{weights}' hold NaN or infinity in '{broken}'")
    own = model.state_dict()
    mismatched = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    one_sided = sorted(own.keys() ^ state.keys())
    if not mismatched and not one_sided:
        model.load_state_dict(state)
        return True
    rows = all(own[k].shape[1:] == state[k].shape[1:] and own[k].shape[:1] == (num_classes,) for k in mismatched)
    if not published or one_sided or not rows:  # a head has a row for each class
        key = (mismatched + one_sided)[0]
        raise InputError(f"base.weights '{weights}' are of another architecture than the model: '{key}' does not fit")
    fitting = {key: value for key, value in state.items() if key in own and key not in mismatched}
    model.load_state_dict(fitting, strict=False)
    log.info("base network: %s of %s do not fit %d classes, trained anew", ", ".join(mismatched), weights, num_classes)
    return False


def _published(weights: str) -> bool:
    """Whether base.weights is a name of published weights; a path otherwise."""
    path = Path(weights)
    return not path.exists() and path.suffix == "" and path.parent == Path()


def _key(spec: RunSpec, model: nn.Module, data: Data) -> str:
    """A hash of everything that determines the base network."""
    sgd, how = spec.sgd, spec.base.train
    dataset = {key: value for key, value in spec.dataset.items() if not is_free(f"dataset.{key}")}
    parts = [spec.model, dataset, _contents(spec.dataset, data), spec.seed, spec.batch_size, spec.base.weights]
    parts += [asdict(spec.base.rates), asdict(sgd), how.label_smoothing, how.accumulation]
    parts += [str(how.precision), spec.machine.compile, versions()["torch"]]
    if (count := rank_count(spec.machine)) > 1:  # they see the statistics of batch norm of their own images
        parts += [count, spec.machine.sync_bn]
    parts += [str(next(model.parameters()).device.type), *_sources(spec, model)]
    parts += [(name, value.shape) for name, value in model.state_dict().items() if isinstance(value, Tensor)]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:12]


def _contents(dataset: Mapping[str, Any], data: Data) -> list:
    """What a dataset holds, beside its settings: its sizes and two of its images; all files of a folder of images."""
    images = hashlib.sha256(data.example.cpu().contiguous().numpy().tobytes()).hexdigest()
    files = folders.stamp_of(Path(dataset["root"])) if named("dataset", dataset["_target_"]) is image_folder else []
    return [data.num_classes, data.train_size, data.test_size, data.steps_per_epoch, images, files]


def _sources(spec: RunSpec, model: nn.Module) -> list[str]:
    """The files that the network, each of its modules, its data and its training are written in."""
    targets = {"model": spec.model["_target_"], "dataset": spec.dataset["_target_"]}
    made = [named(group, target) for group, target in targets.items()]
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    written_in = [sys.modules.get(target.rpartition(".")[0]) for target in targets.values()]
    written_in += map(inspect.getmodule, [*made, *kinds])
    files = {*(sys.modules[f"csgd.{name}"] for name in OWN), *filter(None, written_in)}
    sources = []
    for file in sorted(files, key=lambda module: module.__name__):
        with suppress(OSError, TypeError):  # of a session without files, or of compiled code
            sources.append(inspect.getsource(file))
    return sources
