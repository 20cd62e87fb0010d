"""Fact F11: the pull apart from the gradient, under any torch optimizer."""

import copy
import gc
import inspect
import itertools
import math
import shutil
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import csgd
from csgd import CSGD, Collapse, InputError, Ref, ranks
from csgd.carry_over import like_parameter, scale_gradients, unscale
from csgd.clusters import clustered_tensors
from csgd.collapse import COARSE, attached
from csgd.pipeline.launch import launch
from csgd.proof import randomise
from csgd.trial import random_clusters
from tests import nets

OPTIM = torch.optim
KINDS = [
    kind
    for kind in map(OPTIM.__dict__.get, OPTIM.__all__)
    if isinstance(kind, type) and issubclass(kind, OPTIM.Optimizer) and kind is not OPTIM.Optimizer
]
APART = {OPTIM.SparseAdam, OPTIM.Muon, OPTIM.LBFGS}  # for some parameters, or some steps, alone: tests of their own
FORMS = [
    (kind, form)
    for kind in KINDS
    if kind not in APART
    for form in ({}, {"foreach": True}, {"fused": True})
    if set(form) <= set(inspect.signature(kind).parameters)
]


def prepared(net=nets.Plain, dtype=torch.float32, seed=0):
    """A network with random weights and statistics, in train mode, and clusters of half its width."""
    torch.manual_seed(0)
    model = net().to(dtype)
    randomise(model, seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    spaces = csgd.find_spaces(model, nets.example_of(net, dtype))
    return model, spaces, random_clusters(spaces)


def backward(model, step=0, net=nets.Plain):
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    images = torch.randn(6, *nets.EXAMPLES[net][1:], generator=generator, dtype=dtype)
    model.zero_grad()
    loss = F.cross_entropy(model(images), torch.randint(5, (6,), generator=generator))
    loss.backward()
    return loss.detach()


def take(model, optimizers, steps, net=nets.Plain):
    for step in steps:
        backward(model, step, net)
        for optimizer in optimizers:
            optimizer.step()


def apart(model, spaces, clusters, optimizers=()):
    """The tensors, and the entries of the optimizers' state, of which members are not equal to the bit."""
    found = []
    for t in clustered_tensors(model, spaces, clusters):
        if t.becomes_equal:
            dim, segments = t.merged
            values = {"": t.tensor}
            for optimizer in optimizers:
                values |= optimizer.state.get(t.tensor, {})
            for key, value in values.items():
                if like_parameter(value, t.tensor) or key == "":
                    rows = value.size(dim) > 1
                    found += (
                        [t.name + key] if rows and not torch.equal(value, value.index_select(dim, segments)) else []
                    )
    return found


def change_of_cut(model, spaces, clusters, optimizer=None, net=nets.Plain):
    """Of the outputs, in units of the largest."""
    example, mode = nets.example_of(net, next(model.parameters()).dtype), model.training
    model.eval()
    with torch.no_grad():
        before = model(example)
        csgd.trim(model, spaces, clusters, optimizer)
        change = (model(example) - before).abs().max() / before.abs().max()
    model.train(mode)
    return float(change)


@pytest.mark.parametrize(
    "kind, form", FORMS, ids=[f"{kind.__name__}-{next(iter(form), 'default')}" for kind, form in FORMS]
)
def test_members_are_equal_to_the_bit_at_stop_under_every_optimizer(kind, form):
    model, spaces, clusters = prepared()
    decay = {"weight_decay": 0.05} if "weight_decay" in inspect.signature(kind).parameters else {}
    optimizer = kind(model.parameters(), lr=3e-3, **decay, **form)
    take(model, [optimizer], range(5))  # it has a past
    collapse = Collapse(optimizer, model, spaces, clusters, start=2, stop=14, curve="linear")
    take(model, [optimizer], range(5, 7))
    start = float(collapse.deviation())
    for step in range(7, 19):
        assert apart(model, spaces, clusters), "not before stop"
        take(model, [optimizer], [step])
        left = collapse.left(step - 4)
        assert math.sqrt(float(collapse.deviation()) / start) <= left / (1 - COARSE) * (1 + 1e-3)
    assert collapse.done
    assert float(collapse.deviation()) == 0.0
    assert apart(model, spaces, clusters, [optimizer]) == []
    take(model, [optimizer], range(19, 29))
    assert float(collapse.deviation()) < 1e-10 * start, "members stay together"
    assert change_of_cut(model, spaces, clusters, optimizer) < 1e-6
    loss = backward(model)
    take(model, [optimizer], [0] * 10)
    assert backward(model) < loss, "it goes on with the narrow network"


def test_torch_has_no_other_optimizers():
    assert {kind.__name__ for kind, _ in FORMS} | {kind.__name__ for kind in APART} == {kind.__name__ for kind in KINDS}
    assert len(FORMS) > 20


@pytest.mark.parametrize("name", ["cosine", "linear", "function"])
def test_v_follows_the_curve_whatever_the_optimizer_does(name):
    """Exactly without decay: gradients are merged, and equal rows of the state get equal updates."""
    curve = (lambda done: (1 - done) ** 3) if name == "function" else name
    model, spaces, clusters = prepared(dtype=torch.float64)
    optimizer = OPTIM.Adam(model.parameters(), lr=1e-2)
    take(model, [optimizer], range(3))
    collapse = Collapse(optimizer, model, spaces, clusters, start=4, stop=44, curve=curve)
    left, start, scaled = 1.0, None, 0
    for step in range(44):
        take(model, [optimizer], [step])
        start = start if step >= 4 else float(collapse.deviation())
        now = {"cosine": lambda x: (1 + math.cos(math.pi * x)) / 2, "linear": lambda x: 1 - x}.get(name, curve)
        expected = now(max(0, step - 3) / 40) if step < 43 else 0.0
        assert collapse.left(step + 1) == pytest.approx(expected, abs=1e-12)
        if expected <= (1 - COARSE) * left:
            left, scaled = expected, scaled + 1
        assert math.sqrt(float(collapse.deviation()) / start) == pytest.approx(left, rel=1e-9, abs=1e-12)
    assert 5 < scaled <= 40


def test_in_16_bits_v_follows_its_curve_too():
    """One step's share of it would be lost in rounding: it is scaled when 5 % are due."""
    model, spaces, clusters = prepared(nets.Mlp, torch.bfloat16)
    optimizer = OPTIM.SGD(model.parameters(), 1e-3, momentum=0.9)
    collapse, start = Collapse(optimizer, model, spaces, clusters, stop=400, curve="linear"), None
    for step in range(400):
        start = start or float(collapse.deviation())
        take(model, [optimizer], [step], nets.Mlp)
        if step in (99, 199, 299):
            assert math.sqrt(float(collapse.deviation()) / start) == pytest.approx(collapse.left(step + 1), abs=0.05)
    assert apart(model, spaces, clusters) == []


def test_before_start_nothing_happens():
    """To the bit, in the state too."""
    ends = []
    for pulled in (False, True):
        model, spaces, clusters = prepared()
        optimizer = OPTIM.Adam(model.parameters(), 1e-2)
        take(model, [optimizer], range(2))
        if pulled:
            Collapse(optimizer, model, spaces, clusters, start=3, stop=9)
        take(model, [optimizer], range(3))
        states = [value for state in optimizer.state.values() for value in state.values()]
        ends.append([value.clone() for value in (*model.state_dict().values(), *states)])
        take(model, [optimizer], [3])
        ends[-1].append(model.conv1.weight)
    assert all(torch.equal(a, b) for a, b in zip(ends[0][:-1], ends[1][:-1], strict=True))
    assert not torch.equal(ends[0][-1], ends[1][-1])


def test_the_mean_takes_the_steps_of_the_optimizer_alone():
    """ΓW never sees the pull: it is that of a run that merges gradients and pulls nothing."""
    runs = []
    for curve in ("linear", lambda done: 1.0):
        p, generator = nn.Parameter(torch.randn(6, 4, dtype=torch.float64)), torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2)).double()
        p = model[0].weight
        with torch.no_grad():
            p.copy_(torch.randn(6, 4, generator=generator, dtype=torch.float64))
        spaces = csgd.find_spaces(model, torch.randn(2, 4, dtype=torch.float64))
        optimizer = OPTIM.AdamW([p], 1e-2)
        Collapse(
            [optimizer, OPTIM.SGD([*model[2].parameters()], 0.1)], model, spaces, {"0": [[0, 1, 5], [2, 3]]},
            stop=40, curve=curve,
        )  # fmt: skip
        for _ in range(30):
            p.grad = torch.randn(6, 4, generator=generator, dtype=torch.float64)
            optimizer.step()
        runs.append(torch.stack([p[[0, 1, 5]].mean(0), p[[2, 3]].mean(0), p[4]]).detach())
        assert (p[0] - p[1]).norm() > 1e-3
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-12, atol=1e-12)


