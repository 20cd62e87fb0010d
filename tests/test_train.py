import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import csgd
from csgd import CSGD, InputError, data
from csgd.centripetal import forecast
from csgd.pipeline.device import as_trained
from csgd.plan import Collapsed, Plan, plan, strengths_by
from csgd.schedule import Timetable, ramp
from csgd.train import (
    DivergedError,
    Learner,
    Sums,
    TrainSpec,
    accuracy,
    criterion,
    logits_of,
    loss_of,
    measured,
    predict,
    train,
)
from csgd.trim import statistics_momentum
from csgd.verify import relative_change

ROOT = Path(__file__).parents[1]


def small_data(seed=0):
    return data.synthetic(
        num_classes=3, image_size=8, train_size=96, test_size=30, batch_size=16, seed=seed, device=torch.device("cpu")
    )


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1),
        nn.Linear(96, 3),
    )  # fmt: skip


def trained(net, optimizer, d, steps=18, rates=None, **how):
    """(moment, sums) after each of `steps`, in epochs of six; the learning rate is 0.05 where there are no `rates`."""
    parts = {key: how.pop(key) for key in ("scaler", "average") if key in how}
    ramp, per_epoch = how.pop("ramp", None), how.pop("steps_per_epoch", 6)
    timetable = Timetable(per_epoch, rates or [0.05] * steps, ramp)
    sums = Sums()
    for moment in train(Learner(net, optimizer, net, **parts), d, timetable, TrainSpec(0, **how), range(steps), sums):
        yield moment, sums
        if moment.epoch_ends:
            sums.clear()


def epochs_of(net, optimizer, d, **how):
    """(step, loss, accuracy) at the end of each epoch."""
    return [(m.step, s.mean_loss, s.accuracy) for m, s in trained(net, optimizer, d, **how) if m.epoch_ends]


def test_training_learns_and_can_be_repeated_bit_by_bit():
    ends = []
    for _ in range(2):
        net, d = small_net(), small_data()
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        epochs = epochs_of(net, optimizer, d)
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(*ends)
    steps, losses, _ = zip(*epochs, strict=True)
    assert steps == (6, 12, 18)
    assert losses[-1] < losses[0]
    assert accuracy(*predict(net, d)) > 0.5


def test_it_yields_after_every_step_with_its_learning_rate():
    net, rates, seen = small_net(), [0.01 * (1 + step) for step in range(12)], []
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    for moment, _ in trained(net, optimizer, small_data(), steps=12, rates=rates, steps_per_epoch=4):
        assert optimizer.param_groups[0]["lr"] == moment.lr
        seen.append((moment.step, moment.epoch, moment.epoch_ends, moment.lr))
    assert seen == [(s + 1, s // 4 + 1, s % 4 == 3, rates[s]) for s in range(12)]


def test_what_the_caller_does_between_two_steps_leaves_the_training_as_it_is():
    ends = []
    for tests in (False, True):
        net, d = small_net(), small_data()
        for _ in trained(net, torch.optim.SGD(net.parameters(), 0.05), d):
            if tests:
                predict(net, d)
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(*ends)


def test_data_that_give_fewer_batches_than_promised_are_refused():
    net, d = small_net(), small_data()
    with pytest.raises(InputError, match="the data gave 6 batches of epoch 1, 7 were to come"):
        list(trained(net, torch.optim.SGD(net.parameters(), 0.05), d, steps_per_epoch=7))


def test_a_batch_in_parts_has_the_same_gradient_but_for_rounding():
    ends = {}
    for accumulation in (1, 3):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        epochs = epochs_of(net, optimizer, small_data(), accumulation=accumulation, clip_norm=1.0)
        ends[accumulation] = torch.cat([p.detach().flatten() for p in net.parameters()]), epochs
    torch.testing.assert_close(ends[1][0], ends[3][0], rtol=1e-4, atol=1e-6)
    for one, other in zip(ends[1][1], ends[3][1], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_parts_have_the_two_images_that_batch_norm_needs():
    d = data.synthetic(
        num_classes=3, image_size=8, train_size=41, test_size=8, batch_size=16, seed=0, device=torch.device("cpu")
    )
    net, seen = small_net(), []
    net[0].register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])) if module.training else None)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    list(trained(net, optimizer, d, steps=3, steps_per_epoch=3, accumulation=6))
    assert seen == [3, 3, 3, 3, 2, 2] * 2 + [3, 2, 2, 2]


