import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import csgd
from csgd import CSGD, InputError, decay_matrix, forecast, merge_matrix
from csgd.centripetal import stability_limit
from csgd.optim import set_lr, set_ramp
from csgd.schedule import RAMPS, learning_rate, ramp
from csgd.stacks import KEPT
from tests import nets
from tests.reference import ReferenceCSGD, random_partition, segments_of


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.up = nn.ConvTranspose2d(12, 10, 2, stride=2)
        self.fc = nn.Linear(10, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.up(x)).mean((2, 3)))


def clustered_net(dtype=torch.float64, fraction=0.5, **options):
    torch.manual_seed(0)
    net = Net().to(dtype)
    with torch.no_grad():
        net.bn1.weight.uniform_(0.5, 1.5)
        net.bn1.bias.normal_()
    spaces = csgd.find_spaces(net, torch.randn(2, 3, 8, 8, dtype=dtype))
    clusters = csgd.cluster(net, spaces, csgd.target_widths(spaces, fraction))
    options = dict(centri_strength=0.3, vector_ratio=0.5, weight_decay=1e-2, weight_decay_vectors=3e-3) | options
    return net, spaces, clusters, csgd.param_groups(net, spaces, clusters, **options)


def backward(net, step):
    generator = torch.Generator().manual_seed(step)
    dtype = next(net.parameters()).dtype
    images = torch.randn(8, 3, 8, 8, generator=generator, dtype=dtype)
    labels = torch.randint(5, (8,), generator=generator)
    net.zero_grad()
    loss = F.cross_entropy(net(images), labels)
    loss.backward()
    return loss


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape, dim", [((14, 3, 3, 3), 0), ((6, 14, 2, 2), 1), ((14,), 0)])
def test_fast_path_is_the_dense_formula_and_the_reference_over_50_steps(shape, dim, nesterov):
    generator = torch.Generator().manual_seed(2)
    clusters = random_partition(14, 8, generator)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    eta, eps, lr, momentum = 0.01, 0.4, 0.05, 0.9
    p = nn.Parameter(start.clone())
    group = {"params": [p], "segments": [(dim, segments_of(clusters))], "centri_strength": eps, "weight_decay": eta}
    optimizer = CSGD([group], lr, momentum, nesterov)
    reference = ReferenceCSGD(start, dim, clusters, eta, eps, lr, momentum, nesterov)
    merge, decay = merge_matrix(clusters), decay_matrix(clusters, eta, eps)
    dense, buffer = start.movedim(dim, 0).reshape(14, -1).clone(), 0.0
    for _ in range(50):
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
        p.grad = gradient.clone()
        optimizer.step()
        reference.step(gradient)
        direction = merge @ gradient.movedim(dim, 0).reshape(14, -1) + decay @ dense
        buffer = momentum * buffer + direction
        dense = dense - lr * (direction + momentum * buffer if nesterov else buffer)
        torch.testing.assert_close(p.detach(), reference.weight, rtol=0, atol=1e-12)
        torch.testing.assert_close(p.detach().movedim(dim, 0).reshape(14, -1), dense, rtol=0, atol=1e-12)
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], reference.buffer, rtol=0, atol=1e-12)


def test_without_clusters_it_is_torch_sgd_bit_by_bit():
    nets = [Net(), Net()]
    nets[1].load_state_dict(nets[0].state_dict())
    ours = CSGD(nets[0].parameters(), lr=0.1, weight_decay=1e-3)
    theirs = torch.optim.SGD(nets[1].parameters(), 0.1, 0.9, nesterov=True, weight_decay=1e-3, fused=True)
    for step in range(10):
        for net, optimizer in zip(nets, (ours, theirs), strict=True):
            backward(net, step)
            optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_filter_that_is_alone_takes_the_steps_of_sgd():
    weight, gradient = torch.randn(16, 4, 2, 2), torch.randn(16, 4, 2, 2)
    segments = torch.arange(16)
    segments[3] = 0
    ours, theirs = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    constants = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)
    optimizers = (
        CSGD([{"params": [ours], "segments": [(0, segments)], "centri_strength": 0.7}], **constants),
        torch.optim.SGD([theirs], **constants, fused=True),
    )
    for _ in range(5):
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = gradient * p.detach()
            optimizer.step()
    alone = [row for row in range(16) if row not in (0, 3)]
    torch.testing.assert_close(ours[alone], theirs[alone], rtol=1e-6, atol=1e-7)
    assert (ours[[0, 3]] - theirs[[0, 3]]).abs().min() > 1e-4