def test_frozen_tensors_statistics_and_constants_become_equal_too():
    model, spaces, _ = prepared()
    for name, tensor in {
        "scale": torch.rand(8, 1, 1),
        "index": torch.arange(8),
        "turn": torch.randn(8, dtype=torch.complex64),
        "expanded": torch.rand(8, 1).expand(8, 5),
        "alike": torch.ones(()).expand(8),
    }.items():
        model.register_buffer(name, tensor)
        spaces[0].refs.append(Ref([("", name)], 0, "follow", torch.arange(8)[:, None], 8))
    clusters = {"conv1": [[0, 1, 2], [5, 7]]}
    model.bn1.eval()
    for p in (*model.bn1.parameters(), model.conv1.bias):
        p.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, before = OPTIM.AdamW(trained, 1e-2, weight_decay=0.0), copy.deepcopy(model.state_dict())
    Collapse(optimizer, model, spaces, clusters, stop=10)
    names = [t.name for t in clustered_tensors(model, spaces, clusters) if t.becomes_equal]
    assert {"bn1.weight", "bn1.running_var", "conv1.bias", "scale", "expanded", "alike"} <= set(names)
    take(model, [optimizer], range(5))
    assert apart(model, spaces, clusters) == [name for name in names if name != "alike"]
    for name in ("bn1.running_mean", "bn1.weight", "conv1.bias", "scale", "turn", "expanded"):
        first, now = (one[name][:3] - one[name][:3].mean(0) for one in (before, model.state_dict()))
        assert 0.49 < float((now / first).abs().mean()) < 0.6, name
    assert torch.equal(model.index, torch.arange(8)), "whole numbers have no mean"
    assert model.alike.stride() == (0,), "what is equal needs no memory for each entry"
    take(model, [optimizer], range(5, 10))
    assert apart(model, spaces, clusters) == []
    torch.testing.assert_close(model.scale[0], before["scale"][:3].mean(0))
    assert model.index.tolist() == [0, 0, 0, 3, 4, 5, 6, 5]
    assert change_of_cut(model, spaces, clusters, optimizer) < 1e-6
    assert model.scale.shape == (5, 1, 1)


