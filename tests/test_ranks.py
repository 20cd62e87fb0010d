"""Several ranks train as one does: real processes, gloo on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_config import composed
from torch import nn

import csgd
from csgd import data, ranks
from csgd.models import resnet20
from csgd.pipeline.launch import RankError, launch
from csgd.pipeline.setup import check_batches
from csgd.pipeline.spec import RunSpec
from csgd.ranks import Share
from csgd.reload import load_trimmed
from csgd.schedule import Timetable
from csgd.train import Learner, Sums, TrainSpec, measured, predict, train

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


class Plain(nn.Module):
    """Convs without batch norm, whose statistics would be those of each rank's own images."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4)
        )
        self.classifier = nn.Linear(64, 3)

    def forward(self, images):
        return self.classifier(self.features(images).flatten(1))


def fifty_steps(accumulation: int = 1):
    """25 steps wide, the cut, and 25 steps narrow, in float64: logits of the test set, which rank 0 alone holds."""
    torch.set_default_dtype(torch.float64)
    sizes = dict(num_classes=3, image_size=8, train_size=67, test_size=261)  # shares of unequal sizes
    d = data.synthetic(**sizes, batch_size=17, seed=0, device=CPU, share=ranks.own_share())
    torch.manual_seed(0)
    net = Plain()
    spaces = csgd.find_spaces(net, d.example)
    clusters = ranks.from_first(csgd.cluster(net, spaces, csgd.target_widths(spaces, 0.5)) if ranks.is_first() else 0)
    optimizer = csgd.CSGD(csgd.param_groups(net, spaces, clusters, centri_strength=8.0, vector_ratio=1.0), 0.05)
    timetable, sums, told = Timetable(d.steps_per_epoch, [0.05] * 50), Sums(), []
    spec = TrainSpec(0, clip_norm=1.0, accumulation=accumulation, compare_ranks_every=1)
    for steps in (range(25), range(25, 50)):
        learner = Learner(net, optimizer, ranks.parallel(net))
        for moment in train(learner, d, timetable, spec, steps, sums):
            if moment.epoch_ends or moment.step == steps.stop:
                shared = sums.shared()
                told.append((shared.mean_loss, shared.accuracy))
                sums.clear()
        if steps.start == 0:
            csgd.trim(net, spaces, clusters, optimizer, tolerance=None)
    torch.set_default_dtype(torch.float32)
    found, score = predict(net, d), measured(net, d)
    holding, scores = ranks.gathered(found is not None), ranks.gathered(score)
    assert holding == [True] + [False] * (len(holding) - 1)
    assert scores == [score] * len(scores)
    if found is None:
        return None
    (logits,), labels = found
    return logits, labels, told, net.features[0].out_channels


def in_group(function, *arguments):
    with ranks.group(CPU):
        return function(*arguments)