def centripetal(net, d, lr=0.05):
    """An optimizer that collapses the net's filters within the 60 steps of a test, its spaces and its clusters."""
    spaces = csgd.find_spaces(net, d.example)
    clusters = csgd.cluster(net, spaces, csgd.target_widths(spaces, 0.5))
    groups = csgd.param_groups(net, spaces, clusters, centri_strength=8.0, vector_ratio=1.0)
    return CSGD(groups, lr), spaces, clusters


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_in_16_bits_the_pull_is_that_of_32(precision):
    net, d = small_net(), small_data()
    optimizer, spaces, clusters = centripetal(net, d)
    group = optimizer.clustered_groups()[0]
    start, factors = float(optimizer.deviation(group)), forecast([0.05] * 60, group["centri_strength"], 1e-4)
    scaler = torch.amp.GradScaler("cpu") if precision == "float16" else None
    losses = []
    for moment, sums in trained(
        net, optimizer, d, 60, clip_norm=1.0, precision=getattr(torch, precision), scaler=scaler
    ):
        foreseen = start * factors[moment.step - 1] ** 2
        losses += [sums.mean_loss] if moment.epoch_ends else []
        if moment.step == 6:
            assert float(optimizer.deviation(group)) == pytest.approx(foreseen, rel=0.01), "no step was left out"
    assert optimizer.relative_deviation() < 1e-5
    assert losses[-1] < losses[0]
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    before, _ = predict(net, d)
    csgd.trim(net, spaces, clusters)  # its statistics lag, at a momentum of 0.1
    assert relative_change(before, predict(net, d)[0]).max() < 1e-4


def test_a_step_that_overflows_is_left_out():
    net, d = small_net(), small_data()
    optimizer, *_ = centripetal(net, d)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = [p.detach().clone() for p in net.parameters()]
    list(trained(net, optimizer, d, steps=1, precision=torch.float16, scaler=scaler))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0**59


class Compact(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(288, 3)

    def forward(self, images):
        return self.fc(self.bn(self.conv(images)).relu().flatten(1))


def test_compiled_once_before_and_once_after_the_cut():
    sizes = dict(num_classes=3, image_size=8, train_size=186, test_size=30)  # the last batch of an epoch is smaller
    d = data.synthetic(**sizes, batch_size=32, seed=0, device=torch.device("cpu"))
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = Compact()
        optimizer, spaces, clusters = centripetal(net, d)
        csgd.merge_equal(net, spaces, clusters)
        torch._dynamo.utils.counters.clear()
        for phase in (0, 1):
            learner = Learner(net, optimizer, as_trained(net, compiled))
            timetable, steps = Timetable(6, [0.05] * 24), range(12 * phase, 12 * phase + 12)
            list(train(learner, d, timetable, TrainSpec(0), steps))
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled * (phase + 1)
            if phase == 0:
                csgd.trim(net, spaces, clusters, optimizer)
        ends.append(predict(net, d)[0])
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-3)