def test_muon_beside_adamw_and_each_with_its_own_count():
    model, spaces, clusters = prepared(nets.Mlp)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    muon, adamw = (
        OPTIM.Muon(matrices, 1e-2),
        OPTIM.AdamW([p for p in model.parameters() if p.dim() != 2], 1e-2),
    )
    take(model, [muon, adamw], range(3), nets.Mlp)
    collapse = Collapse([muon, adamw], model, spaces, clusters, stop=8)
    take(model, [muon, adamw], range(7), nets.Mlp)
    take(model, [muon], range(3), nets.Mlp)
    assert not collapse.done, "one is late"
    with pytest.raises(InputError, match="has taken 7 steps"):
        collapse.finish()
    take(model, [adamw], [7], nets.Mlp)
    assert collapse.done
    assert apart(model, spaces, clusters, [muon, adamw]) == []
    take(model, [muon, adamw], range(60), nets.Mlp)
    assert change_of_cut(model, spaces, clusters, muon, nets.Mlp) < 1e-5
    assert all(adamw.state[p]["exp_avg"].shape == p.shape for p in adamw.param_groups[0]["params"]), "it came along"
    take(model, [muon, adamw], range(3), nets.Mlp)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_runs_its_closure_several_times_a_step(search):
    model, spaces, clusters = prepared(dtype=torch.float64)
    optimizer = OPTIM.LBFGS(model.parameters(), 0.5, max_iter=4, line_search_fn=search)
    optimizer.step(lambda: backward(model))
    collapse = Collapse(optimizer, model, spaces, clusters, start=1, stop=6, curve="linear")
    start = float(collapse.deviation())
    for step in range(6):
        optimizer.step(lambda: backward(model))
        if step < 1:
            start = float(collapse.deviation())
        elif step < 5:
            assert math.sqrt(float(collapse.deviation()) / start) == pytest.approx(collapse.left(step + 1), rel=1e-9)
    assert apart(model, spaces, clusters) == []
    optimizer.step(lambda: backward(model))
    assert float(collapse.deviation()) < 1e-24 * start
    assert change_of_cut(model, spaces, clusters, optimizer) < 1e-13
    loss = backward(model, 7)  # of other images: those of the test are learnt
    optimizer.step(lambda: backward(model, 7))
    assert backward(model, 7) < loss


def test_sparse_adam_moves_an_embedding_beside_it():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.hidden, self.fc = nn.Embedding(9, 6, sparse=True), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(self.hidden(self.words(x)).relu().mean(1))

    net, words = Words(), torch.randint(9, (4, 5))
    spaces, clusters = csgd.find_spaces(net, words), {"hidden": [[0, 1, 2], [3, 4]]}
    sparse = OPTIM.SparseAdam([net.words.weight], 1e-2)
    adam = OPTIM.Adam([*net.hidden.parameters(), *net.fc.parameters()], 1e-2)
    Collapse([sparse, adam], net, spaces, clusters, stop=5)
    for step in range(12):
        if step == 6:
            assert apart(net, spaces, clusters, [adam]) == []
            csgd.trim(net, spaces, clusters, [adam])
        sparse.zero_grad()
        adam.zero_grad()
        F.cross_entropy(net(words), torch.tensor([0, 1, 2, 0])).backward()
        sparse.step()
        adam.step()
    assert net.hidden.out_features == 5


class Sam(OPTIM.Optimizer):
    """Sharpness-aware steps (Foret et al., 2021): up along the gradient, and down from there with the one inside."""

    def __init__(self, params, inner):
        super().__init__(params, {})
        self.inner = inner

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        moved = [p for p in self.inner.param_groups[0]["params"] if p.grad is not None]
        kept = [p.clone() for p in moved]
        norm = torch.stack([p.grad.norm() for p in moved]).norm()
        for p in moved:
            p.add_(p.grad / norm, alpha=0.05)
        with torch.enable_grad():
            closure()
        for p, one in zip(moved, kept, strict=True):
            p.copy_(one)
        self.inner.step()
        return loss