def test_layouts_of_gradients_and_momenta_do_not_matter():
    nets = [clustered_net() for _ in range(2)]
    optimizers = [CSGD(groups, 0.05) for *_, groups in nets]
    nets[1][0].to(memory_format=torch.channels_last)
    for step in range(5):
        for (net, *_), optimizer in zip(nets, optimizers, strict=True):
            backward(net, step)
            optimizer.step()
        for p in nets[1][0].parameters():
            if p.dim() == 4:
                buffer = optimizers[1].state[p]["momentum_buffer"]
                optimizers[1].state[p]["momentum_buffer"] = buffer.contiguous(memory_format=torch.contiguous_format)
    for a, b in zip(nets[0][0].parameters(), nets[1][0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradients_are_not_written_to():
    net, *_, groups = clustered_net()
    optimizer = CSGD(groups, 0.05)
    backward(net, 0)
    before = [p.grad.clone() for p in net.parameters()]
    versions = [p.grad._version for p in net.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True))
    assert versions == [p.grad._version for p in net.parameters()]


def test_every_parameter_is_in_one_group_and_vectors_have_their_own_constants():
    net, _, _, groups = clustered_net(bias_lr_factor=2.0)
    assert sorted(map(id, net.parameters())) == sorted(id(p) for group in groups for p in group["params"])
    by_name = {group["name"]: group for group in groups}
    assert {id(p) for p in by_name["kernels"]["params"]} == {id(net.conv1.weight), id(net.up.weight), id(net.fc.weight)}
    assert {id(p) for p in by_name["vectors"]["params"]} == {id(net.bn1.weight)}
    assert {id(p) for p in by_name["biases"]["params"]} == {id(m.bias) for m in (net.conv1, net.bn1, net.up, net.fc)}
    assert by_name["kernels"]["centri_strength"] == 0.3
    assert by_name["biases"]["centri_strength"] == 0.15
    assert by_name["biases"]["lr_factor"] == 2.0
    assert by_name["vectors"]["weight_decay"] == 3e-3
    merged = {id(p): s for g in groups for p, s in zip(g["params"], g["segments"], strict=True) if s}
    assert merged.keys() == {id(p) for m in (net.conv1, net.bn1, net.up) for p in m.parameters()}, (
        "the vectors of a channel move with it"
    )
    assert merged[id(net.up.weight)][0] == 1, "a transposed conv has its filters along dim 1"


def test_f2_the_deviation_never_sees_the_data():
    runs = []
    for data_seed in (0, 1000):
        net, *_, groups = clustered_net()
        optimizer = CSGD(groups, 0.05)
        trace = []
        for step in range(30):
            backward(net, data_seed + step)
            optimizer.step()
            trace.append([float(optimizer.deviation(group)) for group in optimizer.clustered_groups()])
        runs.append(torch.tensor(trace, dtype=torch.float64))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-10, atol=0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_f2_forecast_and_measured_deviation_agree(nesterov):
    net, *_, groups = clustered_net(bias_lr_factor=2.0)
    optimizer = CSGD(groups, 0.05, nesterov=nesterov)
    start = {group["name"]: float(optimizer.deviation(group)) for group in optimizer.param_groups}
    rates = [0.002 * (step + 1) if step < 20 else 0.04 * 0.97**step for step in range(120)]
    expected = {
        g["name"]: forecast([r * g["lr_factor"] for r in rates], g["centri_strength"], g["weight_decay"], 0.9, nesterov)
        for g in optimizer.param_groups
    }
    for step, rate in enumerate(rates):
        csgd.optim.set_lr(optimizer, rate)
        backward(net, step)
        optimizer.step()
        for group in optimizer.param_groups:
            foreseen = start[group["name"]] * expected[group["name"]][step] ** 2
            assert float(optimizer.deviation(group)) == pytest.approx(foreseen, rel=1e-8)


@pytest.mark.parametrize("shape", RAMPS)
@pytest.mark.parametrize("decay", [{"decay": "cosine", "warmup_epochs": 1.0}, {"decay": "step", "milestones": [2, 3]}])
def test_f2_in_float32_the_forecast_holds_within_a_percent(decay, shape):
    options = dict(centri_strength=2.0, vector_ratio=0.8, weight_decay=5e-4, weight_decay_vectors=0.0)
    net, *_, groups = clustered_net(torch.float32, **options)
    optimizer = CSGD(groups, 0.05)
    start = {group["name"]: float(optimizer.deviation(group)) for group in optimizer.param_groups}
    whole = {g["name"]: float(sum(p.detach().square().sum() for p in g["params"])) for g in optimizer.param_groups}
    steps = range(200)
    rates = [learning_rate(step, steps_per_epoch=50, epochs=4, lr=0.05, **decay) for step in steps]
    ramps = [ramp(step, length=100, shape=shape) for step in steps]
    foreseen = {
        g["name"]: forecast(rates, [g["centri_strength"] * r for r in ramps], g["weight_decay"])
        for g in optimizer.param_groups
    }
    reached = 1.0
    for step in steps:
        set_lr(optimizer, rates[step])
        set_ramp(optimizer, ramps[step])
        backward(net, step)
        optimizer.step()
        for group in optimizer.clustered_groups():
            name = group["name"]
            expected, rounding = start[name] * foreseen[name][step] ** 2, 1e-12 * whole[name]
            assert float(optimizer.deviation(group)) == pytest.approx(expected, rel=0.01, abs=rounding), step
            reached = min(reached, expected / whole[name])
    assert reached < 1e-11, "well below the tolerance of 1e-5 ‖W‖"


def test_f3_the_mean_never_sees_the_strength():
    means = []
    for strength in (0.0, 0.3):
        generator = torch.Generator().manual_seed(0)
        clusters = random_partition(10, 4, generator)
        p = nn.Parameter(torch.randn(10, 7, generator=generator, dtype=torch.float64))
        group = {"params": [p], "segments": [(0, segments_of(clusters))], "centri_strength": strength}
        optimizer = CSGD([group], 0.1, weight_decay=0.01)
        for _ in range(40):
            p.grad = torch.randn(10, 7, generator=generator, dtype=torch.float64)
            optimizer.step()
        means.append(merge_matrix(clusters) @ p.detach())
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=1e-12)