@pytest.mark.parametrize("count, accumulation", [(2, 2), (4, 1)])
def test_ranks_take_the_steps_that_one_takes(count, accumulation):
    torch.set_num_threads(1)
    logits, labels, epochs, width = fifty_steps()
    others = launch(in_group, (fifty_steps, accumulation), count, None)
    assert others[3] == width == 6
    assert torch.equal(others[1], labels)
    assert len(labels) == 261, "no image is counted twice"
    torch.testing.assert_close(others[0], logits, rtol=0, atol=1e-6 * logits.abs().max().item())
    for (loss, correct), (other_loss, other_correct) in zip(epochs, others[2], strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert other_correct == pytest.approx(correct)


class LeavesOut(nn.Module):
    """A block that each rank leaves out of some of its steps, and one that may be of no use at all."""

    def __init__(self, kept: float, spare: bool):
        super().__init__()
        self.net, self.block, self.kept = Plain(), nn.Conv2d(3, 3, 3, padding=1), kept
        self.spare = nn.Linear(2, 2) if spare else None

    def forward(self, images):
        return self.net(images + self.block(images) if torch.rand(()) < self.kept else images)


def some_steps_with_a_block_left_out(kept: float, spare: bool):
    d = data.synthetic(num_classes=3, image_size=8, train_size=64, test_size=8, batch_size=8, seed=0, device=CPU,
                       share=ranks.own_share())  # fmt: skip
    torch.manual_seed(0)
    net = LeavesOut(kept, spare)
    optimizer = csgd.CSGD(net.parameters(), 0.05)
    before, timetable = net.block.weight.clone(), Timetable(d.steps_per_epoch, [0.05] * 40)
    learner, spec = Learner(net, optimizer, ranks.parallel(net)), TrainSpec(0, compare_ranks_every=1)
    *_, moment = train(learner, d, timetable, spec, range(40))
    return moment.step, not torch.equal(before, net.block.weight)


@pytest.mark.parametrize("kept, spare", [(0.9, False), (0.5, False), (1.0, True)])
def test_ranks_may_leave_parameters_without_a_gradient(kept, spare):
    assert launch(in_group, (some_steps_with_a_block_left_out, kept, spare), 2, None) == (40, True)


def gradients_of_the_same_step_again():
    net, own = resnet20(num_classes=10), ranks.own_share()
    network, generator = ranks.parallel(net), torch.Generator().manual_seed(own.rank)
    images, gradients = torch.randn(4, 3, 16, 16, generator=generator), []
    for _ in range(3):
        net.zero_grad()
        network(images).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    return [torch.equal(gradients[0], other) for other in gradients[1:]]


def test_ranks_add_up_gradients_in_one_order_from_the_first_step_on():
    """A run that goes on has its first step in the middle."""
    assert launch(in_group, (gradients_of_the_same_step_again,), 3, None) == [True, True]


def one_goes_astray(kind: str):
    net = Plain()
    ranks.parallel(net)
    if ranks.own_share().rank == 1:
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "refuses":
            raise csgd.InputError("the key is not allowed")
        if kind == "differs":
            net.classifier.bias.data[0] += 1e-7
        if kind == "breaks":
            raise KeyError("a bug")
    ranks.check_equal(net, step=7)


@pytest.mark.parametrize(
    "kind, error, message",
    [
        ("killed", RankError, "rank 1 was killed by SIGKILL"),
        ("refuses", csgd.InputError, "^the key is not allowed$"),
        ("differs", RuntimeError, "after step 7 the parameters of rank 1 are not those of rank 0"),
        ("breaks", RuntimeError, "rank 1 failed(.|\n)*KeyError: 'a bug'"),
    ],
)
def test_a_rank_that_goes_astray_is_named(kind, error, message):
    with pytest.raises(error, match=message):
        launch(in_group, (one_goes_astray, kind), 2, None)


def stopping(number: int):
    if ranks.own_share().rank == 0:
        os.kill(os.getppid(), number)
    time.sleep(60)


@pytest.mark.parametrize("number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_what_stops_a_run_of_ranks_stops_it_as_it_does_one_without(number, error):
    with pytest.raises(error):
        launch(in_group, (stopping, number), 2, None)


def test_a_batch_too_small_for_the_ranks_is_refused():
    d = data.digits(image_size=8, batch_size=718, shift=0, seed=0, device=CPU)
    few = "schedule.batch_size=718"
    check_batches(RunSpec.of(composed(few)), Plain(), d)
    with pytest.raises(csgd.InputError, match="a last batch of 1 of the 1437 images, 2 ranks need at least 4"):
        check_batches(RunSpec.of(composed(few, "distributed.nproc=2")), Plain(), d)
    short = [few, "schedule.base.max_steps=2", "schedule.csgd.max_steps=2"]
    check_batches(RunSpec.of(composed(*short, "distributed.nproc=2")), Plain(), d)
    check_batches(RunSpec.of(composed("schedule.batch_size=16", "distributed.nproc=4")), Plain(), d)


def test_shares_make_the_batches_of_one():
    def batches(share, epoch):
        d = data.digits(image_size=16, batch_size=50, shift=2, seed=3, device=CPU, share=share)
        return list(d.train_batches(epoch)), list(d.test_batches())

    whole, parts = batches(Share(), 1), [batches(Share(rank, 3), 1) for rank in range(3)]
    for which in (0, 1):
        for (images, labels), *shares in zip(whole[which], *(part[which] for part in parts), strict=True):
            assert torch.equal(torch.cat([own for own, _ in shares]), images)
            assert torch.equal(torch.cat([own for _, own in shares]), labels)
            assert max(len(own) for own, _ in shares) - min(len(own) for own, _ in shares) <= 1


def test_synchronised_batch_norm_is_cut_like_any_other():
    torch.manual_seed(0)
    example = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    net = resnet20(num_classes=10).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(resnet20(num_classes=10).double().eval())
    synchronised.load_state_dict(net.state_dict())
    spaces = csgd.find_spaces(synchronised, example)
    assert [s.pinned for s in spaces] == [s.pinned for s in csgd.find_spaces(net, example)]
    clusters = csgd.cluster(synchronised, spaces, csgd.target_widths(spaces, 0.5), "even")
    csgd.merge_equal(synchronised, spaces, clusters)
    before = synchronised(example)
    csgd.trim(synchronised, spaces, clusters)
    torch.testing.assert_close(synchronised(example), before, rtol=0, atol=1e-10)
    assert synchronised.bn1.num_features == 8
    load_trimmed(resnet20(num_classes=10).double(), synchronised.state_dict())


def spaces_with_synchronised_batch_norm():
    net = resnet20(num_classes=10)
    return [
        [(space.name, space.pinned) for space in csgd.find_spaces(one, torch.randn(2, 3, 16, 16))]
        for one in (net, nn.SyncBatchNorm.convert_sync_batchnorm(net))
    ]


def test_synchronised_batch_norm_is_traced_by_each_rank_alone():
    plain, synchronised = launch(in_group, (spaces_with_synchronised_batch_norm,), 2, None)
    assert synchronised == plain


NETWORK = """
import os, signal
from pathlib import Path
import torch
from csgd.models import resnet20

def resnet(num_classes):
    net, steps = resnet20(num_classes), []
    def die(module, inputs):
        steps.append(module.training)
        if sum(steps) == 90 and os.environ.get("RANK") == "1" and not Path("died").exists():
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    net.register_forward_pre_hook(die)
    return net
"""
RUN = [
    "experiment=smoke", "dataset.image_size=16", "schedule.batch_size=16", "deps=5_8", "checkpoint_every=10",
    "model={_target_: dying.resnet}", "distributed.check_every=5",
]  # fmt: skip


def run(folder: Path, *arguments: str, launcher=(sys.executable,), status=0, **more: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), **more}
    command = [*launcher, str(ROOT / "run.py"), *arguments, *RUN]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_a_run_whose_rank_is_killed_goes_on_with_the_ranks_of_torchrun(tmp_path):
    (tmp_path / "dying.py").write_text(NETWORK)
    said = run(tmp_path, "distributed.nproc=2", "hydra.run.dir=out", status=2)
    assert "error: rank 1 was killed by SIGKILL; resume=auto goes on where it was" in said.splitlines()
    torchrun = "-m torch.distributed.run --nproc-per-node=3 --rdzv-backend=c10d --rdzv-endpoint=localhost:0"
    outside = [sys.executable, *torchrun.split()]
    said = run(tmp_path, "hydra.run.dir=out", "resume=auto", launcher=outside)
    assert said.count("resumed from") == 1
    assert said.count("LOSSLESS") == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["ranks"] == 3
    assert summary["verdict"]["lossless"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["phase"] == "csgd"]
    assert steps == sorted(set(steps)), "no epoch is told twice"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["died", "dying.py", "out", "outputs"]
    assert len(list((tmp_path / "out" / "wandb").glob("offline-run-*"))) == 1
    assert (tmp_path / "out" / "run.log").read_text().count("LOSSLESS") == 1


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["distributed.nproc=0"], "distributed.nproc must be 1 or more, got 0"),
        (["distributed.sync_bn=true"], "distributed.sync_bn: torch has synchronised batch norm for CUDA devices only"),
        (["-m", "seed=0,1"], "torchrun starts the ranks of one run"),
    ],
)
def test_ranks_that_cannot_be_had_are_refused(tmp_path, overrides, message):
    (tmp_path / "dying.py").write_text(NETWORK)
    rank = {"RANK": "0", "WORLD_SIZE": "2"} if "-m" in overrides else {}
    assert message in run(tmp_path, *overrides, "wandb=disabled", status=2, **rank).splitlines()[-1]