@pytest.mark.parametrize("how", ["positional", "keyword", "sam", "sam inside"])
def test_closures_give_their_loss_back_and_their_gradients_are_merged(how):
    model, spaces, clusters = prepared(dtype=torch.float64)
    optimizer = inner = OPTIM.SGD(model.parameters(), 1e-2, momentum=0.9)
    if how.startswith("sam"):
        optimizer = Sam(model.parameters(), inner)
    collapse = Collapse(inner if how == "sam inside" else optimizer, model, spaces, clusters, stop=8, curve="linear")
    start = float(collapse.deviation())
    for step in range(8):
        closure = lambda step=step: backward(model, step)  # noqa: E731
        expected = copy.deepcopy(model)
        loss = optimizer.step(closure=closure) if how == "keyword" else optimizer.step(closure)
        assert loss == backward(expected, step)
        assert math.sqrt(float(collapse.deviation()) / start) == pytest.approx(collapse.left(step + 1), abs=1e-9)
    assert apart(model, spaces, clusters) == []


def test_clipping_accumulation_and_parameters_without_a_gradient():
    model, spaces, clusters = prepared(dtype=torch.float64)
    optimizer = OPTIM.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    collapse = Collapse(optimizer, model, spaces, clusters, stop=12, curve="linear")
    start = float(collapse.deviation())
    for step in range(12):
        total = None
        for part in range(3):
            backward(model, 3 * step + part)
            gradients = [p.grad for p in model.parameters()]
            total = gradients if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
        for number, (p, gradient) in enumerate(zip(model.parameters(), total, strict=True)):
            p.grad = None if (step + number) % 3 == 0 else gradient
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        assert math.sqrt(float(collapse.deviation()) / start) == pytest.approx(collapse.left(step + 1), abs=1e-9)
    assert apart(model, spaces, clusters, [optimizer]) == []


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_are_none(fused):
    model, spaces, clusters = prepared()
    optimizer = OPTIM.AdamW(model.parameters(), 1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    collapse, taken = Collapse(optimizer, model, spaces, clusters, stop=12), 0
    while not collapse.done:
        optimizer.zero_grad()
        scale = scaler.get_scale()
        loss = backward(model.train(), taken)
        model.zero_grad()
        scaler.scale(F.cross_entropy(model(nets.example_of(nets.Plain)), torch.tensor([0, 1]))).backward()
        if taken % 4 == 1:
            model.conv1.weight.grad[0, 0, 0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        taken += 1
        assert loss.isfinite()
        assert (scaler.get_scale() < scale) == (taken % 4 == 2)
    assert taken == (12 if fused else 16), "a fused kernel skips within its step"
    assert apart(model, spaces, clusters, [optimizer]) == []
    assert change_of_cut(model, spaces, clusters, optimizer) < 1e-6


def ranks_collapse(views: bool):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.Flatten(1),
                          nn.Linear(128, 5))  # fmt: skip
    spaces = csgd.find_spaces(model, torch.randn(2, 3, 8, 8))
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 0.5), "even")
    optimizer = OPTIM.AdamW(model.parameters(), 1e-2)
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=views)
    collapse = Collapse(optimizer, model, spaces, clusters, stop=8)
    torch.manual_seed(dist.get_rank())
    for _ in range(10):
        optimizer.zero_grad(set_to_none=not views)
        F.cross_entropy(wrapped(torch.randn(6, 3, 8, 8)), torch.randint(5, (6,))).backward()
        viewed = sum(p.grad._is_view() for p in model.parameters())
        optimizer.step()
        ranks.check_equal(model, step=0)
    equal = apart(model, spaces, clusters, [optimizer])
    csgd.trim(model, spaces, clusters, optimizer)
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=views)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=not views)
        F.cross_entropy(wrapped(torch.randn(6, 3, 8, 8)), torch.randint(5, (6,))).backward()
        optimizer.step()
        ranks.check_equal(model, step=0)
    return equal, viewed, collapse.done, model[0].out_channels


def in_group(function, *arguments):
    with ranks.group(torch.device("cpu")):
        return function(*arguments)


