"""What a run starts from; everything that can be refused before a step is taken is refused here."""

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from csgd import ranks
from csgd.build import build, label
from csgd.data import Data
from csgd.errors import InputError
from csgd.export import check_packages
from csgd.folders import listed
from csgd.graph import ChannelSpace, Kind, conditions
from csgd.graph.twin import keep_random_state, twin_of
from csgd.optim import check_stability
from csgd.pipeline.by_layer import relations
from csgd.pipeline.deps import stages_of
from csgd.pipeline.device import check_compiler, check_fit, check_task, device_name, device_of, place
from csgd.pipeline.launch import rank_count
from csgd.pipeline.provenance import commit
from csgd.pipeline.spec import RunSpec, timetable_of
from csgd.schedule import Timetable
from csgd.seeds import seed_all
from csgd.trial import find_spaces
from csgd.verify import count_params

log = logging.getLogger("csgd")


@dataclass(frozen=True)
class Setup:
    """The network, its data and its two trainings; its channel spaces before the first cut, and each stage's widths.

    settled  whether the widths are those of the run; else they cost as much, and go evenly by size until the base
             network can tell what each layer can spare
    commit   of the code, as the run begins
    began, sought  when its preparation began, and the search for its spaces
    """

    spec: RunSpec
    model: nn.Module
    data: Data
    base: Timetable
    csgd: Timetable
    spaces: list[ChannelSpace]
    widths: list[dict[str, int]]
    settled: bool
    commit: str | None
    began: float
    sought: float

    @property
    def finds_again(self) -> bool:
        """Whether the spaces of a stage need the trial cut again, which finds integers that follow."""
        return any(ref.role == "size" for space in self.spaces for ref in space.refs)

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Every channel space with its width before the run and after it, the layers that move together in it and the
        spaces that read it, as plain JSON."""
        after = self.widths[-1]
        return [
            {
                "name": s.name,
                "before": s.size,
                "after": after.get(s.name, s.size),
                "pinned": list(s.pinned),
                "conditions": [] if s.pinned else [str(condition) for condition in s.conditions],
            }
            | related
            for s, related in zip(self.spaces, relations(self.spaces), strict=True)
        ]


def prepare(spec: RunSpec, widths: list[dict[str, int]] | None = None) -> Setup:
    """InputError for what cannot be run: device, packages, strengths, data, network, batches, widths.

    widths  of each stage, of a run that goes on and has settled them
    """
    began, device = time.perf_counter(), device_of(spec.machine.device)
    if spec.export:
        check_packages(spec.export)
    if spec.machine.compile:
        check_compiler(device)
    check_strengths(spec)
    seed_all(spec.seed)  # a dataset of the user's may draw its split
    data = dataset_of(spec, device)
    seed_all(spec.seed)
    model = build("model", spec.model, num_classes=data.num_classes, image_size=data.example.size(-1))
    model = place(model, device, spec.machine.precision)
    check_fit(model, data)
    tell_task(spec, model, data)
    check_task(model, data, spec.pull.train.label_smoothing)
    check_batches(spec, model, data)
    if spec.machine.sync_bn and ranks.own_share().ranks > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    base = timetable_of(spec.base.rates, data.steps_per_epoch)
    csgd = timetable_of(spec.pull.rates, data.steps_per_epoch, spec.pull)
    sought, spaces = time.perf_counter(), spaces_of(model, data.example, published=spec.pull.published is not None)
    settled = bool(widths) or spec.deps.allot != "sensitivity"
    widths = widths or stages_of(spec.deps, spaces, model, data.example)
    return Setup(spec, model, data, base, csgd, spaces, widths, settled, commit(), began, sought)


def tell_task(spec: RunSpec, model: nn.Module, data: Data) -> None:
    """As soon as it is known: the search for channel spaces takes its time."""
    shape = "×".join(map(str, data.example.shape[1:]))
    classes = f", {data.num_classes} classes" if data.num_classes else ""
    names = f" ({listed(data.class_names)})" if data.class_names else ""
    device = device_name(data.example.device)
    log.info("network: %s, %s parameters, on %s", label(spec.model), f"{count_params(model):,}", device)
    sizes = data.train_size, data.test_size
    tested = "held out of them to judge by" if spec.validation else "to test"
    told = label(spec.dataset), *sizes, tested, shape, classes, names
    log.info("data: %s, %d images to train on and %d %s, %s%s%s", *told)


def dataset_of(spec: RunSpec, device: torch.device) -> Data:
    share = ranks.own_share()
    offered = dict(batch_size=spec.batch_size, seed=spec.seed, device=device, share=share)
    data = build("dataset", spec.dataset, **offered, needed=["share"] if share.ranks > 1 else [])
    if not isinstance(data, Data):
        raise InputError(f"dataset._target_ must make a csgd.data.Data, got {type(data).__name__}")
    if spec.validation and data.held_out is None:
        raise InputError("validation: dataset._target_ makes a Data without held_out, from which none can be taken")
    if spec.validation:
        data = data.held_out(spec.validation)
        if data.train_size < 2:
            raise InputError(f"validation={spec.validation:g} leaves {data.train_size} training image, 2 are the least")
        if spec.base.weights:
            told = "validation: base.weights '%s' may have been trained on images held out here: scores may be too good"
            log.warning(told, spec.base.weights)
    if not data.example.isfinite().all():
        raise InputError("dataset: its first images hold NaN or infinity")
    return data


def check_strengths(spec: RunSpec) -> None:
    """F6, before anything is built: the strengths under the highest learning rate of the schedule."""
    sgd, pull, published = spec.sgd, spec.pull, spec.pull.published
    if published is None or published.strength is None:
        return
    strength = published.strength
    check_stability(pull.rates.lr, strength, sgd.weight_decay, sgd.momentum, sgd.nesterov)
    lr, weak = pull.rates.lr * max(1.0, sgd.bias_lr_factor), published.vector_ratio * strength
    check_stability(lr, weak, sgd.weight_decay_vectors or 0.0, sgd.momentum, sgd.nesterov)


def check_batches(spec: RunSpec, model: nn.Module, data: Data) -> None:
    """InputError if the smallest batch of a run leaves a rank with less than the two images that batch norm needs, or
    is a single image on which this network cannot be trained."""
    size, count = spec.batch_size, rank_count(spec.machine)
    left = data.train_size % size
    longest = max(timetable_of(s.rates, data.steps_per_epoch).steps_per_epoch for s in (spec.base, spec.pull))
    smallest = left if left and longest * size > data.train_size else size
    leaves = f"schedule.batch_size={size} leaves a last batch of {smallest} of the {data.train_size} images, "
    if count > 1 and smallest < 2 * count:
        raise InputError(f"{leaves}{count} ranks need at least {2 * count}")
    if smallest > 1:
        return
    with torch.no_grad(), keep_random_state(model):
        try:
            twin_of(model).train()(data.example[:1])
        except Exception as error:  # whatever a network raises on a single image
            raise InputError(f"{leaves}on which this network cannot be trained: {error}") from None


def spaces_of(model: nn.Module, example: Tensor, trial: bool = True, published: bool = True) -> list[ChannelSpace]:
    """The channel spaces of a run: those stay whole that the published pull, if it is used, does not reach."""
    spaces = find_spaces(model, example, trial)
    if not published:
        return spaces
    out_of_reach = (
        (space.name, condition)
        for space in spaces
        for condition in space.conditions
        if condition.kind is Kind.ONLY_COLLAPSE
    )
    conditions.pin(spaces, {name: f"training does not change {condition.why}" for name, condition in out_of_reach})
    return spaces
