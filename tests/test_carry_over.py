"""Fact F7: after the collapse, C-SGD on the wide network is SGD on the trimmed one with rescaled gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import csgd
from csgd import CSGD, InputError
from csgd.proof import randomise
from csgd.train import criterion
from csgd.trial import random_clusters
from tests import nets

CONSTANTS = dict(
    centri_strength=0.3, vector_ratio=0.5, weight_decay=1e-3, weight_decay_vectors=1e-4, bias_lr_factor=2.0
)


def collapsed(net, momentum=0.9, nesterov=True):
    """A network with equal members and an optimizer with momentum, in float64."""
    torch.manual_seed(0)
    model, example = net().double(), nets.example_of(net, torch.float64)
    randomise(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    spaces = csgd.find_spaces(model, example)
    clusters = random_clusters(spaces)
    csgd.merge_equal(model, spaces, clusters)
    optimizer = CSGD(csgd.param_groups(model, spaces, clusters, **CONSTANTS), 0.01, momentum, nesterov)
    for step in range(5):
        take_step(model, optimizer, net, step)
    return model, spaces, clusters, optimizer


def take_step(model, optimizer, net, step):
    """One step on random data; the outputs before it."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(6, *nets.EXAMPLES[net][1:], generator=generator, dtype=torch.float64)
    model.train()
    outputs = model(images)
    logits = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    if logits.dim() > 2:
        loss = logits.square().mean()
    else:
        loss = criterion(outputs, torch.randint(5, (6,), generator=generator))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return logits.detach()


@pytest.mark.parametrize("momentum, nesterov", [(0.9, True), (0.9, False), (0.0, False)])
@pytest.mark.parametrize("net", nets.EXAMPLES)
def test_f7_the_trimmed_run_is_the_wide_run(net, momentum, nesterov):
    wide, spaces, clusters, optimizer = collapsed(net, momentum, nesterov)
    slim = copy.deepcopy(wide)
    twin = CSGD(csgd.param_groups(slim, spaces, clusters, **CONSTANTS), 0.01, momentum, nesterov)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    csgd.trim(slim, spaces, clusters, twin)
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in wide.parameters())
    steps = 200 if nesterov else 50
    for step in range(5, 5 + steps):
        a, b = take_step(wide, optimizer, net, step), take_step(slim, twin, net, step)
        assert (a - b).abs().max() <= 1e-10 * a.abs().max().clamp(min=1), f"step {step}"
    moved = take_step(slim, twin, net, 0) - take_step(collapsed(net, momentum, nesterov)[0], optimizer, net, 0)
    assert moved.abs().max() > 1e-6, "the weights did move"


def test_f7_without_the_scales_the_runs_part():
    wide, spaces, clusters, optimizer = collapsed(nets.Residual)
    slim = copy.deepcopy(wide)
    csgd.trim(slim, spaces, clusters)
    plain = CSGD([{"params": list(slim.parameters())}], 0.01)
    parted = [
        take_step(wide, optimizer, nets.Residual, s) - take_step(slim, plain, nets.Residual, s) for s in range(5, 25)
    ]
    assert parted[0].abs().max() < 1e-12
    assert parted[-1].abs().max() > 1e-3


def test_unscaled_it_is_sgd_on_the_trimmed_network_with_its_own_momentum():
    model, spaces, clusters, _ = collapsed(nets.Grouped)
    groups = csgd.param_groups(model, spaces, clusters, centri_strength=0.3, weight_decay=0.0)
    optimizer = CSGD(groups, 0.01)
    csgd.trim(model, spaces, clusters, optimizer)
    twin = copy.deepcopy(model)
    plain = torch.optim.SGD(twin.parameters(), 0.0, 0.9, nesterov=True)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    take_step(model, optimizer, nets.Grouped, 0)  # fills the momenta, moves nothing
    take_step(twin, plain, nets.Grouped, 0)
    for kind in (optimizer, plain):
        for group in kind.param_groups:
            group["lr"] = 0.01
    scaled = copy.deepcopy([optimizer.state[p]["momentum_buffer"] for p in model.parameters()])
    optimizer.unscale()
    own = [plain.state[p]["momentum_buffer"] for p in twin.parameters()]
    assert not all(torch.allclose(a, b) for a, b in zip(scaled, own, strict=True))
    for step in range(1, 20):
        a, b = take_step(model, optimizer, nets.Grouped, step), take_step(twin, plain, nets.Grouped, step)
        assert (a - b).abs().max() <= 1e-12 * a.abs().max().clamp(min=1)