def test_f10_rows_of_a_cluster_are_bit_identical_once_equal_and_stay_so():
    net, spaces, clusters, _ = clustered_net(torch.float32)
    csgd.merge_equal(net, spaces, clusters)
    optimizer = CSGD(csgd.param_groups(net, spaces, clusters, centri_strength=0.3), 0.05)
    for step in range(5):
        backward(net, step)
        optimizer.step()
    checked = 0
    for group in optimizer.param_groups:
        for p, segments in zip(group["params"], group["segments"], strict=True):
            if segments:
                for t in (p, optimizer.state[p]["momentum_buffer"]):
                    assert torch.equal(t, t.index_select(segments[0], segments[1]))
                    checked += 1
    assert checked == 2 * 6


def test_f10_a_step_is_repeatable_whatever_the_threads():
    ends = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        clusters = random_partition(256, 100, generator)
        p = nn.Parameter(torch.randn(256, 900, generator=generator))
        optimizer = CSGD([{"params": [p], "segments": [(0, segments_of(clusters))], "centri_strength": 0.3}], 0.1)
        for _ in range(3):
            p.grad = torch.randn(256, 900, generator=generator)
            optimizer.step()
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


def test_f9_clipping_by_global_norm_only_rescales():
    net, *_, groups = clustered_net()
    optimizer = CSGD(groups, 0.05)
    start = float(optimizer.deviation(optimizer.param_groups[0]))
    for step in range(10):
        backward(net, step)
        nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        optimizer.step()
    group = optimizer.param_groups[0]
    expected = start * forecast([0.05] * 10, 0.3, 1e-2)[-1] ** 2
    assert float(optimizer.deviation(group)) == pytest.approx(expected, rel=1e-10)


