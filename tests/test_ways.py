"""Rivals of the pull, run as it is: the same clusters merged at once, deletion, and the narrow network from scratch."""

import copy
import inspect
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from test_config import composed
from test_pull import SMOKE, rows_of, summary_of

import csgd
from conf.schema import ConfigError, Importance, Way
from csgd.drop import BY
from csgd.models import lenet5, resnet20, vgg16_bn
from csgd.pipeline import run
from csgd.pipeline.foresee import foresee, levelled
from csgd.pipeline.setup import prepare
from csgd.pipeline.spec import RunSpec
from csgd.pipeline.ways import WAYS, begin_anew

RIVALS = ["merge", "prune", "scratch"]


@pytest.fixture(scope="module")
def base_cache(tmp_path_factory):
    return f"base.cache={tmp_path_factory.mktemp('base')}"


def planned(*overrides):
    setup = levelled(prepare(RunSpec.of(composed(*SMOKE, *overrides))))
    return foresee(setup), setup


def test_the_words_of_the_configuration_are_those_of_the_tables():
    assert [str(way) for way in Way] == list(WAYS)
    assert [str(by) for by in Importance] == list(BY)


@pytest.mark.parametrize("overrides", [[], ["deps.stages=[0.75,0.5]"], ["centri_strength=0.3"], ["trim_at=collapse"]])
def test_each_way_costs_what_the_pull_does(overrides):
    pulled, _ = planned(*overrides)
    step = pulled.weight(len(pulled.costs) - 1)
    for way in RIVALS[: 2 if "deps.stages=[0.75,0.5]" in overrides else 3]:
        plan, _ = planned(*overrides, f"method={way}")
        mine = plan.work(trains_base=True)  # of scratch, the narrow network's steps stand for the base's too
        assert mine == pytest.approx(pulled.work(trains_base=True), abs=step * len(pulled.costs)), way
        assert [cost.whole() for cost in plan.costs] == [cost.whole() for cost in pulled.costs]


def test_what_choosing_takes_is_charged_in_each_stage():
    staged = "deps.stages=[0.75,0.5]"
    pulled, _ = planned(staged)
    plan, _ = planned(staged, "method=prune", "importance=taylor")
    taken = 8 * (pulled.weight(0) + pulled.weight(1))
    assert plan.work(trains_base=True) == pytest.approx(pulled.work(trains_base=True) - taken, abs=1)
    short = ["schedule.csgd.max_steps=2", "schedule.csgd.epochs=30"]
    pulled, plan = (planned(*short, *more)[0] for more in ([], ["method=prune", "importance=taylor"]))
    assert plan.work(trains_base=True) == pytest.approx(pulled.work(trains_base=True) - 2, abs=1), "an epoch has two"


def test_what_choosing_takes_is_charged():
    costs = {
        way: planned(f"method={way}", *more)[0].work(trains_base=True)
        for way, more in (("merge", ["clustering.of=outputs"]), ("prune", ["importance=taylor"]), ("scratch", []))
    }
    pulled = planned()[0].work(trains_base=True)
    assert costs["merge"] == pytest.approx(pulled, abs=1), "csgd would measure the outputs too"
    assert costs["prune"] == pytest.approx(pulled - 8, abs=1)


