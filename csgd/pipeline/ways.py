"""The ways to a narrow network: which channels stay, what becomes of the others.  A way is a function and a line."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from csgd import ranks
from csgd.clusters import Clusters, cluster
from csgd.data import Batches
from csgd.drop import drop, importance, most_important
from csgd.graph import ChannelSpace
from csgd.graph.conditions import tied
from csgd.graph.twin import keep_random_state, set_random_state, twin_of
from csgd.pipeline.setup import Setup
from csgd.sensitivity import FRACTIONS
from csgd.train import loss_of
from csgd.trim import merge_equal, trim

SEEN = 8  # batches on which outputs, or gradients, are measured, at least
MEASURED = 1024  # images on which a loss is
FORWARD = 1 / 3  # of what a step costs
GAINS = (2.0, 1.0, 1 / 3)  # variance × fan: He et al. 2015; LeCun, or Glorot and Bengio 2010; torch's own layers


@dataclass(frozen=True)
class Way:
    """How a stage becomes narrow.

    choose   (setup, spaces, widths) → clusters, of which the first member stays
    narrows  (model, spaces, clusters): the surgery, in place; None: training pulls members together, and `trim` cuts
    told     what the cut is, for people
    passes   what choosing costs, in steps of the network that it looks at
    trained  whether it starts from the base network
    """

    choose: Callable[[Setup, list[ChannelSpace], dict[str, int]], Clusters]
    narrows: Callable[[nn.Module, list[ChannelSpace], Clusters], None] | None
    told: str
    passes: Callable[[Setup], float]
    trained: bool = True

    @property
    def proven(self) -> bool:
        """Whether the cut, of equal members, changes nothing, so that it can be proven on a twin."""
        return self.choose is clusters_of

    @property
    def pulls(self) -> bool:
        return self.narrows is None


def clusters_of(setup: Setup, spaces: list[ChannelSpace], widths: dict[str, int]) -> Clusters:
    """The clusters of the network as it is; by what filters put out on some batches, if so asked."""
    how, data = setup.spec.clustering, None
    with keep_random_state(setup.model):
        if how.of == "outputs":
            data = (images for images, _ in some_batches(setup))
        return cluster(setup.model, spaces, widths, how.method, setup.spec.seed, how.of, data=data)


def most_important_of(setup: Setup, spaces: list[ChannelSpace], widths: dict[str, int]) -> Clusters:
    """The channels that matter most, each alone; by the gradients of some batches, if so asked."""
    by, model = setup.spec.cut.importance, setup.model
    if by == "taylor":
        # The first rank alone runs it: statistics stay what they are, and batch norm waits for no other rank.
        model = twin_of(model).train()
        with keep_random_state(model):
            for images, targets in some_batches(setup):
                loss_of(setup.data, model(images), targets).backward()
    scores = importance(model, spaces, by)
    return {name: [[slot] for slot in slots] for name, slots in most_important(spaces, scores, widths).items()}


def batches_seen(setup: Setup, images: int = 0) -> int:
    """SEEN, more for so many images, or an epoch if that has less; of several ranks the first sees its own share, of as
    many more."""
    count = max(SEEN, -(-images // setup.spec.batch_size))
    return min(count * ranks.own_share().ranks, setup.csgd.steps_per_epoch)


def some_batches(setup: Setup, images: int = 0) -> Batches:
    """The first of an epoch, those with which a run trains; whatever was drawn before, the same ones are drawn."""
    set_random_state(setup.model, setup.spec.seed)
    return islice(setup.data.train_batches(0), batches_seen(setup, images))


def first_of(setup: Setup, spaces: list[ChannelSpace], widths: dict[str, int]) -> Clusters:
    """The first channels of runs of near-equal size: of a network that is not trained any do."""
    runs = cluster(setup.model, spaces, widths, "even")
    return {name: [[members[0]] for members in parts] for name, parts in runs.items()}


def merge(model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters) -> None:
    merge_equal(model, spaces, clusters)
    trim(model, spaces, clusters, tolerance=None)


def prune(model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters) -> None:
    drop(model, spaces, {name: [members[0] for members in parts] for name, parts in clusters.items()})


@torch.no_grad()
def begin_anew(model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters) -> None:
    """The narrow network with weights of the wide one as they were drawn, spread as a network of its widths draws them.

    Most initialisations draw a weight with a variance of a constant over a fan: `drawing` tells which from the numbers
    themselves.  A weight that agrees with none of these stays as it was drawn (a fixed spread, as 0.02), biases do too.
    """
    weights = [p for p in model.parameters() if p.dim() > 1]
    drawn, before = drawing(weights), [fans(p) for p in weights]
    prune(model, spaces, clusters)
    for p, fan, wide in zip(weights, drawn, before, strict=True):
        if fan:
            p.mul_((wide[fan] / fans(p)[fan]) ** 0.5)


def drawing(weights: Sequence[Tensor]) -> list[str | None]:
    """The fan that each weight was drawn by, None where its variance is of none; the rule that explains most of the
    weights goes first, as a layer of twice as many outputs as inputs agrees with two."""
    agreeing = []
    for weight in weights:
        variance, slack = float(weight.float().var(correction=0)), max(0.02, 4 * (2 / weight.numel()) ** 0.5)
        rules = [(fan, gain) for fan in fans(weight) for gain in GAINS]
        agreeing.append([(fan, g) for fan, g in rules if abs(variance * fans(weight)[fan] / g - 1) < slack])
    explains = Counter(rule for rules in agreeing for rule in rules)
    return [max(rules, key=explains.__getitem__)[0] if rules else None for rules in agreeing]


def fans(weight: Tensor) -> dict[str, float]:
    """How many entries an output is the sum of, how many outputs an input goes to, as torch.nn.init counts them, and
    the mean of both."""
    positions = weight[0, 0].numel()
    inputs, outputs = weight.size(1) * positions, weight.size(0) * positions
    return {"inputs": inputs, "outputs": outputs, "both": (inputs + outputs) / 2}


def outputs_passes(setup: Setup) -> float:
    return FORWARD * steps_seen(setup) if setup.spec.clustering.of == "outputs" else 0.0


def gradient_passes(setup: Setup) -> float:
    return steps_seen(setup) if setup.spec.cut.importance == "taylor" else 0.0


def sensitivity_passes(setup: Setup) -> float:
    """What it costs to measure it, with the widths that go by it."""
    measured = 1 + len(FRACTIONS) * len(tied(setup.spaces))
    return FORWARD * steps_seen(setup, MEASURED) * measured if setup.spec.deps.allot == "sensitivity" else 0.0


def steps_seen(setup: Setup, images: int = 0) -> float:
    """Of a step each rank has a share."""
    return batches_seen(setup, images) / ranks.own_share().ranks


def no_passes(_: Setup) -> float:
    return 0.0


WAYS = {
    "csgd": Way(clusters_of, None, "filters made equal by training", outputs_passes),
    "merge": Way(clusters_of, merge, "clusters merged in one stroke", outputs_passes),
    "prune": Way(most_important_of, prune, "channels deleted", gradient_passes),
    "scratch": Way(first_of, begin_anew, "weights drawn anew, narrow", no_passes, trained=False),
}