def test_a_state_dict_round_trip_through_a_file_continues_bit_by_bit(tmp_path):
    net, spaces, clusters, groups = clustered_net(torch.float32)
    optimizer = CSGD(groups, 0.05)
    for step in range(3):
        backward(net, step)
        optimizer.step()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = Net()
    other.load_state_dict(saved["net"])
    singles = {name: [[slot] for part in parts for slot in part] for name, parts in clusters.items()}
    resumed = CSGD(csgd.param_groups(other, spaces, singles, centri_strength=0.0), 0.9)
    resumed.load_state_dict(saved["optimizer"])
    for step in range(3, 6):
        for one, its in ((net, optimizer), (other, resumed)):
            backward(one, step)
            its.step()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_schedulers_and_closures():
    net, *_, groups = clustered_net(bias_lr_factor=2.0)
    optimizer = CSGD(groups, 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    before = net.conv1.weight.detach().clone()
    loss = optimizer.step(lambda: backward(net, 0))
    scheduler.step()
    assert loss.item() > 0
    assert not torch.equal(before, net.conv1.weight)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05] * 3


def test_frozen_parameters_and_missing_gradients_are_left_out():
    net, spaces, clusters, _ = clustered_net()
    net.fc.requires_grad_(False)
    groups = csgd.param_groups(net, spaces, clusters, centri_strength=0.1)
    assert not {id(p) for p in net.fc.parameters()} & {id(p) for group in groups for p in group["params"]}
    optimizer = CSGD(groups, 0.1)
    before = net.up.weight.detach().clone()
    backward(net, 0)
    net.up.weight.grad = None
    optimizer.step()
    assert torch.equal(before, net.up.weight)


def test_memory_does_not_grow_with_the_sets_of_gradients_that_are_there():
    net, spaces, clusters, _ = clustered_net()
    optimizer = CSGD(csgd.param_groups(net, spaces, clusters, centri_strength=0.1), 0.01)
    parameters = list(net.parameters())
    for step in range(2 * KEPT):
        backward(net, step)
        for bit, p in enumerate(parameters):
            if step >> bit & 1:
                p.grad = None
        optimizer.step()
    assert len(optimizer._stacks) <= KEPT


def test_a_parameter_with_gaps_is_updated_in_its_own_entries_alone():
    memory = torch.randn(4, 16)
    beside, p, q = memory[:, 8:].clone(), nn.Parameter(memory[:, :8]), nn.Parameter(memory[:, :8].clone())
    ours, theirs = CSGD([p], 0.1), torch.optim.SGD([q], 0.1, 0.9, nesterov=True)
    for _ in range(3):
        p.grad = q.grad = torch.randn(4, 8)
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q)
    assert torch.equal(memory[:, 8:], beside)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_parameters_may_come_to_their_first_gradient_later(momentum):
    nets, how = [Net(), Net()], dict(momentum=momentum, nesterov=momentum > 0, weight_decay=1e-3)
    nets[1].load_state_dict(nets[0].state_dict())
    segments = [None] * len(list(nets[0].parameters()))
    segments[0] = (0, torch.tensor([0, 0, *range(2, 12)]))
    ours = CSGD([{"params": list(nets[0].parameters()), "segments": segments}], 0.1, **how)
    theirs = torch.optim.SGD(nets[1].parameters(), 0.1, **how)
    for step in range(3):
        for net, optimizer in zip(nets, (ours, theirs), strict=True):
            for late in (net.conv1, net.up):  # as where a part is frozen at first
                late.requires_grad_(step > 0)
            backward(net, step)
            if step and optimizer is theirs:
                net.conv1.weight.grad[:2] = net.conv1.weight.grad[:2].mean(0)
            optimizer.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lr=-1.0), "lr must be 0 or more"),
        (dict(lr=0.1, momentum=1.0), "momentum must be at least 0 and below 1"),
        (dict(lr=0.1, momentum=0.0), "nesterov needs a momentum"),
        (dict(lr=10.0), "centri_strength 0.3 diverges at learning rate 10: .* centri_strength below 0.1257"),
    ],
)
def test_bad_constants_are_refused(options, message):
    *_, groups = clustered_net()
    with pytest.raises(InputError, match=message):
        CSGD(groups, **options)


def test_a_group_that_comes_later_is_checked_too():
    optimizer = CSGD([nn.Parameter(torch.randn(4, 2))], 0.1)
    group = dict(params=[nn.Parameter(torch.randn(4, 2))], segments=[(0, torch.tensor([0, 0, 1, 1]))])
    with pytest.raises(csgd.InputError, match="centri_strength 100 diverges at learning rate 0.1"):
        optimizer.add_param_group(group | {"centri_strength": 100.0})
    optimizer.add_param_group(group | {"centri_strength": 1.0})


