"""Widths of a run that go by what the base network, or this machine, says: found once, the same in all that follows."""

import json
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from test_config import composed
from test_sweep import TINY

import csgd
from csgd import InputError
from csgd.pipeline import deps, leave, run, settle
from csgd.pipeline.foresee import foresee, levelled
from csgd.pipeline.launch import launch
from csgd.pipeline.progress import Part, Progress
from csgd.pipeline.setup import prepare
from csgd.pipeline.spec import RunSpec

JOB = [*TINY[:-1], "wandb=disabled", "schedule.csgd.epochs=2", "resume=auto"]
BY = [*JOB, "deps.allot=sensitivity"]


REPORT = leave._report


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(leave, "_report", lambda *_: None)


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def measured(monkeypatch):
    """The calls of csgd.sensitivity in runs."""
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return csgd.sensitivity(*args, **options)

    monkeypatch.setattr(settle, "sensitivity", counted)
    return calls


def test_a_budget_is_allotted_by_what_was_measured_once(tmp_path, measured, monkeypatch):
    job = [*BY, f"base.cache={tmp_path}/base"]
    with monkeypatch.context() as patched:
        patched.setattr(leave, "_report", REPORT)
        run(composed(*job, "deps.params=0.5"), tmp_path / "one")
    assert (tmp_path / "one" / "report" / "sensitivity.png").exists()
    assert "All were narrowed up to one growth of the loss" in (tmp_path / "one" / "report.html").read_text()
    (kept,) = (tmp_path / "base").glob("*.sensitivity.json")
    told = json.loads((tmp_path / "one" / "sensitivity.json").read_text())
    changes = json.loads(kept.read_text())["changes"]
    assert told["changes"] == changes
    assert told["images"] == 32, "four batches of eight, no more than are trained on"
    setup = prepare(RunSpec.of(composed(*job, "deps.params=0.5")))
    even = setup.widths
    found = csgd.budget_widths(setup.model, setup.spaces, setup.data.example, params=0.5, sensitivity=changes)
    assert [found.widths] != even
    assert summary_of(tmp_path / "one")["widths"] == found.widths
    cost = summary_of(tmp_path / "one")["cost"]
    assert 0.4 < cost["params_after"] / cost["params_before"] <= 0.5
    stamp = kept.stat().st_mtime_ns
    run(composed(*job, "deps.params=0.7"), tmp_path / "two")
    run(composed(*job, "deps.params=0.5", "plan_only=true"), tmp_path / "plan")
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert plan["widths"] == [found.widths]
    assert plan["settled"]
    assert summary_of(tmp_path / "two")["widths"] != found.widths
    assert len(measured) == 1
    assert kept.stat().st_mtime_ns == stamp
    run(composed(*job, "deps.params=0.7", "seed=1"), tmp_path / "three")
    assert len(measured) == 2, "of another base network"


@pytest.mark.parametrize("other", [["schedule.csgd.max_steps=2"], ["centri_strength=auto", "schedule.csgd.lr=0.1"]])
def test_what_was_measured_on_other_images_or_of_other_spaces_is_not_taken(tmp_path, measured, monkeypatch, other):
    """What is in base.cache must not depend on which run came first."""
    job = [*BY, "deps.params=0.5", f"base.cache={tmp_path}/base"]
    short = prepare(RunSpec.of(composed(*job, *other)))
    if "centri_strength=auto" in other:
        short = replace(short, spaces=short.spaces[:2])  # as where the published pull does not reach a space
    first = settle._shared(short)
    second = settle._shared(prepare(RunSpec.of(composed(*job))))
    assert len(measured) == 2
    assert (first["images"], len(first["changes"])) != (second["images"], len(second["changes"]))


def measured_slowly(cache: str) -> dict:
    """As a rank: four losses, each of which takes half of the time for which ranks wait for each other."""
    setup = prepare(RunSpec.of(composed(*BY, "deps.params=0.5", f"base.cache={cache}")))

    def slowly(model, spaces, loss_of, **_):
        return {str(number): [time.sleep(1.5), loss_of(model)] for number in range(4)}

    settle.sensitivity = slowly
    dist.init_process_group("gloo", timeout=timedelta(seconds=3))
    return settle._shared(setup)


def test_ranks_wait_for_a_measurement_that_takes_long(tmp_path):
    assert len(launch(measured_slowly, (str(tmp_path),), 2, None)["changes"]) == 4


def test_the_test_set_is_not_looked_at(tmp_path):
    def looked():
        raise AssertionError("the test set")

    setup = prepare(RunSpec.of(composed(*BY, "deps.params=0.5")))
    blind = replace(setup, data=replace(setup.data, test_batches=looked))
    assert settle._measured(blind) == settle._measured(setup), "and the same each time"


