"""The pull of a run: a Collapse by default, equal to the bit at the step named before the first batch (fact F11)."""

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_config import composed
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import csgd
from csgd.checkpoint import load_weights
from csgd.clusters import cluster
from csgd.collapse import Collapse
from csgd.data import Data, digits
from csgd.pipeline import run
from csgd.pipeline.foresee import foresee, stage_plan
from csgd.pipeline.learners import csgd_optimizer
from csgd.pipeline.progress import Part, Progress
from csgd.pipeline.setup import prepare
from csgd.pipeline.spec import RunSpec

SMOKE = ["experiment=smoke", "dataset.image_size=16", "wandb=disabled", "quiet=true", "report=false"]


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def rows_of(folder: Path) -> Iterator[dict]:
    return map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())


@pytest.fixture(scope="module")
def base_cache(tmp_path_factory):
    return f"base.cache={tmp_path_factory.mktemp('base')}"


@pytest.fixture
def member_spreads(monkeypatch) -> list[float]:
    """The largest difference of the members of any cluster, in every tensor of the network, just before each cut."""
    spreads, finish = [], Collapse.finish

    def looking(self):
        tensors = [(place, place.tensors[place.attribute].detach()) for place in self._places]
        spreads.append(max(float((t - t.index_select(p.dim, p.segments.to(t.device))).abs().max()) for p, t in tensors))
        finish(self)

    monkeypatch.setattr(Collapse, "finish", looking)
    return spreads


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["schedule.csgd.optimizer=adamw", "schedule.csgd.lr=null", "curve=linear", "collapse_by=0.3"],
        ["schedule.ema=0.9"],
        ["after_trim=plain", "schedule.csgd.clip_norm=1.0", "schedule.accumulation=2"],
        ["deps.stages=[0.75,0.5]"],
    ],
    ids=["default", "adamw", "average", "plain", "stages"],
)
def test_members_are_equal_to_the_bit_at_the_step_named_before_the_first_batch(
    tmp_path, base_cache, member_spreads, overrides
):
    run(composed(*SMOKE, base_cache, *overrides, "plan_only=true"), tmp_path / "plan")
    named = json.loads((tmp_path / "plan" / "plan.json").read_text())["forecast"]["collapse_step"]
    verdict = run(composed(*SMOKE, base_cache, *overrides), tmp_path / "run")
    summary = summary_of(tmp_path / "run")
    assert [stage["cut"]["step"] for stage in summary["stages"]] == [named] * len(summary["stages"])
    assert member_spreads == [0.0] * len(summary["stages"])
    assert verdict.lossless
    assert verdict.relative_deviation == verdict.deviation == 0
    assert 0 < verdict.relative_logit_change < 2e-6
    assert summary["strengths"] == {}


def test_the_deviation_follows_its_curve(tmp_path, base_cache):
    run(composed(*SMOKE, base_cache, "schedule.csgd={epochs: 4, lr: 0.05, max_steps: 20}", "collapse_by=1"), tmp_path)
    wide = [row for row in rows_of(tmp_path) if "left/filters" in row]
    assert [row["step"] for row in wide] == [20, 40, 60, 80]
    for row in wide[:-1]:  # scaled where the curve has fallen by 5 %, and weight decay takes a little besides
        assert row["left/filters"] == pytest.approx(row["forecast/filters"], rel=0.12)
    assert wide[-1]["left/filters"] == 0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("part", [Part.WIDE, Part.NARROW])