def test_negative_strengths_are_refused():
    net, spaces, clusters, _ = clustered_net()
    with pytest.raises(InputError, match="centri_strength must be 0 or more, got -1"):
        csgd.param_groups(net, spaces, clusters, centri_strength=-1)
    with pytest.raises(InputError, match="vector_ratio"):
        csgd.param_groups(net, spaces, clusters, centri_strength=1, vector_ratio=float("nan"))


def odd_parameters():
    """(parameter, gradient of a step) of every kind that networks have beside dense float ones."""
    torch.manual_seed(0)
    gaps = torch.randn(6, 10)
    embedding = nn.Embedding(7, 4, sparse=True)

    def looked_up(step):
        embedding.weight.grad = None
        embedding(torch.tensor([0, 3, 3, step])).square().sum().backward()
        return embedding.weight.grad

    def noise(p):
        return lambda step: torch.randn_like(p)

    return {
        "complex": (p := nn.Parameter(torch.randn(4, 3, dtype=torch.complex64)), noise(p)),
        "sparse": (embedding.weight, looked_up),
        "number": (p := nn.Parameter(torch.randn(())), noise(p)),
        "empty": (p := nn.Parameter(torch.randn(0, 3)), noise(p)),
        "gaps": (p := nn.Parameter(gaps[:, :7]), noise(p)),
        "turned": (p := nn.Parameter(torch.randn(5, 4).T), noise(p)),
        "half": (p := nn.Parameter(torch.randn(4, 16).half()), noise(p)),
        "bfloat16": (p := nn.Parameter(torch.randn(4, 16).bfloat16()), noise(p)),
    }


@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("kind", odd_parameters())
def test_odd_parameters_take_the_steps_of_torch_bit_by_bit(kind, momentum, nesterov):
    """A5: what is outside every cluster takes torch's own path."""
    p, gradient = odd_parameters()[kind]
    q = nn.Parameter(p.detach().clone(memory_format=torch.preserve_format))
    how = dict(momentum=momentum, nesterov=nesterov, weight_decay=0.0 if kind == "sparse" else 1e-3)
    fused = kind in ("number", "empty", "turned", "half", "bfloat16")  # which rounds otherwise than one by one
    beside = nn.Parameter(torch.randn(4, 8))
    ours, theirs = CSGD([p, beside], 0.1, **how), torch.optim.SGD([q], 0.1, **how, fused=fused)
    for step in range(5):
        p.grad = gradient(step)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        assert torch.equal(p, q)


