"""The training loop: the same one for the base network (SGD) and for C-SGD."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.swa_utils import AveragedModel

from csgd import ranks
from csgd.data import Data
from csgd.errors import InputError
from csgd.graph.twin import tensors_in
from csgd.optim import CSGD, set_lr, set_ramp
from csgd.seeds import RandomState, seed_all, set_random_state

if TYPE_CHECKING:
    from tqdm import tqdm

CHECK_EVERY = 16  # steps between two looks at the losses; a look waits for the device
AUXILIARY_WEIGHT = 0.3  # of the loss of an auxiliary head (Szegedy et al., 2015)


class DivergedError(InputError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch of training, or the part of it that was asked for, measured.

    epoch  1, 2, …;  step  steps done since the start of the phase;  steps, seconds  of training alone, in this part
    """

    epoch: int
    step: int
    loss: float
    train_accuracy: float
    lr: float
    steps: int
    seconds: float

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    *,
    steps: range,
    steps_per_epoch: int,
    lr_at: Callable[[int], float],
    ramp_at: Callable[[int], float] | None = None,
    clip_norm: float | None = None,
    label_smoothing: float = 0.0,
    accumulation: int = 1,
    precision: torch.dtype = torch.float32,
    scaler: GradScaler | None = None,
    average: AveragedModel | None = None,
    check_every: int | None = None,
    seed: int,
    bar: "tqdm | None" = None,
    random_state: RandomState | None = None,
) -> Iterator[Epoch]:
    """Trains the steps of a run that `steps` names, and yields at the end of each epoch and of `steps`, so that the
    caller tests, logs, saves and cuts.

    `lr_at` and `ramp_at` (of the strength of a CSGD) are functions of the step; `clip_norm` caps the norm of the
    gradient (fact F9: the forecast holds all the same).  A batch goes through the network in `accumulation` parts,
    or in as many as have two images, whose gradients add up to that of its mean loss; batch norm sees one part at a
    time.  Data and random state of an epoch are fixed by (seed, epoch); where `steps` starts within one,
    `random_state` is that of `seeds` at this step.  `bar` is of the caller's, for more than these steps.  DivergedError
    names the step at which the loss stopped being a number; the weights are then lost.

    In a `precision` of 16 bits the network is run under autocast, and its parameters, gradients and their update stay
    what they are; float16 needs a `scaler`, whose factor is out of the gradients before they are clipped and merged.
    A step that it leaves out for an overflow is one in which nothing is pulled.  `average` follows the weights.

    Several ranks, whose `model` is one of `ranks.parallel`, take the steps that one would take with the same batches;
    what is yielded is of all of them, and at that point all have the statistics of batch norm of rank 0.  Every
    `check_every` steps they make sure that their parameters are the same.
    """
    own = ranks.own_share()
    how = dict(label_smoothing=label_smoothing, accumulation=accumulation, precision=precision, scaler=scaler)
    passes = partial(_passes, model, **how)
    for epoch in range(steps.start // steps_per_epoch, -(-steps.stop // steps_per_epoch)):
        started = time.perf_counter()
        first, last = max(steps.start, epoch * steps_per_epoch), min(steps.stop, (epoch + 1) * steps_per_epoch)
        seed_all(seed * 1_000_003 + epoch + own.offset)
        batches = data.train_batches(epoch)
        if first > epoch * steps_per_epoch:
            deque(islice(batches, first - epoch * steps_per_epoch), maxlen=0)
            if random_state is not None:
                set_random_state(random_state)
        model.train()
        losses, correct, seen = [], torch.zeros((), device=data.example.device), 0
        for step, (images, labels) in enumerate(islice(batches, last - first), first):
            loss, hits = passes(images, labels)
            correct += hits
            if scaler:
                scaler.unscale_(optimizer)
            if clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            lr = lr_at(step)
            set_lr(optimizer, lr)
            if ramp_at is not None:
                set_ramp(optimizer, ramp_at(step))
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if average:
                average.update_parameters(model)

            if check_every and (step + 1) % check_every == 0:
                ranks.check_equal(model, step + 1)
            losses.append(loss)
            seen += len(labels)
            if (step - first) % CHECK_EVERY == 0 or step == last - 1:
                _check_losses(losses, first)
                if bar is not None and not bar.disable:
                    shown = {"loss": f"{losses[-1]:.3f}", "accuracy": f"{correct / seen:.3f}", "lr": f"{lr:.1e}"}
                    if isinstance(optimizer, CSGD) and optimizer.clustered_groups():
                        shown["deviation"] = f"{optimizer.deviation():.1e}"
                    bar.set_postfix(shown, refresh=False)
            if bar is not None:
                bar.update()
        ranks.share_buffers(model)
        if average:
            ranks.share_buffers(average)
        sums = torch.stack([torch.stack(losses).mean(), correct, torch.full_like(correct, seen)])
        mean_loss, correct, seen = ranks.total(sums).tolist()
        seconds = time.perf_counter() - started
        yield Epoch(epoch + 1, last, mean_loss / own.ranks, correct / seen, lr, last - first, seconds)


def _passes(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float,
    accumulation: int,
    precision: torch.dtype,
    scaler: GradScaler | None,
) -> tuple[Tensor, Tensor]:
    """Adds the gradients of a batch, of which this rank has [n, …] images; what they add to the loss, and the hits.

    The mean over ranks of that loss is the mean over the images of all, and so are the gradients.
    """
    loss, hits = torch.zeros((), device=images.device), torch.zeros((), device=images.device)
    per_rank = ranks.total(torch.tensor(float(len(images)), device=images.device)) / ranks.own_share().ranks
    parts = max(1, min(accumulation, len(images) // 2))  # batch norm needs two images
    pairs = zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
    for number, (part, targets) in enumerate(pairs, 1):
        with nullcontext() if number == parts else ranks.alone(model):
            with torch.autocast(part.device.type, precision, enabled=precision != torch.float32):
                outputs = model(part)
                mean = criterion(outputs, targets, label_smoothing)
            term = mean * (len(part) / per_rank)
            (scaler.scale(term) if scaler else term).backward()
        loss += term.detach()
        hits += (logits_of(outputs).detach().argmax(1) == targets).sum()
    return loss, hits


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


@torch.no_grad()
def predict(model: nn.Module, data: Data) -> tuple[list[Tensor], Tensor]:
    """What the network says of the test set, in eval mode and in the precision of the weights, and its labels [n]; on
    the CPU, and those of all ranks on each.

    Of each output tensor, the logits [n, classes] first, the rows of all batches.  InputError without an image, or if
    an output has other tensors or other shapes from batch to batch.
    """
    model.eval()
    own = []
    for images, labels in data.test_batches():
        if len(images):
            own.append(([torch.atleast_1d(t).cpu() for t in tensors_in(model(images))], labels.cpu()))
    batches = zip_longest(*ranks.gathered(own))  # the last one may be too small for every rank to have of it
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


def _check_losses(losses: list[Tensor], first: int) -> None:
    finite = torch.stack(losses[-CHECK_EVERY:]).isfinite()
    if not finite.all():
        step = first + max(0, len(losses) - CHECK_EVERY) + int(finite.long().argmin())
        raise DivergedError(f"the loss at step {step} is not a number: a lower learning rate is needed")