def test_images_held_out_of_the_training_set_are_measured_on_where_there_are_some(tmp_path):
    def held_out():
        for images, labels in setup.data.test_batches():
            seen.append(len(images))
            yield images, labels.flip(0)

    setup, seen = prepare(RunSpec.of(composed(*BY, "deps.params=0.5", "validation=0.25"))), []
    usual = settle._measured(setup)
    others = settle._measured(replace(setup, data=replace(setup.data, test_batches=held_out)))
    assert usual["images"] == sum(seen) == setup.data.test_size
    assert others["changes"] != usual["changes"]


def test_a_plan_says_that_widths_wait_for_the_base_network(tmp_path, caplog):
    caplog.set_level("INFO")
    run(composed(*BY, "deps.macs=0.5", "plan_only=true", f"base.cache={tmp_path}/base"), tmp_path / "out")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert not plan["settled"]
    assert plan["cost"][1]["macs"] <= 0.5 * plan["cost"][0]["macs"]
    assert "widths: evenly by size; by sensitivity they need the base network, which is not at hand" in caplog.text


@pytest.mark.parametrize(
    ("budget", "part"),
    [
        (["deps.params=0.5", "deps.allot=sensitivity"], Part.BASE),
        (["deps.params=0.5", "deps.allot=sensitivity"], Part.NARROW),
        (["deps.latency=0.8"], Part.WIDE),
    ],
)
def test_a_run_that_is_killed_goes_on_with_the_same_widths(tmp_path, monkeypatch, budget, part):
    """What it kept in base.cache may be lost meanwhile, and the machine be slower."""
    job = [*JOB, *budget, f"base.cache={tmp_path}/base", "checkpoint_every=1"]
    prices, save = [], Progress.save
    monkeypatch.setattr(deps, "budget_widths", lambda *a, **o: prices.append(o) or csgd.budget_widths(*a, **o))
    monkeypatch.setitem(csgd.budget.PRICES, "latency", csgd.budget.PRICES["params"])  # the same on any machine

    def killed(self, setup):
        save(self, setup)
        if self.part is part:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(composed(*job), tmp_path / "killed")
    monkeypatch.setattr(Progress, "save", save)
    for path in (tmp_path / "base").glob("*"):
        path.unlink()
    if part is not Part.BASE:
        prices.clear()
    run(composed(*job), tmp_path / "killed")
    if part is not Part.BASE:
        assert prices == [], "widths are those of the checkpoint"
    run(composed(*job), tmp_path / "whole")
    one, other = (tmp_path / name / "pruned.safetensors" for name in ("killed", "whole"))
    assert one.read_bytes() == other.read_bytes()
    assert summary_of(tmp_path / "killed")["widths"] == summary_of(tmp_path / "whole")["widths"]


def test_from_scratch_the_widths_are_those_of_another_way_and_its_measuring_is_charged(tmp_path):
    job = [*BY, "deps.params=0.5", f"base.cache={tmp_path}/base"]
    with pytest.raises(InputError, match=r"method=scratch trains no base network, and base\.cache holds none with"):
        run(composed(*job, "method=scratch"), tmp_path / "scratch")
    run(composed(*job, "method=merge"), tmp_path / "merge")
    run(composed(*job, "method=scratch"), tmp_path / "scratch")
    merge, scratch = (summary_of(tmp_path / name) for name in ("merge", "scratch"))
    assert merge["widths"] == scratch["widths"]
    fixed = [*JOB, f"deps.widths={list(merge['widths'].values())}"]
    steps = {}
    for way in ("merge", "scratch"):
        setup = levelled(prepare(RunSpec.of(composed(*fixed, f"method={way}"))))
        assert levelled(setup).csgd.steps == setup.csgd.steps
        steps[way] = setup.csgd.steps, foresee(setup)
    assert merge["stages"][0]["forecast"]["steps"] == steps["merge"][0]
    passes = setup.csgd.steps_per_epoch * (1 + 7 * 3) / 3  # of three layers; a third of a step each
    more = round(passes / steps["scratch"][1].weight(1))
    assert scratch["stages"][0]["forecast"]["steps"] == pytest.approx(steps["scratch"][0] + more, abs=1)


def test_what_can_be_reached_is_one_table(caplog):
    caplog.set_level("INFO")
    prepare(RunSpec.of(composed(*JOB, "deps.macs=0.5")))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in caplog.text.splitlines() if line[:1] == "|"]
    header, _, macs, params = rows
    assert header == ["of the dense network's", "least", "most", "deps.macs", "can be met"]
    assert [macs[0], *macs[2:]] == ["multiply-accumulates", "1", "0.5", "yes"]
    assert [params[0], *params[2:]] == ["parameters", "1", "", ""]
    caplog.clear()
    wish = float(macs[1]) / 2
    with pytest.raises(InputError, match=f"deps.macs={wish:g}: a budget of {wish:g} of the macs cannot be met"):
        prepare(RunSpec.of(composed(*JOB, f"deps.macs={wish}")))
    assert "| no " in caplog.text