def test_a_network_with_a_sparse_embedding_is_pulled_as_any_other():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.hidden, self.fc = nn.Embedding(9, 6, sparse=True), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(self.hidden(self.words(x)).relu().mean(1))

    net, words = Words(), torch.randint(9, (4, 5))
    spaces = csgd.find_spaces(net, words)
    clusters = {"hidden": [[0, 1, 2], [3, 4]]}
    groups = csgd.param_groups(net, spaces, clusters, centri_strength=8.0, vector_ratio=1.0)
    assert [g["weight_decay"] for g in groups if g["name"] == "sparse"] == [0.0]
    optimizer = CSGD(groups, 0.05)
    for _ in range(150):
        F.cross_entropy(net(words), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert csgd.relative_deviation(net, spaces, clusters) < 1e-5
    net(words).sum().backward()
    optimizer.param_groups[-1]["weight_decay"] = 0.1
    with pytest.raises(InputError, match="sparse gradient, which cannot be decayed: its group needs weight_decay=0"):
        optimizer.step()


def trained_by_sgd(net, parameters, steps=4, **options):
    sgd = torch.optim.SGD(parameters, 0.05, **(dict(momentum=0.9, nesterov=True, weight_decay=1e-3) | options))
    for step in range(steps):
        backward(net, step)
        sgd.step()
    return sgd


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("given", ["parameters", "trained", "groups"])
def test_a_warm_state_of_torch_sgd_goes_on(given, frozen):
    """A19: from SGD's momentum on, means are those of SGD (F3) and the deviation is that of the forecast (F2)."""
    net, spaces, clusters, _ = clustered_net()
    net.up.bias.requires_grad_(not frozen)
    clusters = {name: parts for name, parts in clusters.items() if name == "conv1"}
    groups = csgd.param_groups(net, spaces, clusters, centri_strength=0.0, vector_ratio=0.0)
    sgd = trained_by_sgd(
        net,
        {
            "parameters": list(net.parameters()),
            "trained": [p for p in net.parameters() if p.requires_grad],
            "groups": [{"params": group["params"]} for group in groups],
        }[given],
    )
    twin = copy.deepcopy(net)
    groups = csgd.param_groups(net, spaces, clusters, centri_strength=0.3, vector_ratio=1.0)
    optimizer = CSGD(groups, 0.9, momentum=0.5, weight_decay=0.0)
    optimizer.load_state_dict(copy.deepcopy(sgd.state_dict()))
    assert {(g["lr"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups} == {(0.05, 0.9, 1e-3)}
    assert {g["centri_strength"] for g in optimizer.param_groups} == {0.3}
    buffers = {id(p): sgd.state[p]["momentum_buffer"] for p in net.parameters() if p in sgd.state}
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], buffers[id(p)]) for p in net.fc.parameters())
    start, before = float(optimizer.deviation()), net.conv1.weight.detach().clone()
    generator = torch.Generator().manual_seed(5)
    gradients = [
        {id(p): torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in net.parameters()} for _ in range(3)
    ]
    for gradient in gradients:
        for p in net.parameters():
            p.grad = gradient[id(p)].clone() if p.requires_grad else None
        optimizer.step()
    assert float(optimizer.deviation()) == pytest.approx(start * forecast([0.05] * 3, 0.3, 1e-3)[-1] ** 2, rel=1e-9)
    same = torch.optim.SGD(twin.parameters(), 0.05, 0.9, nesterov=True, weight_decay=1e-3)
    for p, q in zip(twin.parameters(), net.parameters(), strict=True):
        if id(q) in buffers:
            same.state[p]["momentum_buffer"] = buffers[id(q)].clone()
    for gradient in gradients:
        for p, q in zip(twin.parameters(), net.parameters(), strict=True):
            p.grad = gradient[id(q)].clone() if p.requires_grad else None
        same.step()
    for p, q in ((net.conv1.weight, twin.conv1.weight), (net.bn1.bias, twin.bn1.bias)):
        for members in clusters["conv1"]:
            torch.testing.assert_close(p[members].mean(0), q[members].mean(0))
    torch.testing.assert_close(net.fc.weight, twin.fc.weight)
    assert not torch.equal(before, net.conv1.weight)


def test_states_of_other_optimizers_and_networks_are_refused_and_change_nothing():
    net, spaces, clusters, groups = clustered_net()
    optimizer = CSGD(groups, 0.05)
    backward(net, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    adam, prop = torch.optim.Adam(net.parameters()), torch.optim.RMSprop(net.parameters(), momentum=0.9)
    for one in (adam, prop):
        one.step()
    other = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2), nn.Linear(2, 2))
    strange = torch.optim.SGD(other.parameters(), 0.1, 0.9)
    other(torch.randn(3, 4)).sum().backward()
    strange.step()
    wide = CSGD(csgd.param_groups(net, spaces, clusters, centri_strength=0.0), 0.05)
    csgd.merge_equal(net, spaces, clusters)
    for state_dict, message in (
        (adam.state_dict(), "this is another one's"),
        (prop.state_dict(), "this is another one's"),
        (
            trained_by_sgd(net, net.parameters(), 1, nesterov=False, dampening=0.1).state_dict(),
            "CSGD has no dampening=0.1",
        ),
        (trained_by_sgd(net, net.parameters(), 1, maximize=True).state_dict(), "CSGD has no maximize=True"),
        (
            strange.state_dict(),
            r"a state_dict of another network: parameter 0 is \[12, 3, 3, 3\], its momentum \[3, 4\]",
        ),
        (
            torch.optim.SGD(list(net.parameters())[:5], 0.1).state_dict(),
            r"groups of \[5\] parameters does not fit groups",
        ),
    ):
        with pytest.raises(InputError, match=message):
            optimizer.load_state_dict(state_dict)
    assert str(before) == str(optimizer.state_dict())
    csgd.trim(net, spaces, clusters, wide, tolerance=None)
    with pytest.raises(InputError, match="a state_dict of another network"):
        wide.load_state_dict(before)


