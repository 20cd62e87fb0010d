"""The training loop: the same one for the base network (SGD) and for C-SGD."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import islice, zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.swa_utils import AveragedModel

from csgd import ranks
from csgd.collapse import Collapse
from csgd.data import Batches, Data
from csgd.errors import InputError, RateError
from csgd.graph.twin import tensors_in
from csgd.optim import CSGD, set_lr, set_ramp
from csgd.plan import COLLAPSED
from csgd.schedule import Timetable
from csgd.seeds import random_state, seed_all, set_random_state

CHECK_EVERY = 16  # steps between two looks at the losses; a look waits for the device
AUXILIARY_WEIGHT = 0.3  # of the loss of an auxiliary head (Szegedy et al., 2015)


class DivergedError(RateError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class TrainSpec:
    """How a batch is taken.

    clip_norm            caps the norm of the gradient (fact F9: the forecast holds all the same)
    label_smoothing      the share of a label that is spread evenly over all classes (Szegedy et al., 2016)
    accumulation         parts in which a batch goes through the network, or as many as have two images; batch norm sees
                         one part at a time
    precision            of the passes through the network, under autocast if it has 16 bits; parameters, gradients and
                         their update stay what they are
    compare_ranks_every  steps between two comparisons of the parameters of all ranks, bit by bit
    """

    seed: int
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    accumulation: int = 1
    precision: torch.dtype = torch.float32
    compare_ranks_every: int | None = None


@dataclass
class Learner:
    """What a step of training changes, with torch's protocol of state_dicts.

    network  `model` as it is called, with the same parameters: compiled, or one of `ranks.parallel`
    scaler    of the gradients, for float16; a step that it leaves out for an overflow is one in which nothing is pulled
    average   of the weights, which follows them
    collapse  hooks of the optimizer that pull, up to the cut
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    network: nn.Module
    scaler: GradScaler | None = None
    average: AveragedModel | None = None
    collapse: Collapse | None = None

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> "Learner":
        """A network that is called as it is."""
        return cls(model, optimizer, model)

    def share_buffers(self) -> None:
        """Gives every rank the running statistics of rank 0."""
        ranks.share_buffers(self.model)
        if self.average:
            ranks.share_buffers(self.average)

    def deviations(self) -> dict[str, Tensor]:
        """Σ‖W − ΓW‖² of each group of parameters that is pulled; of none once they are cut."""
        if self.collapse:
            return {COLLAPSED: self.collapse.deviation()}
        if not isinstance(self.optimizer, CSGD):
            return {}
        return {group["name"]: self.optimizer.deviation(group) for group in self.optimizer.clustered_groups()}

    def state_dict(self) -> dict[str, Any]:
        return {key: part if part is None else part.state_dict() for key, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, part in self._parts().items():
            if part is not None:
                part.load_state_dict(state[key])

    def _parts(self) -> dict[str, Any]:
        keys = ("model", "optimizer", "scaler", "average", "collapse")
        return {key: getattr(self, key) for key in keys}


@dataclass
class Sums:
    """What the steps since the last `clear` have measured on this rank; `shared` is of all ranks.

    loss       of the steps, each the mean over its batch;  hits, images  over all batches; 0 hits if the data have a
               score of their own
    seconds    of the steps alone, with the loading of their images
    unchecked  losses that have not been looked at, as a look waits for the device; `clear` leaves them

    Another number of a step is one more field, which `train` adds to by its name.
    """

    loss: Tensor | float = 0.0
    hits: Tensor | float = 0.0
    images: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    unchecked: list[Tensor] = field(default_factory=list)

    @classmethod
    def over_ranks(cls) -> list[str]:
        """The fields that `shared` sums over all ranks; the others are of this one."""
        return [one.name for one in fields(cls) if one.name not in ("steps", "seconds", "unchecked")]

    def add(self, loss: Tensor, **others: Tensor | float) -> None:
        """What a step has measured, by the names of the fields."""
        self.unchecked.append(loss)
        measured = {"loss": loss.double() / ranks.own_share().ranks, "steps": 1, **others}
        for name, value in measured.items():
            setattr(self, name, getattr(self, name) + value)

    def check(self, step: int) -> None:
        """DivergedError, after `step` steps, that names the one at which the loss stopped being a number."""
        if not self.unchecked:
            return
        finite, first = torch.stack(self.unchecked).isfinite(), step - len(self.unchecked)
        if not finite.all():
            at = first + int(finite.long().argmin())
            why = "a lower learning rate is needed, or images that hold neither NaN nor infinity"
            if at == 0:
                why = "no step was taken, so the images or the weights at the start hold NaN or infinity"
            raise DivergedError(f"the loss at step {at} is not a number: {why}")
        self.unchecked.clear()

    def shared(self) -> "Sums":
        """The sums over all ranks as plain numbers, the same on each; to be called on all of them."""
        names = self.over_ranks()
        own = torch.tensor([float(getattr(self, name)) for name in names], dtype=torch.float64)
        return replace(self, **dict(zip(names, ranks.total(own).tolist(), strict=True)), unchecked=[])

    def clear(self) -> None:
        vars(self).update(vars(Sums(unchecked=self.unchecked)))

    @property
    def mean_loss(self) -> float:
        return float(self.loss) / self.steps

    @property
    def accuracy(self) -> float:
        return float(self.hits) / self.images

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps


@dataclass(frozen=True)
class Moment:
    """Where a training is: after `step` steps, the last of which was of epoch 1, 2, … and had this learning rate."""

    step: int
    epoch: int
    epoch_ends: bool
    lr: float


def train(
    learner: Learner, data: Data, timetable: Timetable, spec: TrainSpec, steps: range, sums: Sums | None = None
) -> Iterator[Moment]:
    """Takes those steps of the timetable, and yields after each, so that the caller tests, logs, saves and leaves.

    Data and random state of an epoch are fixed by (seed, epoch of the run); `steps` that start within one go on with
    the random state of now.  What the steps measure is added to `sums`, which the caller reads and clears.
    DivergedError names the step at which the loss stopped being a number; the weights are then lost.

    A batch goes through the network in parts whose gradients add up to that of its mean loss.  A `scaler` has its
    factor out of the gradients before they are clipped and merged.

    Several ranks, whose network is one of `ranks.parallel`, take the steps that one would take with the same batches;
    where an epoch or `steps` end, all have the statistics of batch norm of rank 0.

    InputError if the data give fewer batches than the timetable has steps.
    """
    sums, per_epoch = sums or Sums(), timetable.steps_per_epoch
    for epoch in range(steps.start // per_epoch, -(-steps.stop // per_epoch)):
        first, last = max(steps.start, epoch * per_epoch), min(steps.stop, (epoch + 1) * per_epoch)
        began, done = time.perf_counter(), first
        learner.network.train()
        drawn = epoch + timetable.epochs_before
        for images, labels in islice(_batches(data, drawn, first - epoch * per_epoch, spec.seed), last - first):
            if not learner.model.training:  # the caller has tested it
                learner.network.train()
            loss, hits = _passes(learner, data, (images, labels), spec)
            _descend(learner, timetable, done, spec.clip_norm)
            done += 1
            if spec.compare_ranks_every and done % spec.compare_ranks_every == 0:
                ranks.check_equal(learner.model, done)
            sums.add(loss, hits=hits, images=labels.numel())
            if len(sums.unchecked) >= CHECK_EVERY or done == last:
                sums.check(done)
            if done == last:
                learner.share_buffers()
            sums.seconds += time.perf_counter() - began
            ends = done == min((epoch + 1) * per_epoch, timetable.steps)
            yield Moment(done, epoch + 1, ends, timetable.learning_rates[done - 1])
            began = time.perf_counter()
        if done < last:
            left = f"{done - epoch * per_epoch} batches of epoch {epoch + 1}, {per_epoch} were to come"
            raise InputError(f"the data gave {left}")


def _batches(data: Data, epoch: int, skipped: int, seed: int) -> Batches:
    """The batches of an epoch, but for the first ones, with which its random state is past."""
    now = random_state() if skipped else None
    seed_all(seed * 1_000_003 + epoch + ranks.own_share().offset)
    batches = data.train_batches(epoch)
    if now is not None:
        deque(islice(batches, skipped), maxlen=0)
        set_random_state(now)
    return batches


def _descend(learner: Learner, timetable: Timetable, step: int, clip_norm: float | None) -> None:
    """The update that the gradients of a batch ask for."""
    optimizer, scaler = learner.optimizer, learner.scaler
    if scaler:
        scaler.unscale_(optimizer)
    if clip_norm:
        nn.utils.clip_grad_norm_(learner.model.parameters(), clip_norm)
    set_lr(optimizer, timetable.learning_rates[step])
    if timetable.ramp is not None:
        set_ramp(optimizer, timetable.ramp[step])
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if learner.average:
        learner.average.update_parameters(learner.model)


def _passes(learner: Learner, data: Data, batch: tuple[Tensor, Tensor], spec: TrainSpec) -> tuple[Tensor, Tensor]:
    """Adds the gradients of a batch, of which this rank has [n, …] images; what they add to the loss, and the hits.

    The mean over ranks of that loss is the mean over the images of all, and so are the gradients.
    """
    images, labels = batch
    loss, hits = torch.zeros((), device=images.device), torch.zeros((), device=images.device)
    per_rank = ranks.total(torch.tensor(float(len(images)), device=images.device)) / ranks.own_share().ranks
    parts = max(1, min(spec.accumulation, len(images) // 2))  # batch norm needs two images
    pairs = zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
    for number, (part, targets) in enumerate(pairs, 1):
        with nullcontext() if number == parts else ranks.alone(learner.network):
            with torch.autocast(part.device.type, spec.precision, enabled=spec.precision != torch.float32):
                outputs = learner.network(part)
                mean = loss_of(data, outputs, targets, spec.label_smoothing)
            term = mean * (len(part) / per_rank)
            (learner.scaler.scale(term) if learner.scaler else term).backward()
        loss += term.detach()
        if data.score is None:
            hits += (logits_of(outputs).detach().argmax(1) == targets).sum()
    return loss, hits


def loss_of(data: Data, outputs, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean loss of a batch, by the criterion of its data."""
    return data.criterion(outputs, targets) if data.criterion else criterion(outputs, targets, label_smoothing)


def criterion(outputs, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy; auxiliary heads (GoogLeNet, Inception) count with a weight of 0.3.

    label_smoothing  the share of a label that is spread evenly over all classes (Szegedy et al., 2016)
    """
    cross_entropy = partial(F.cross_entropy, target=labels, label_smoothing=label_smoothing)
    main, *auxiliary = map(cross_entropy, tensors_in(outputs))
    return main + AUXILIARY_WEIGHT * sum(auxiliary) if auxiliary else main


def logits_of(outputs) -> Tensor:
    """The main head of a network's outputs, [n, classes]: the first tensor of them; InputError if there is none."""
    logits = next(tensors_in(outputs), None)
    if logits is None:
        raise InputError(f"the network returns no tensor, but {type(outputs).__name__}")
    return logits


def score_of(data: Data, outputs: list[Tensor], targets: Tensor) -> float:
    """The score of what `predict` returns; a network's one output is handed on as it is, and not as a list."""
    return float((data.score or accuracy)(outputs[0] if len(outputs) == 1 else outputs, targets))


def measured(model: nn.Module, data: Data) -> float:
    """The score of a network, over the whole test set; to be called on all ranks."""
    found = predict(model, data)
    return ranks.from_first(score_of(data, *found) if found else None)


@torch.no_grad()
def predict(model: nn.Module, data: Data) -> tuple[list[Tensor], Tensor] | None:
    """What the network says of the test set, in eval mode and in the precision of the weights, and its targets, as
    labels [n]; on the CPU, those of all ranks on the first of them, and None on the others.

    Of each output tensor, as the logits [n, classes], the rows of all batches.  InputError without an image, or if an
    output has other tensors or other shapes from batch to batch.
    """
    model.eval()
    own = []
    for images, labels in data.test_batches():
        if len(images):
            own.append(([torch.atleast_1d(t).cpu() for t in tensors_in(model(images))], labels.cpu()))
    if (gathered := ranks.at_first(own)) is None:
        return None
    batches = zip_longest(*gathered)  # the last one may be too small for every rank to have of it
    parts = [pair for shares in batches for pair in shares if pair is not None]
    if not parts:
        raise InputError("the test set holds no image, so there is nothing to judge")
    by_batch, labels = zip(*parts, strict=True)
    if len({tuple(t.shape[1:] for t in tensors) for tensors in by_batch}) > 1:
        raise InputError("the network's outputs have other shapes from batch to batch, so they cannot be judged")
    return [torch.cat(tensors) for tensors in zip(*by_batch, strict=True)], torch.cat(labels)


def accuracy(outputs, labels: Tensor) -> float:
    """The fraction of `labels` [n] that the largest of the logits [n, classes], the first of the outputs, hits.

    InputError if there is no label, or not one for each row of the logits.
    """
    logits = logits_of(outputs)
    if logits.dim() < 2 or logits.shape[:1] + logits.shape[2:] != labels.shape:
        raise InputError(f"logits {list(logits.shape)} do not fit labels {list(labels.shape)}")
    if not labels.numel():
        raise InputError("there is no image to test")
    return (logits.argmax(1) == labels).double().mean().item()