def shards():
    """What is said of the optimizer of a ZeRO, and of a sharded parameter."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.tensor import distribute_tensor

    model, said = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), []
    spaces, clusters = csgd.find_spaces(model, torch.randn(2, 3)), {"0": [[0, 1], [2, 3]]}
    for kind in ("zero", "dtensor"):
        if kind == "zero":
            optimizer = ZeroRedundancyOptimizer(model.parameters(), OPTIM.SGD, lr=0.1)
        else:
            sharded = distribute_tensor(model[0].weight.detach(), init_device_mesh("cpu", (2,)))
            model[0].weight = nn.Parameter(sharded)
            optimizer = OPTIM.SGD(model.parameters(), 0.1)
        try:
            Collapse(optimizer, model, spaces, clusters, stop=3)
        except InputError as error:
            said.append(str(error))
    return said


def on_two_ranks():
    return [ranks_collapse(views) for views in (False, True)], shards()


def test_ranks_collapse_alike_and_gradients_may_be_views_of_buckets_but_not_shards():
    ends, (zero, dtensor) = launch(in_group, (on_two_ranks,), 2, None)
    assert ends == [([], 0, True, 6), ([], 8, True, 6)]
    assert zero.startswith("ZeroRedundancyOptimizer keeps each rank's share of the state alone")
    assert dtensor.startswith("0.weight is a DTensor: the rows of a sharded tensor cannot be pulled together")


def test_a_compiled_step_calls_the_hooks():
    if not shutil.which("c++"):
        pytest.skip("torch.compile needs a C++ compiler")
    torch.compiler.reset()
    ends = []
    for compiled in (False, True):
        model, spaces, clusters = prepared(nets.Mlp)
        optimizer = OPTIM.SGD(model.parameters(), 1e-2)
        collapse = Collapse(optimizer, model, spaces, clusters, stop=6)
        for number in range(9):
            if number == 6:
                assert collapse.done
                assert apart(model, spaces, clusters) == []
                csgd.trim(model, spaces, clusters, optimizer)
                torch.compiler.reset()
            if number in (0, 6):  # what is compiled remembers shapes
                step = torch.compile(lambda optimizer=optimizer: optimizer.step()) if compiled else optimizer.step
            backward(model, number, nets.Mlp)
            step()
        ends.append([p.detach() for p in model.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["double", "channels_last", "half and back", "bfloat16"])
def test_a_model_may_be_moved_or_cast_after_the_collapse_is_made(change):
    model, spaces, clusters = prepared()
    optimizer = OPTIM.SGD(model.parameters(), 1e-2, momentum=0.9)
    Collapse(optimizer, model, spaces, clusters, stop=10)
    take(model, [optimizer], range(2))
    if change == "channels_last":
        model.to(memory_format=torch.channels_last)
    elif change == "half and back":
        model.half().float()
    else:
        model.to(getattr(torch, change))
        optimizer.load_state_dict(optimizer.state_dict())  # which casts the momentum
    take(model, [optimizer], range(2, 10))
    assert apart(model, spaces, clusters, [optimizer]) == []
    assert change_of_cut(model, spaces, clusters, optimizer) < {"double": 1e-14, "bfloat16": 0.02}.get(change, 1e-6)


def test_an_average_of_the_weights_is_merged_before_its_own_cut():
    model, spaces, clusters = prepared(dtype=torch.float64)
    optimizer = OPTIM.AdamW(model.parameters(), 1e-2)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    Collapse(optimizer, model, spaces, clusters, stop=10)
    for step in range(12):
        take(model, [optimizer], [step])
        average.update_parameters(model)
    csgd.trim(model, spaces, clusters, optimizer)
    with pytest.raises(InputError, match="has not collapsed"):
        csgd.trim(average.module, spaces, clusters)
    csgd.merge_equal(average.module, spaces, clusters)
    assert change_of_cut(average.module, spaces, clusters) < 1e-14
    for step in range(3):
        take(model, [optimizer], [step])
        average.update_parameters(model)


@pytest.mark.parametrize("killed", [3, 4, 9, 13, 15])
@pytest.mark.parametrize("kind", ["SGD", "Adam", "LBFGS"])
def test_killed_at_any_step_a_run_goes_on_to_the_same_bits(kind, killed, tmp_path):
    def made():
        model, spaces, clusters = prepared()
        how = {"SGD": dict(momentum=0.9, weight_decay=1e-2), "Adam": dict(weight_decay=1e-2), "LBFGS": dict(max_iter=2)}
        optimizer = getattr(OPTIM, kind)(model.parameters(), lr=1e-2, **how[kind])
        return model, optimizer, Collapse(optimizer, model, spaces, clusters, start=4, stop=13)

    def steps(model, optimizer, numbers):
        for number in numbers:
            optimizer.step(lambda number=number: backward(model, number))

    model, optimizer, collapse = made()
    steps(model, optimizer, range(killed))
    torch.save([one.state_dict() for one in (model, optimizer, collapse)], tmp_path / "state.pt")
    steps(model, optimizer, range(killed, 18))
    others = made()
    for one, state in zip(others, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        one.load_state_dict(state)
    steps(*others[:2], range(killed, 18))
    assert others[2].done
    assert others[2].state_dict() == collapse.state_dict()
    for (name, a), b in zip(model.state_dict().items(), others[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_that_is_killed_after_the_cut_goes_on_with_its_scales(tmp_path):
    model, spaces, clusters = prepared()
    optimizer = OPTIM.Adam(model.parameters(), 1e-2)
    Collapse(optimizer, model, spaces, clusters, stop=5)
    take(model, [optimizer], range(5))
    csgd.trim(model, spaces, clusters, optimizer)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = csgd.load_trimmed(nets.Plain(), saved[0])
    again = OPTIM.Adam(other.parameters(), 0.5)
    with pytest.raises(InputError, match="has no scales"):
        scale_gradients(again)
    again.load_state_dict(saved[1])
    scale_gradients(again)
    for one, its in ((model, optimizer), (other, again)):
        take(one, [its], range(5, 10))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_strength_of_the_published_method_would_take_the_same_step():
    """ε_t = (1 − a_{t+1}/a_t)/τ_t: under plain SGD the two are one."""
    model, spaces, clusters = prepared(dtype=torch.float64)
    twin = copy.deepcopy(model)
    rates = [0.01 * (1 + step) for step in range(12)]
    optimizer = OPTIM.SGD(model.parameters(), 0.1)
    groups = csgd.param_groups(twin, spaces, clusters, centri_strength=0.0, vector_ratio=0.0, weight_decay=0.0)
    published = CSGD(groups, 0.1, momentum=0.0, nesterov=False)
    collapse = Collapse(optimizer, model, spaces, clusters, stop=16, curve="linear")  # falls by 5 % a step, or more
    assert collapse.strength(0.1) == pytest.approx(10 / 16)
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        for group in published.param_groups:
            group.update(lr=rate, centri_strength=collapse.strength(rate))
        take(model, [optimizer], [step])
        backward(twin, step)
        published.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert collapse.strength(0.0) == math.inf
    take(model, [optimizer], range(5))
    assert collapse.strength(0.1) == collapse.strength(0.0) == 0.0


def sizes_of_updates(model, optimizer, steps, relative):
    """The root mean square of an entry's change in a step, or the ratio of all changes to the weights; the mean."""
    found = []
    for step in steps:
        before = [p.detach().clone() for p in model.parameters()]
        take(model, [optimizer], [step])
        moved = torch.cat([(p - q).detach().flatten() for p, q in zip(model.parameters(), before, strict=True)])
        whole = torch.cat([q.flatten() for q in before]).norm() if relative else len(moved) ** 0.5
        found.append(float(moved.norm() / whole))
    return sum(found) / len(found)


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop", "Adagrad"])
def test_updates_after_the_cut_are_of_the_size_before_it(kind):
    """The weights of SGD's summed slices have grown, and so do their updates (F7): there the ratio counts."""
    ratios = {"carried": 0.0, "plain": 0.0}
    for seed, way in itertools.product(range(3), ratios):
        model, spaces, clusters = prepared(dtype=torch.float64, seed=seed)
        momentum = {"momentum": 0.9} if kind == "SGD" else {}
        optimizer = getattr(OPTIM, kind)(model.parameters(), lr=1e-3, **momentum)
        Collapse(optimizer, model, spaces, clusters, stop=60)
        take(model, [optimizer], [*range(20)] * 3)
        before = sizes_of_updates(model, optimizer, range(20), kind == "SGD")
        csgd.trim(model, spaces, clusters, optimizer)
        if way == "plain":  # the control: gradients that are sums, and a state of means
            for group in optimizer.param_groups:
                group["gradient_scales"] = None
        ratios[way] += sizes_of_updates(model, optimizer, range(20), kind == "SGD") / before / 3
    assert 1 / 1.5 < ratios["carried"] < 1.5
    assert kind == "SGD" or ratios["plain"] > 1.5 * ratios["carried"]