def test_the_schedule_itself_where_it_is_asked_for_and_its_rates_stretched_where_not():
    (pulled, of_pull), (short, _), (plan, setup) = (
        planned(),
        planned("method=prune", "cost=schedule"),
        planned("method=prune"),
    )
    assert short.csgd_steps == pulled.csgd_steps < plan.csgd_steps
    rates, wide = setup.csgd.learning_rates, of_pull.csgd.learning_rates
    assert len(rates) == plan.csgd_steps
    assert rates[-1] == pytest.approx(wide[-1], abs=0.01 * max(wide))
    assert rates[len(rates) // 2] == pytest.approx(wide[len(wide) // 2], abs=0.03 * max(wide))


@pytest.mark.parametrize("way", RIVALS)
def test_a_rival_is_cut_before_its_first_step_and_trained_narrow(tmp_path, base_cache, way):
    verdict = run(composed(*SMOKE, base_cache, f"method={way}", "report=true"), tmp_path)
    summary = summary_of(tmp_path)
    assert summary["cut"]["step"] == 0
    assert not verdict.lossless
    assert verdict.relative_logit_change > 0.1
    assert verdict.accuracy > 0.6
    rows = [row for row in rows_of(tmp_path) if row["phase"] == "csgd"]
    assert rows[0]["epoch"] == (1 if way == "scratch" else 2), "of the run, which base epochs are not a part of"
    assert rows[-1]["step"] == summary["stages"][0]["forecast"]["steps"] == planned(f"method={way}")[0].csgd_steps
    assert (summary["base"]["source"] == "not trained") == (way == "scratch")
    assert summary["way"]["told"] == WAYS[way].told
    kept = json.loads((tmp_path / "clusters.json").read_text())
    assert {name: len(parts) for name, parts in kept.items()} == summary["widths"]
    page, card = ((tmp_path / name).read_text() for name in ("report.html", "pruned.md"))
    assert f"{WAYS[way].told.upper()}: the cut changed" in page
    assert f"`method={way}`" in card
    for told in (page.split("<h2>Configuration")[0], card):
        assert "LOSSLESS" not in told
        assert "trained into one" not in told
    for name in ("sizes.png", "filters.png"):
        assert (tmp_path / "report" / name).exists() == (way == "merge"), "of the others every filter is alone"
    model = csgd.load_pruned(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == summary["cost"]["params_after"]


def test_epochs_are_counted_through_all_stages_of_a_rival(tmp_path, base_cache):
    run(composed(*SMOKE, base_cache, "method=merge", "deps.stages=[0.75,0.5]"), tmp_path)
    rows = [row for row in rows_of(tmp_path) if row["phase"] == "csgd"]
    epochs = [row["epoch"] for row in rows]
    assert epochs == sorted(set(epochs))
    steps = {stage: max(row["step"] for row in rows if row["stage"] == stage) for stage in (1, 2)}
    assert epochs[-1] == pytest.approx(1 + sum(steps.values()) / 65)


@pytest.mark.parametrize(
    "overrides", [["schedule.csgd.optimizer=adamw", "schedule.csgd.lr=0.003"], ["schedule.ema=0.9"]]
)
def test_a_rival_that_is_killed_goes_on_to_the_same_bytes(tmp_path, base_cache, overrides, monkeypatch):
    from csgd.pipeline.progress import Part, Progress

    config = [*SMOKE, base_cache, *overrides, "method=prune", "importance=taylor"]
    run(composed(*config), tmp_path / "whole")
    save = Progress.save

    def killed(self, setup):
        save(self, setup)
        if self.part is Part.NARROW and self.step > 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(composed(*config), tmp_path / "killed")
    monkeypatch.setattr(Progress, "save", save)
    run(composed(*config, "resume=auto"), tmp_path / "killed")
    whole, resumed = ((tmp_path / name / "pruned.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == resumed


class Noisy(torch.nn.Sequential):
    """Batch norm, and dropout."""

    def __init__(self):
        first = [torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU()]
        pooled = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Dropout(0.5)]
        super().__init__(*first, *pooled, torch.nn.Linear(16, 10))


def chosen(way, *overrides):
    setup = prepare(RunSpec.of(composed(*SMOKE, f"method={way}", *overrides)))
    torch.manual_seed(0)
    model = Noisy()
    return replace(setup, model=model, spaces=csgd.find_spaces(model, setup.data.example))


@pytest.mark.parametrize("way, key", [("merge", "clustering.of=outputs"), ("prune", "importance=taylor")])
def test_choosing_leaves_the_network_as_it_is_and_does_not_hang_on_what_was_drawn_before(way, key):
    setup = chosen(way, key)
    state, found = copy.deepcopy(setup.model.state_dict()), []
    for seed in (1, 2):  # as after a base network that was trained, or came from the cache
        torch.manual_seed(seed)
        setup.model.eval()
        found.append(WAYS[way].choose(setup, setup.spaces, {"0": 8}))
        assert not setup.model.training
        assert all(p.grad is None for p in setup.model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(state.values(), setup.model.state_dict().values(), strict=True))
    assert found[0] == found[1]


def test_batches_that_are_not_trained_on_are_not_chosen_by():
    setup, seen = chosen("prune", "importance=taylor", "schedule.csgd.max_steps=3"), []
    batches = setup.data.train_batches

    def watched(epoch):
        for batch in batches(epoch):
            seen.append(len(batch[0]))
            yield batch

    setup = replace(setup, data=replace(setup.data, train_batches=watched))
    WAYS["prune"].choose(setup, setup.spaces, {"0": 8})
    assert len(seen) == 3


def test_from_scratch_the_narrow_network_is_drawn_as_wide_ones_are():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8)
    )
    spaces = csgd.find_spaces(model, torch.randn(2, 64))
    spreads = [layer.weight.std().item() for layer in model[::2]]
    begin_anew(model, spaces, {"0": [[i] for i in range(128)], "2": [[i] for i in range(64)]})
    assert [layer.weight.shape for layer in model[::2]] == [(128, 64), (64, 128), (8, 64)]
    for layer, spread, factor in zip(model[::2], spreads, (1, 2, 2), strict=True):
        assert layer.weight.std().item() == pytest.approx(spread * factor, rel=0.1)
    assert math.isclose(spreads[1] * 2, (1 / 128 / 3) ** 0.5, rel_tol=0.05), "as torch draws a layer of 128 inputs"


def by_outputs(weight):
    return 2 / weight[:, 0].numel()  # He et al. 2015, mode="fan_out"


def by_inputs(weight):
    return 1 / 3 / weight[0].numel()  # torch's own layers


@pytest.mark.parametrize("build, conv", [(vgg16_bn, by_outputs), (resnet20, by_outputs), (lenet5, by_inputs)])
def test_from_scratch_each_layer_is_spread_as_the_narrow_network_itself_would_draw_it(build, conv):
    sized = {"image_size": 32} if "image_size" in inspect.signature(build).parameters else {}
    torch.manual_seed(0)
    model = build(num_classes=10, **sized)
    last = next(p for p in reversed(list(model.parameters())) if p.dim() == 2)
    torch.nn.init.normal_(last, std=0.05)  # a spread that depends on no width
    spaces = csgd.find_spaces(model, torch.randn(2, 3, 32, 32), trial=False)
    widths = csgd.target_widths(spaces, 0.5) | {spaces[1].name: spaces[1].size * 2 // 3}
    begin_anew(model, spaces, csgd.cluster(model, spaces, widths, "even"))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            variance = 0.05**2 if p is last else conv(p) if p.dim() == 4 else by_inputs(p)
            assert p.var().item() == pytest.approx(variance, rel=4 * (2 / p.numel()) ** 0.5 + 0.02), name


def test_a_rival_is_wrapped_for_training_once_and_narrow(tmp_path, monkeypatch):
    wrapped = []

    def watched(model, compiles):
        wrapped.append(model.conv1.out_channels)
        return model

    def stopped(*_):
        raise KeyboardInterrupt

    for module in ("learners", "stage"):
        monkeypatch.setattr(f"csgd.pipeline.{module}.as_trained", watched)
    monkeypatch.setattr(sys.modules["csgd.pipeline.run"], "go_on_narrow", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(composed(*SMOKE, "method=scratch"), tmp_path)
    assert wrapped == [10]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["importance=l2"], "importance must be null where method is csgd"),
        (["cost=equal"], "cost must be null where method is csgd"),
        (["method=merge", "importance=l2"], "importance must be null where method is merge"),
        (["method=prune", "trim_at=end"], "trim_at must be collapse where method is prune"),
        (["method=prune", "after_trim=same_run"], "after_trim must be plain where method is prune"),
        (["method=prune", "clustering=even"], "clustering.method must be kmeans where method is prune, got 'even'"),
        (["method=scratch", "clustering.of=outputs"], "clustering.of must be pacesetter where method is scratch"),
        (["method=scratch", "deps.stages=[0.75,0.5]"], "deps.stages must be null where method is scratch"),
        (["method=scratch", "base.weights=x.pt"], "base.weights must be null where method is scratch"),
    ],
)
def test_what_a_way_does_not_look_at_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        composed(*SMOKE, *overrides)