def test_the_optimizer_goes_on_with_the_new_parameters_and_comes_back_from_a_file(tmp_path):
    model, spaces, clusters, optimizer = collapsed(nets.Plain)
    csgd.trim(model, spaces, clusters, optimizer)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in model.parameters())
    assert float(optimizer.deviation()) == 0.0
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = csgd.load_trimmed(nets.Plain().double(), saved["model"])
    fresh = CSGD(csgd.param_groups(other, [], {}, **CONSTANTS), 0.5)
    fresh.load_state_dict(saved["optimizer"])
    for step in range(3):
        a, b = take_step(model, optimizer, nets.Plain, step), take_step(other, fresh, nets.Plain, step)
        assert torch.equal(a, b)


def test_a_second_cut_needs_a_new_optimizer():
    model, spaces, clusters, optimizer = collapsed(nets.Plain)
    csgd.trim(model, spaces, clusters, optimizer)
    again = csgd.find_spaces(model, nets.example_of(nets.Plain, torch.float64))
    with pytest.raises(InputError, match="the next one needs a new CSGD"):
        csgd.trim(model, again, random_clusters(again, ratio=0.7), optimizer, tolerance=None)
    assert [ref.extent for space in again for ref in space.refs] == [
        csgd.clusters.tensor_of(model, ref).size(ref.dim) for space in again for ref in space.refs
    ], "nothing was cut"


def test_f7_in_float32_stays_close():
    model, spaces, clusters, _ = collapsed(nets.Residual)
    wide, slim = model.float(), copy.deepcopy(model).float()
    optimizers = [CSGD(csgd.param_groups(m, spaces, clusters, **CONSTANTS), 0.01) for m in (wide, slim)]
    csgd.trim(slim, spaces, clusters, optimizers[1])
    images = torch.randn(6, 3, 8, 8)
    for _ in range(50):
        for m, optimizer in zip((wide, slim), optimizers, strict=True):
            F.cross_entropy(m(images), torch.arange(6) % 5).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (wide(images) - slim(images)).abs().max() < 1e-4


@pytest.mark.parametrize("net", [nets.Residual, nets.Dense, nets.Depthwise])
def test_a_trimmed_average_is_the_average_of_the_trimmed_run(net):
    wide, spaces, clusters, optimizer = collapsed(net)
    slim = copy.deepcopy(wide)
    twin = CSGD(csgd.param_groups(slim, spaces, clusters, **CONSTANTS), 0.01)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True) for m in (wide, slim)]
    for average in averages:
        randomise(average.module)  # its members lag: they are not equal when the network is cut
        average.n_averaged += 1
    averages[1].load_state_dict(copy.deepcopy(averages[0].state_dict()))
    csgd.trim(slim, spaces, clusters, twin)
    csgd.merge_equal(averages[1].module, spaces, clusters)
    csgd.trim(averages[1].module, spaces, clusters)
    for step in range(5, 30):
        take_step(wide, optimizer, net, step)
        take_step(slim, twin, net, step)
        averages[0].update_parameters(wide)
        averages[1].update_parameters(slim)
    csgd.merge_equal(averages[0].module, spaces, clusters)
    csgd.trim(averages[0].module, spaces, clusters)
    for (name, a), (_, b) in zip(*(average.module.state_dict().items() for average in averages), strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-10 * max(1.0, a.abs().max()), name