@pytest.mark.parametrize("momentum, nesterov", [(0.9, True), (0.9, False), (0.0, False)])
@pytest.mark.parametrize("net", [nets.Plain, nets.Residual, nets.Dense, nets.Depthwise, nets.Grouped, nets.Tied])
def test_f7_sgd_goes_on_exactly_as_the_wide_network_would(net, momentum, nesterov):
    runs = []
    for cut in (False, True):
        model, spaces, clusters = prepared(net, torch.float64)
        optimizer = OPTIM.SGD(model.parameters(), 1e-2, momentum=momentum, nesterov=nesterov, weight_decay=1e-2)
        Collapse(optimizer, model, spaces, clusters, stop=6)
        take(model, [optimizer], range(8), net)
        if cut:
            csgd.trim(model, spaces, clusters, optimizer)
        take(model, [optimizer], range(8, 28), net)
        runs.append(model(nets.example_of(net, torch.float64)).detach())
    assert (runs[0] - runs[1]).abs().max() < 1e-12 * runs[0].abs().max()


def test_state_goes_over_as_that_of_one_member_and_the_mean_of_slices():
    """And of the gradient, rows alone are scaled: |H| equal slices had the gradient that their sum has."""
    model, spaces, clusters = prepared(dtype=torch.float64)
    optimizer = OPTIM.AdamW(model.parameters(), 1e-3)
    Collapse(optimizer, model, spaces, clusters, stop=5)
    take(model, [optimizer], range(6))
    wide = {t.name: (t, optimizer.state[t.tensor]["exp_avg_sq"].clone())
            for t in clustered_tensors(model, spaces, clusters) if t.tensor in optimizer.state}  # fmt: skip
    csgd.trim(model, spaces, clusters, optimizer)
    scales = dict(zip(model.parameters(), optimizer.param_groups[0]["gradient_scales"], strict=True))
    for name, (t, state) in wide.items():
        for dim, segments in filter(None, (t.merged, t.summed)):
            parts = [(segments == one).nonzero().flatten() for one in segments.unique()]
            state = torch.stack([state.index_select(dim, part).mean(dim) for part in parts], dim)
        torch.testing.assert_close(optimizer.state[t.tensor]["exp_avg_sq"], state, rtol=1e-9, atol=0)
        dims = [dim for dim, _ in scales[t.tensor] or []]
        assert dims == ([t.merged[0]] if t.merged else []), name