def test_few_channels_of_a_strided_conv_of_one_pixel_do_not_corrupt_memory():
    code = """
import torch
from torch import nn
from csgd.pipeline.device import place
torch.set_num_threads(2)
for inputs in (4, 8, 10, 15):
    net = nn.Sequential(nn.Conv2d(3, inputs, 3, padding=1), nn.Conv2d(inputs, 20, 1, stride=2, bias=False))
    twin = nn.Sequential(nn.Conv2d(3, inputs, 3, padding=1), nn.Conv2d(inputs, 20, 1, stride=2, bias=False)).double()
    twin.load_state_dict(net.state_dict())
    net = place(net, torch.device("cpu"))
    for batch in (32, 29, 32, 29):
        images = torch.randn(batch, 3, 16, 16).contiguous(memory_format=torch.channels_last)
        net(images).square().mean().backward()
        twin(images.double()).square().mean().backward()
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad.float(), rtol=1e-4, atol=1e-5)
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr[-2000:]


def test_smoothed_labels():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    probabilities = 0.9 * F.one_hot(labels, 3) + 0.1 / 3
    expected = -(probabilities * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(criterion(logits, labels, 0.1), expected)
    assert criterion(logits, labels) != pytest.approx(expected.item(), rel=1e-3)


def test_a_run_in_parts_is_the_run_bit_by_bit():
    ends, timetable = [], Timetable(6, [0.05] * 18)
    for cuts in ([0, 18], [0, 4, 11, 12, 18]):
        net, d, losses, sums = small_net(), small_data(), [], Sums()
        learner = Learner.of(net, torch.optim.SGD(net.parameters(), 0.05, 0.9))
        for first, last in pairwise(cuts):
            for moment in train(learner, d, timetable, TrainSpec(0), range(first, last), sums):
                if moment.epoch_ends:
                    losses.append((moment.step, sums.mean_loss, sums.accuracy))
                    sums.clear()
        ends.append((torch.cat([p.detach().flatten() for p in net.parameters()]), losses))
    (whole, losses), (parts, losses_of_parts) = ends
    assert torch.equal(whole, parts)
    assert losses == losses_of_parts


def test_sums_are_of_the_steps_since_they_were_cleared():
    sums = Sums()
    for loss in (1.0, 2.0):
        sums.add(torch.tensor(loss), hits=torch.tensor(3.0), images=4)
    sums.seconds = 5.0
    shared = sums.shared()
    assert (shared.mean_loss, shared.accuracy, shared.seconds_per_step) == (1.5, 0.75, 2.5)
    sums.clear()
    assert sums == Sums(unchecked=sums.unchecked)
    assert [float(loss) for loss in sums.unchecked] == [1.0, 2.0], "which are still to be looked at"


def test_a_criterion_and_a_score_of_the_datas_own():
    d, ends = small_data(), []
    for own in (
        d,
        replace(d, criterion=F.cross_entropy, score=lambda outputs, labels: float(outputs[labels == 0].sum())),
    ):
        torch.manual_seed(0)
        net = small_net()
        told = [s.accuracy for _, s in trained(net, torch.optim.SGD(net.parameters(), 0.05), own, accumulation=2)]
        ends.append((torch.cat([p.detach().flatten() for p in net.parameters()]), told))
    assert torch.equal(ends[0][0], ends[1][0])
    assert max(ends[0][1]) > 0
    assert ends[1][1] == [0] * len(ends[0][1]), "hits are not counted for a score that does not ask for them"
    (logits,), labels = predict(net, own)
    assert measured(net, own) == float(logits[labels == 0].sum())
    assert measured(net, d) == accuracy(logits, labels)
    other = replace(d, criterion=lambda outputs, labels: F.cross_entropy(outputs, labels) / 2)
    halved = loss_of(other, logits, labels)
    torch.testing.assert_close(halved, loss_of(d, logits, labels) / 2)


def test_the_images_of_an_epoch_are_loaded_once():
    d, drawn = small_data(), []

    def counted(epoch):
        for batch in d.train_batches(epoch):
            drawn.append(epoch)
            yield batch

    net = small_net()
    for _ in trained(net, torch.optim.SGD(net.parameters(), 0.05), replace(d, train_batches=counted)):
        pass
    assert drawn == [0] * 6 + [1] * 6 + [2] * 6


def test_csgd_in_the_same_loop_follows_its_plan_to_the_collapse():
    net, d = small_net(), small_data()
    spaces = csgd.find_spaces(net, d.example)
    clusters = csgd.cluster(net, spaces, csgd.target_widths(spaces, 0.5))
    optimizer = CSGD(csgd.param_groups(net, spaces, clusters, centri_strength=8.0, vector_ratio=1.0), 0.05)
    ahead = plan(optimizer.clustered_groups(), Timetable(6, [0.05] * 60), Collapsed(1e-5))
    assert ahead.collapses
    assert ahead.advice is None
    start = {group["name"]: float(optimizer.deviation(group)) for group in optimizer.clustered_groups()}
    for moment, _ in trained(net, optimizer, d, 60):
        for group in optimizer.clustered_groups():
            foreseen = start[group["name"]] * ahead.factors[group["name"]][moment.step - 1] ** 2
            if foreseen > 1e-8 * start[group["name"]]:  # above the float32 floor
                assert float(optimizer.deviation(group)) == pytest.approx(foreseen, rel=0.01)
    assert optimizer.relative_deviation() < 1e-5
    before, labels = predict(net, d)
    csgd.trim(net, spaces, clusters)  # its statistics lag, at a momentum of 0.1
    after, _ = predict(net, d)
    assert relative_change(before, after).max() < 1e-4
    assert accuracy(before, labels) == accuracy(after, labels)


def test_a_plan_that_does_not_collapse_says_what_would():
    net, d = small_net(), small_data()
    spaces = csgd.find_spaces(net, d.example)
    clusters = csgd.cluster(net, spaces, csgd.target_widths(spaces, 0.5))

    def ahead(strength, steps=400, ratio=0.1):
        groups = csgd.param_groups(net, spaces, clusters, centri_strength=strength, vector_ratio=ratio)
        return plan(CSGD(groups, 0.05).clustered_groups(), Timetable(6, [0.05] * steps), Collapsed(1e-5))

    weak = ahead(0.1)
    assert not weak.collapses
    assert weak.left == pytest.approx(abs(weak.factors["vectors"][-1]))
    strength, longer = (float(part.split()[i]) for part, i in zip(weak.advice.split(" or "), (-1, 0), strict=True))
    assert ahead(strength).collapses
    assert not ahead(0.97 * strength).collapses
    assert ahead(0.1, round(400 * longer * 1.05)).collapses

    short = ahead(2.0, steps=60)  # the strength that vectors need at a tenth would make the kernels diverge
    assert "with a vector_ratio of 1" in short.advice
    assert ahead(float(short.advice.split("centri_strength of ")[1].split()[0]), 60, 1.0).collapses
    assert ahead(0.0).advice.startswith("a centri_strength of")


def test_the_collapse_step_by_hand():
    tall = Plan({"kernels": [0.5, 0.05, 0.2, 0.01, 0.0], "vectors": [0.5, 0.09, 0.0, 0.0, 0.0]}, tolerance=0.1)
    assert tall.collapse_step == 4, "the third step rings above the tolerance again"
    assert Plan({"kernels": [0.5, 0.05]}, tolerance=0.01).collapse_step is None
    lagging = Plan({"kernels": [0.0] * 60}, tolerance=0.01, statistics_momentum=0.1)
    assert lagging.collapse_step == 44, "0.9 to the 44 is below 0.01"


def test_statistics_that_forget_nothing_are_not_promised_to_collapse():
    """A16: momentum=None is an average over all batches."""
    net, d = small_net(), small_data()
    assert statistics_momentum(net) == 0.1
    net[1].momentum = None
    assert statistics_momentum(net) == 0.0
    spaces = csgd.find_spaces(net, d.example)
    clusters = csgd.cluster(net, spaces, csgd.target_widths(spaces, 0.5))
    optimizer = CSGD(csgd.param_groups(net, spaces, clusters, centri_strength=8.0, vector_ratio=1.0), 0.05)
    timetable, collapsed = Timetable(6, [0.05] * 60), Collapsed(1e-5, statistics_momentum(net))
    ahead = plan(optimizer.clustered_groups(), timetable, collapsed)
    assert ahead.collapse_step is None
    assert "average over all batches and forget none, never do" in ahead.warning
    assert ahead.warning.endswith("(momentum=None) would do")
    with pytest.raises(InputError, match="no strength makes running statistics collapse that average over all batches"):
        strengths_by(optimizer.clustered_groups(), timetable, collapsed, 60)
    with torch.no_grad():
        net[1].running_mean.uniform_(-1, 1)
    net[1].num_batches_tracked.fill_(1000)
    list(trained(net, optimizer, d, 60))
    assert optimizer.relative_deviation() < 1e-5
    with pytest.raises(InputError, match=r"^1\.running_mean has not collapsed"):
        csgd.trim(net, spaces, clusters)
    net[1].momentum = 0.1
    late = Plan({"kernels": [0.0] * 20}, 1e-5, 0.1)
    assert "with a momentum of 0.1, not before the end" in late.warning
    assert Plan({"kernels": [0.0] * 20}, 1e-5).warning is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_parameters_of_16_bits_nothing_is_promised_that_does_not_happen(dtype):
    """A22: steps below the resolution of a weight vanish."""
    left, promised = {}, {}
    for kind in (dtype, torch.float32):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
        spaces = csgd.find_spaces(net, torch.randn(2, 12))
        clusters = csgd.cluster(net, spaces, csgd.target_widths(spaces, 0.5))
        net.to(kind)
        groups = csgd.param_groups(net, spaces, clusters, centri_strength=0.3, vector_ratio=1.0)
        optimizer = CSGD(groups, 0.05)
        promised[kind] = plan(optimizer.clustered_groups(), Timetable(6, [0.05] * 300), Collapsed(1e-3))
        images, labels = torch.randn(32, 12, dtype=kind), torch.arange(32) % 3
        for _ in range(300):
            F.cross_entropy(net(images).float(), labels).mul(1e-3).backward()
            optimizer.step()
            optimizer.zero_grad()
        left[kind] = csgd.relative_deviation(net, spaces, clusters)
    assert left[dtype] > 1e-3 > left[torch.float32], "the same pull"
    fine, coarse = promised[torch.float32], promised[dtype]
    assert fine.collapses
    assert not coarse.collapses
    assert coarse.collapse_step is None
    assert left[dtype] / 10 < coarse.left < 10 * left[dtype]
    assert coarse.advice == "float32 parameters (autocast keeps them)"
    assert coarse.warning.endswith("float32 parameters (autocast keeps them) would do")
    assert "16 bits round the pull away" in coarse.describe()
    assert "16 bits" not in fine.describe()


@pytest.mark.parametrize("shape", ["linear", "quadratic", "cosine"])
def test_a_ramped_run_follows_its_plan(shape):
    net, d = small_net(), small_data()
    spaces = csgd.find_spaces(net, d.example)
    clusters = csgd.cluster(net, spaces, csgd.target_widths(spaces, 0.5))
    ramps = [ramp(step, length=60, shape=shape) for step in range(90)]
    timetable, collapsed = Timetable(6, [0.05] * 90, ramps), Collapsed(1e-3)
    blank = CSGD(csgd.param_groups(net, spaces, clusters, centri_strength=0.0), 0.05)
    solved = strengths_by(blank.clustered_groups(), timetable, collapsed, 70)
    groups = csgd.param_groups(net, spaces, clusters, centri_strength=solved["kernels"], vector_ratio=1.0)
    optimizer = CSGD(groups, 0.05)
    ahead = plan(optimizer.clustered_groups(), timetable, collapsed)
    assert ahead.collapse_step == pytest.approx(70, abs=2)
    start = {group["name"]: float(optimizer.deviation(group)) for group in optimizer.clustered_groups()}
    for moment, _ in trained(net, optimizer, d, 90, ramp=ramps):
        for group in optimizer.clustered_groups():
            foreseen = start[group["name"]] * ahead.factors[group["name"]][moment.step - 1] ** 2
            if foreseen > 1e-8 * start[group["name"]]:
                assert float(optimizer.deviation(group)) == pytest.approx(foreseen, rel=0.01)


def test_nan_stops_and_names_the_step():
    net, d = small_net(), small_data()
    rates = [0.01] * 7 + [1e30] * 11
    with pytest.raises(DivergedError, match="the loss at step (8|9|10) is not a number"):
        list(trained(net, torch.optim.SGD(net.parameters(), 0.1), d, rates=rates))


def test_auxiliary_heads_count_by_their_weight():
    main, aux, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    expected = F.cross_entropy(main, labels) + 0.3 * F.cross_entropy(aux, labels)
    torch.testing.assert_close(criterion((main, aux), labels), expected)
    torch.testing.assert_close(criterion((main, None), labels), F.cross_entropy(main, labels))
    assert logits_of((main, aux)) is main