def test_a_run_that_is_killed_in_either_part_ends_with_the_same_bytes(
    tmp_path, base_cache, monkeypatch, optimizer, part
):
    cfg = composed(*SMOKE, base_cache, f"schedule.csgd.optimizer={optimizer}", "schedule.csgd.lr=null",
                   "checkpoint_every=7", "resume=auto")  # fmt: skip
    run(cfg, tmp_path / "whole")
    save = Progress.save

    def killed(self, setup):
        save(self, setup)
        if self.part is part and self.step in (21, 84):
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(cfg, tmp_path / "killed")
    monkeypatch.setattr(Progress, "save", save)
    run(cfg, tmp_path / "killed")
    whole, resumed = (load_weights(tmp_path / name / "pruned.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_steps_that_a_scaler_leaves_out_come_later_or_are_told(tmp_path, base_cache, monkeypatch):
    """The first steps overflow under a scaler that starts too high."""
    monkeypatch.setattr("csgd.pipeline.learners.GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**24))
    short = [*SMOKE, base_cache, "precision=fp16", "schedule.csgd.max_steps=20"]
    verdict = run(composed(*short, "collapse_by=0.5"), tmp_path / "later")
    assert verdict.relative_deviation == 0
    cut = summary_of(tmp_path / "later")["cut"]
    assert cut["step"] == cut["foreseen_step"] + 10, "the next look"
    verdict = run(composed(*short, "collapse_by=1"), tmp_path / "told")
    assert not verdict.lossless
    assert 0 < verdict.relative_deviation < 0.3


class Answers(nn.Module):
    """Says its logits in a dict."""

    def __init__(self, num_classes):
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, num_classes)

    def forward(self, images):
        return {"logits": self.fc(self.second(self.first(images).relu()).relu().mean((2, 3)))}


def test_a_network_that_returns_a_dict_is_trained_cut_and_judged(tmp_path):
    cfg = composed(*SMOKE, "model={_target_: test_pull.Answers}", f"base.cache={tmp_path / 'base'}")
    assert run(cfg, tmp_path / "out").lossless


class Frozen(nn.Module):
    """A convolution before a batch norm that is frozen."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8), nn.Linear(8, num_classes)
        self.norm.weight.copy_(torch.linspace(0.5, 1.5, 8))

    def forward(self, images):
        return self.fc(self.norm(self.conv(images)).relu().mean((2, 3)))


def test_frozen_statistics_stay_whole_under_the_published_pull_alone(tmp_path):
    net = [*SMOKE, "model={_target_: test_pull.Frozen}", "deps=1_2", f"base.cache={tmp_path / 'base'}"]
    verdict = run(composed(*net), tmp_path / "default")
    assert verdict.lossless
    assert summary_of(tmp_path / "default")["widths"] == {"conv": 4}
    with pytest.raises(csgd.InputError, match="nothing in this network can be trimmed .conv: training does not change"):
        run(composed(*net, "centri_strength=15"), tmp_path / "published")


class Normed(nn.Module):
    """A convolution before a norm over its channels, and one before a norm of 2 groups."""

    def __init__(self, num_classes):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3), nn.GroupNorm(1, 12)
        self.conv, self.groups, self.fc = nn.Conv2d(12, 16, 3), nn.GroupNorm(2, 16), nn.Linear(16, num_classes)

    def forward(self, images):
        x = self.norm(self.stem(images)).relu()
        return self.fc(self.groups(self.conv(x)).relu().mean((2, 3)))


def test_norms_over_channels_are_cut_by_clusters_of_one_size_and_tables_say_so(tmp_path):
    net = [*SMOKE, "model={_target_: test_pull.Normed}", "deps=1_2", "clustering.of=outputs", "report=true"]
    verdict = run(composed(*net, f"base.cache={tmp_path / 'base'}"), tmp_path / "out")
    assert verdict.lossless
    assert 0 < verdict.relative_logit_change < 2e-6
    assert summary_of(tmp_path / "out")["widths"] == {"stem": 6, "conv": 8}
    clusters = json.loads((tmp_path / "out" / "clusters.json").read_text())
    assert {name: {*map(len, parts)} for name, parts in clusters.items()} == {"stem": {2}, "conv": {2}}
    assert all(max(part) < 8 or min(part) >= 8 for part in clusters["conv"]), "within each group"
    table = (tmp_path / "out" / "report.html").read_text()
    assert "clusters of one size" in table
    assert "within each of 2 groups" in table


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """600 images of three classes: gradients, stripes and noise."""
    folder, generator = tmp_path_factory.mktemp("photos"), torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, 48)
    for number in range(600):
        kind = number % 3
        noise = torch.rand(48, 48, 3, generator=generator)
        picture = (ramp[:, None, None], (ramp * 40).sin()[None, :, None].abs(), noise)[kind] * torch.ones(48, 48, 3)
        path = folder / ("train" if number < 480 else "val") / ("gradient", "stripes", "noise")[kind]
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((0.8 * picture + 0.2 * noise) * 255).byte().numpy()).save(path / f"{number}.png")
    return folder


def test_slow_statistics_collapse_too_within_a_smoke_run(tmp_path, photos):
    """MobileNetV3's batch norms have a momentum of 0.01: as published they would lag for 1000 steps."""
    cfg = composed("experiment=smoke", "model=torchvision", "model.name=mobilenet_v3_small", "dataset=imagefolder",
                   f"dataset.root={photos}", "dataset.image_size=32", "dataset.workers=0",
                   *SMOKE[2:], f"base.cache={tmp_path / 'base'}")  # fmt: skip
    verdict = run(cfg, tmp_path / "out")
    assert verdict.lossless
    assert verdict.statistics_spread == 0
    cost = summary_of(tmp_path / "out")["cost"]
    assert cost["macs_after"] < 0.6 * cost["macs_before"]


@pytest.mark.slow
def test_two_hundred_images_are_enough_for_every_default(tmp_path, photos):
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        if number % 3 == 0:  # of each class, and of both parts
            kept = tmp_path / "few" / path.relative_to(photos)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(path.read_bytes())
    cfg = composed("dataset=imagefolder", f"dataset.root={tmp_path / 'few'}", f"base.cache={tmp_path / 'base'}",
                   "dataset.workers=0", "dataset.image_size=48", "wandb=disabled", "quiet=true")  # fmt: skip
    verdict = run(cfg, tmp_path / "out")
    assert verdict.lossless
    assert verdict.relative_deviation == 0


AUTO = ["centri_strength=auto", "schedule.csgd.epochs=7", "deps.stages=[0.75,0.5]"]


def test_strengths_are_found_once_for_all_stages(monkeypatch):
    setup = prepare(RunSpec.of(composed(*SMOKE, *AUTO)))
    plan = foresee(setup)
    monkeypatch.setattr("csgd.pipeline.foresee.strengths_by", lambda *_: pytest.fail("found again"))
    clusters = cluster(setup.model, setup.spaces, setup.widths[1], "even")
    groups = csgd_optimizer(setup.spec, setup.model, setup.spaces, clusters).clustered_groups()
    later = stage_plan(setup, groups, plan.stage.strengths)
    assert later.strengths == plan.stage.strengths == {group["name"]: group["centri_strength"] for group in groups}
    assert later.forecast == plan.stage.forecast


def test_a_look_at_filters_that_are_still_apart_is_no_test_of_the_network(tmp_path, monkeypatch, base_cache):
    monkeypatch.setattr("csgd.pipeline.stage.is_collapsed", lambda *_: False)
    monkeypatch.setattr("csgd.pipeline.stage.LOOK_EVERY", 1)
    short = ["schedule.csgd.max_steps=4", "collapse_by=0.5", base_cache]
    run(composed(*SMOKE, *short), tmp_path)
    assert [row["step"] for row in rows_of(tmp_path) if row["phase"] == "csgd"] == [4, 8]


class Signals(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first, self.second, self.last = nn.Conv1d(1, 8, 3), nn.Conv1d(8, 8, 3), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu().mean(-1))


def signals(batch_size, seed, device):
    drawn, labels = torch.randn(40, 1, 16, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3

    def batches(epoch=0):
        yield from zip(drawn.split(batch_size), labels.split(batch_size), strict=True)

    return Data(batches, batches, drawn[:2], 3, -(-40 // batch_size), 40, 40)


def test_a_network_of_one_dimension_is_planned_trained_and_proved(tmp_path, base_cache):
    mine = ["dataset._target_=test_pull.signals", "~dataset.image_size", "~dataset.shift"]
    mine += ["model._target_=test_pull.Signals", "schedule=smoke", *SMOKE[2:], base_cache]
    assert run(composed(*mine, "plan_only=true"), tmp_path / "plan") is None
    assert run(composed(*mine), tmp_path / "run").lossless


SEEN: list[tuple[int, list[int], int]] = []  # of each epoch that data were asked for: its number, labels, wide kernels
KERNEL = (64, 64, 3, 3)


def watched_digits(batch_size, seed, device):
    data = digits(image_size=16, shift=0, batch_size=batch_size, seed=seed, device=device)

    def train_batches(epoch):
        batches = list(data.train_batches(epoch))
        wide = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and one.shape == KERNEL]
        SEEN.append((epoch, torch.cat([labels for _, labels in batches]).tolist(), len(wide)))
        return iter(batches)

    return replace(data, train_batches=train_batches)


def test_every_epoch_of_a_run_has_its_own_order_and_wide_weights_are_gone_after_the_cut(tmp_path, base_cache):
    SEEN.clear()
    watched = ["dataset._target_=test_pull.watched_digits", "~dataset.image_size", "~dataset.shift"]
    stages = ["deps.stages=[0.75,0.5]", "schedule.csgd.epochs=2", "collapse_by=0.5", "schedule.csgd.max_steps=null"]
    lengths = ["schedule.base.epochs=2", "schedule.base.max_steps=null"]
    run(composed("experiment=smoke", *SMOKE[2:], base_cache, *watched, *stages, *lengths), tmp_path)
    epochs, orders, wide = zip(*SEEN, strict=True)
    assert list(dict.fromkeys(epochs)) == [0, 1, 2, 3, 4, 5], "two of the base network, two of each stage"
    assert len({tuple(order) for order in orders}) == 6
    assert min(wide[:3]) > 0
    assert wide[3:] == (0,) * len(wide[3:])