def test_a_state_of_sgd_without_momentum_is_taken_and_the_first_step_makes_it():
    net, *_, groups = clustered_net()
    optimizer = CSGD(groups, 0.05)
    state_dict = trained_by_sgd(net, net.parameters(), momentum=0.0, nesterov=False).state_dict()
    state_dict["state"] = {
        i: {"momentum_buffer": None} for i in state_dict["param_groups"][0]["params"]
    }  # as SGD once did
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["momentum"] == 0.0
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    backward(net, 0)
    optimizer.step()
    assert all(optimizer.state[p]["momentum_buffer"] is not None for p in net.parameters())


def test_an_optimizer_of_an_older_file_has_every_key():
    net, *_, groups = clustered_net()
    optimizer = CSGD(groups, 0.05)
    state_dict = optimizer.state_dict()
    for group in state_dict["param_groups"]:
        del group["gradient_scales"], group["positions"]
    optimizer.load_state_dict(state_dict)
    backward(net, 0)
    optimizer.step()


def test_f6_a_rate_that_grows_is_refused_at_the_step_before_which_it_does():
    """A20: under a schedule that ends beyond the limit nothing moves there."""
    net, *_, groups = clustered_net(centri_strength=8.0, vector_ratio=1.0)
    optimizer = CSGD(groups, 0.04)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=40, cycle_momentum=False)
    start, rates = float(optimizer.deviation()), []
    while (rate := optimizer.param_groups[0]["lr"]) * 8.01 < stability_limit(0.9, nesterov=True):
        backward(net, len(rates))
        optimizer.step()
        scheduler.step()
        rates.append(rate)
    assert len(rates) > 2
    before = [p.detach().clone() for p in net.parameters()]
    backward(net, 0)
    with pytest.raises(InputError, match="centri_strength 8 diverges at learning rate 0.2.*so centri_strength below 6"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert float(optimizer.deviation()) <= start


def test_f6_strength_ramp_and_momentum_are_looked_at_too():
    for key, value in (
        ("centri_strength", 100.0),
        ("ramp", 50.0),
        ("lr_factor", 50.0),
        ("weight_decay", 100.0),
        ("lr", 9.0),
    ):
        net, *_, groups = clustered_net(centri_strength=2.0, vector_ratio=1.0)
        optimizer = CSGD(groups, 0.05)
        backward(net, 0)
        optimizer.step()
        optimizer.param_groups[0][key] = value
        with pytest.raises(InputError, match="diverges at learning rate"):
            optimizer.step()
    net, *_, groups = clustered_net(centri_strength=27.0, vector_ratio=1.0)
    optimizer = CSGD(groups, 0.05, nesterov=True)  # the limit is 1.357 at a momentum of 0.9, 1.5 at 0.5
    optimizer.param_groups[0]["momentum"] = 0.99
    backward(net, 0)
    with pytest.raises(InputError, match="diverges"):
        optimizer.step()


def test_all_frozen_tensors_are_refused_in_one_line():
    """A7: not one a call."""
    net, spaces, clusters, _ = clustered_net()
    for module in (net.conv1, net.bn1):
        module.requires_grad_(False)
    with pytest.raises(InputError, match="^conv1.weight, conv1.bias, bn1.weight, bn1.bias: not trained, so") as refused:
        csgd.param_groups(net, spaces, clusters, centri_strength=0.1)
    assert "\n" not in str(refused.value)
    csgd.merge_equal(net, spaces, clusters)
    csgd.param_groups(net, spaces, clusters, centri_strength=0.1)  # they are equal as they are


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_parameters_of_16_bits_are_told(dtype, caplog):
    """A22: the pull is rounded away before rows are equal."""
    model, spaces = nets.Plain(), csgd.find_spaces(nets.Plain(), nets.example_of(nets.Plain))
    csgd.param_groups(model.to(dtype), spaces, {"conv1": [[0, 1]]}, centri_strength=1.0)
    told = [record.getMessage() for record in caplog.records if record.name == "csgd.optim"]
    assert len(told) == (dtype != torch.float32)
    assert all(line.startswith("conv1.weight and 4 more tensors have 16 bits, which round") for line in told)