def test_after_the_cut_gradients_are_scaled_once_with_a_closure_as_without():
    ends = []
    for closure in (False, True):
        model, spaces, clusters = prepared()
        optimizer = OPTIM.SGD(model.parameters(), 1e-2)
        csgd.merge_equal(model, spaces, clusters)
        csgd.trim(model, spaces, clusters, optimizer)
        for step in range(4):
            if closure:
                optimizer.step(partial(backward, model, step))
            else:
                take(model, [optimizer], [step])
        ends.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_state_that_is_an_average_of_the_weights_is_cut_as_they_are():
    model, spaces, clusters = prepared(dtype=torch.float64)
    optimizer = OPTIM.ASGD(model.parameters(), 1e-2, t0=0)
    Collapse(optimizer, model, spaces, clusters, stop=5)
    take(model, [optimizer], range(9))
    average = copy.deepcopy(model)
    for p, q in zip(average.parameters(), model.parameters(), strict=True):
        p.data.copy_(optimizer.state[q]["ax"])
    csgd.merge_equal(average, spaces, clusters)
    csgd.trim(average, spaces, clusters)
    csgd.trim(model, spaces, clusters, optimizer)
    for p, q in zip(average.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[q]["ax"], p.detach(), rtol=1e-12, atol=1e-12)


def test_sgd_goes_on_plainly_where_that_is_asked_for():
    model, spaces, clusters = prepared(dtype=torch.float64)
    optimizer = OPTIM.SGD(model.parameters(), 0.0, momentum=0.9)
    csgd.merge_equal(model, spaces, clusters)
    csgd.trim(model, spaces, clusters, optimizer)
    twin = copy.deepcopy(model)
    plain = OPTIM.SGD(twin.parameters(), 0.0, momentum=0.9)
    take(model, [optimizer], [0])  # fills the momenta, moves nothing
    take(twin, [plain], [0])
    assert not torch.allclose(*(o.param_groups[0]["params"][0].grad for o in (optimizer, plain)))
    unscale(optimizer)
    for one, its in ((model, optimizer), (twin, plain)):
        its.param_groups[0]["lr"] = 1e-2
        take(one, [its], range(1, 9))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with pytest.raises(InputError, match="Adam keeps its state in units that are not known"):
        unscale(OPTIM.Adam(model.parameters()))


def test_weight_decay_in_the_gradient_does_not_bring_v_back_after_stop():
    """It sits in the momentum: rows of the state are averaged at stop."""
    model, spaces, clusters = prepared(dtype=torch.float64)
    optimizer = OPTIM.Adam(model.parameters(), 1e-2, weight_decay=0.1)
    collapse = Collapse(optimizer, model, spaces, clusters, stop=10)
    start = float(collapse.deviation())
    take(model, [optimizer], range(30))
    assert float(collapse.deviation()) < 1e-24 * start
    again, spaces, clusters = prepared(dtype=torch.float64)
    control = OPTIM.Adam(again.parameters(), 1e-2, weight_decay=0.1)
    other = Collapse(control, again, spaces, clusters, stop=10)
    take(again, [control], range(9))
    kept = copy.deepcopy(control.state_dict())
    take(again, [control], [9])
    control.load_state_dict(kept)  # the state as it was, of unequal rows
    take(again, [control], range(10, 30))
    assert float(other.deviation()) > 1e-6 * start


def test_finish_refuses_before_stop_and_what_came_apart_after_it():
    model, spaces, clusters = prepared()
    optimizer = OPTIM.SGD(model.parameters(), 1e-2, momentum=0.9)
    collapse = Collapse(optimizer, model, spaces, clusters, stop=6)
    take(model, [optimizer], range(5))
    kept = copy.deepcopy(model.state_dict())
    for refuse in (collapse.finish, lambda: csgd.trim(model, spaces, clusters, optimizer, tolerance=None)):
        with pytest.raises(InputError, match="collapse at step 6, and the optimizer has taken 5 steps"):
            refuse()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), kept.values(), strict=True))
    take(model, [optimizer], range(5, 8))
    with torch.no_grad():
        kept = model.conv1.weight.clone()
        model.conv1.weight.add_(torch.randn_like(kept), alpha=1e-3)
    for refuse in (collapse.finish, lambda: csgd.trim(model, spaces, clusters, optimizer)):
        with pytest.raises(InputError, match="^conv1.weight came apart after its collapse") as refused:
            refuse()
        assert "\n" not in str(refused.value)
    with torch.no_grad():
        model.conv1.weight.copy_(kept)
    collapse.finish()
    collapse.finish()
    assert apart(model, spaces, clusters, [optimizer]) == []
    assert attached(optimizer) is None
    assert collapse.done


