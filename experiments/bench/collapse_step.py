"""What does Collapse add to a step of torch's optimizers, and to a whole step of training?

    python experiments/bench/collapse_step.py

All filters at 5/8 of their number.  Contenders take turns on copies of one network with the same gradients, in several
processes one after the other; "whole" is forward and backward passes of 32 images of 32×32 beside it.  Collapse merges
gradients before each step, and scales deviations after some: the two kinds of steps are timed apart, and weighed by
their number in a cosine of 1000 steps.  Ratios are medians within turns, then over processes.
"""

import copy
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, product
from multiprocessing import get_context

import torch
from common import arguments, in_turns, leave, milliseconds, ratio, summary
from optimizer_step import NETWORKS, contender

import csgd
from csgd.collapse import COARSE, CURVES
from csgd.train import criterion

OPTIMIZERS = {
    "SGD": lambda model: contender("SGD", model, [], {}),
    "SGD, fused": lambda model: contender("SGD, fused", model, [], {}),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), 1e-3),
}
STOP = 1000
STEPS = {"step": 3, "whole": 1}  # a turn


def share_of_pulls() -> float:
    """Of the steps of a cosine, those after which deviations are scaled."""
    left, pulls = 1.0, 0
    for step in range(1, STOP + 1):
        if CURVES["cosine"](step / STOP) <= (1 - COARSE) * left:
            left, pulls = CURVES["cosine"](step / STOP), pulls + 1
    return pulls / STOP


def turn(before: Callable[[], None], optimizer, collapse: csgd.Collapse | None, left: float, steps: int) -> None:
    for _ in range(steps):
        if collapse is not None:  # half of the way, where a half is left: of 1, a pull is due, of a half it is not
            collapse.load_state_dict({"steps": [STOP // 2], "left": [left, left]})
        before()
        optimizer.step()


def measured(network: str, threads: list[int], turns: int, device: torch.device) -> dict[tuple, list[float]]:
    """{(what, threads, optimizer, alone | with Collapse): seconds of a step in each turn}"""
    torch.manual_seed(0)
    model = NETWORKS[network]().to(device, memory_format=torch.channels_last)
    images = torch.randn(32, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(32, device=device) % 10
    spaces = csgd.find_spaces(model, images[:2], trial=False)
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 5 / 8), "even")
    contenders = {what: {} for what in STEPS}
    for kind, with_it in [*product(OPTIMIZERS, (False, True)), ("CSGD", False)]:
        twin = copy.deepcopy(model).train()
        torch.manual_seed(1)
        for p in twin.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        optimizer = OPTIMIZERS[kind](twin) if kind in OPTIMIZERS else contender(kind, twin, spaces, clusters)
        collapse = csgd.Collapse(optimizer, twin, spaces, clusters, stop=STOP) if with_it else None
        for what, before in (("step", lambda: None), ("whole", partial(passes, twin, images, labels))):
            for left in (0.5, 1.0) if with_it else (None,):
                contenders[what][kind, left] = partial(turn, before, optimizer, collapse, left, STEPS[what])
    found, share = {}, share_of_pulls()
    for what, number in product(contenders, threads):
        torch.set_num_threads(number)
        seconds = in_turns(contenders[what], turns)
        for kind in [*OPTIMIZERS, "CSGD"]:
            found[what, number, kind, "alone"] = [one / STEPS[what] for one in seconds[kind, None]]
        for kind in OPTIMIZERS:
            pairs = zip(seconds[kind, 0.5], seconds[kind, 1.0], strict=True)
            found[what, number, kind, "with"] = [((1 - share) * a + share * b) / STEPS[what] for a, b in pairs]
    return found


def passes(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    criterion(model(images), labels).backward()


def main() -> None:
    given = arguments(__doc__)
    turns, processes = (7, 1) if given.quick else (7, 3)
    rows, numbers = [], []
    for network in ("VGG-16", "ResNet-56"):
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
            tasks = [fresh.submit(measured, network, given.threads, turns, given.device) for _ in range(processes)]
            found = [task.result() for task in tasks]
        for what, threads, kind, way in found[0]:
            seconds = [one[what, threads, kind, way] for one in found]
            to_own, to_sgd = (
                statistics.median(
                    ratio(own, one[what, threads, other, "alone"]) for own, one in zip(seconds, found, strict=True)
                )
                for other in (kind, "SGD")
            )
            of_steps = list(chain(*seconds))
            rows.append((network, what, threads, kind, way, milliseconds(of_steps), f"{to_own:.2f}", f"{to_sgd:.2f}"))
            numbers.append({"network": network, "what": what, "threads": threads, "optimizer": kind, "collapse": way,
                            "seconds": summary(of_steps), "to_own": to_own, "to_sgd": to_sgd,
                            "processes": processes})  # fmt: skip
    header = ("network", "", "threads", "optimizer", "Collapse", "ms (quartiles)", "to alone", "to default SGD")
    leave("collapse_step", given, header, rows, numbers)


if __name__ == "__main__":
    main()