def test_a_finished_or_detached_collapse_does_nothing_any_more_and_holds_nothing():
    model, spaces, clusters = prepared()
    optimizer = OPTIM.SGD(model.parameters(), 1e-2)
    collapse = Collapse(optimizer, model, spaces, clusters, stop=50)
    take(model, [optimizer], range(3))
    collapse.detach()
    before = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model)
    take(model, [optimizer], range(3, 6))
    take(twin, [OPTIM.SGD(twin.parameters(), 1e-2)], range(3, 6))
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(before["conv1.weight"], model.conv1.weight)
    assert not {**optimizer._optimizer_step_pre_hooks, **optimizer._optimizer_step_post_hooks}
    held = weakref.ref(model.conv1.weight)
    del model, optimizer, before
    gc.collect()
    assert held() is None
    assert collapse.steps == [3]


def test_the_hooks_hold_the_collapse_and_a_copy_of_the_optimizer_has_none():
    model, spaces, clusters = prepared()
    optimizer = OPTIM.SGD(model.parameters(), 1e-2)
    Collapse(optimizer, model, spaces, clusters, stop=3)
    gc.collect()
    assert attached(copy.deepcopy(optimizer)) is None
    take(model, [optimizer], range(3))
    assert attached(optimizer).done
    assert apart(model, spaces, clusters) == []


def test_a_parameter_that_is_thawed_later_is_merged_too():
    model, spaces, clusters = prepared(dtype=torch.float64)
    model.conv1.requires_grad_(False)
    optimizer = OPTIM.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)
    collapse = Collapse(optimizer, model, spaces, clusters, stop=12, curve="linear")
    start = float(collapse.deviation())
    take(model, [optimizer], range(4))
    model.conv1.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.conv1.parameters())})
    take(model, [optimizer], range(4, 8))
    assert math.sqrt(float(collapse.deviation()) / start) == pytest.approx(1 / 3, rel=1e-9)
    take(model, [optimizer], range(8, 20))
    assert change_of_cut(model, spaces, clusters, optimizer) < 1e-14


def test_a_cut_without_its_collapse_is_noticed_at_the_next_step():
    model, spaces, clusters = prepared()
    optimizer = OPTIM.SGD(model.parameters(), 1e-2)
    Collapse(optimizer, model, spaces, clusters, stop=3)
    take(model, [optimizer], range(2))
    csgd.trim(model, spaces, clusters, tolerance=None)
    backward(model)
    with pytest.raises(InputError, match="has been cut or removed while a Collapse pulls it"):
        optimizer.step()


class Wrapper(OPTIM.Optimizer):
    """As accelerate wraps one: without hooks of its own."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_what_cannot_be_pulled_is_refused_in_one_line():
    model, spaces, clusters = prepared()
    parameters = list(model.parameters())
    sgd = OPTIM.SGD(parameters, 0.1)
    taken = OPTIM.SGD(parameters, 0.1)
    Collapse(taken, model, spaces, clusters, stop=3)
    copies = OPTIM.SGD([nn.Parameter(p.detach().clone()) for p in parameters], 0.1)
    beside = OPTIM.SGD([*parameters, nn.Parameter(torch.ones(7))], 0.1)
    part = OPTIM.SGD(parameters[2:], 0.1)
    for optimizers, options, message in (
        (copies, {}, r"SGD holds a tensor of shape \[8, 3, 3, 3\] that is no parameter of the model: master copies"),
        (beside, {}, r"holds a tensor of shape \[7\] that is no parameter of the model"),
        (part, {}, "conv1.weight is in no optimizer that was given"),
        ([sgd, part], {}, "bn1.weight is in two of the optimizers"),
        (taken, {}, "this SGD has a Collapse already"),
        (Wrapper(sgd), {}, "a Wrapper is no torch optimizer that calls hooks: give the one inside"),
        ([], {}, "needs an optimizer"),
        (["sgd"], {}, "a str is no torch optimizer"),
        (sgd, dict(stop=0), "0 <= start < stop, got start=0 and stop=0"),
        (sgd, dict(stop=5, start=5), "0 <= start < stop"),
        (sgd, dict(stop=5.5), "whole numbers"),
        (sgd, dict(curve="step"), "curve must be cosine, linear or a function of the fraction done, got 'step'"),
    ):
        with pytest.raises(InputError, match=message) as refused:
            Collapse(optimizers, model, spaces, clusters, **{"stop": 10} | options)
        assert "\n" not in str(refused.value)
    assert attached(sgd) is None, "nothing was hooked"
    collapse = Collapse(sgd, model, spaces, clusters, stop=10, curve=lambda done: 1 + done)
    with pytest.raises(InputError, match="must fall from 1 to 0, it is 1.1 at 0.1"):
        take(model, [sgd], [0])
    with pytest.raises(InputError, match="a state_dict of a collapse with 2 optimizers, this has 1"):
        collapse.load_state_dict({"steps": [1, 1], "left": [1.0, 1.0, 1.0]})
