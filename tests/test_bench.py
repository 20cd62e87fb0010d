"""What the benchmarks compare is the same thing, and their ratios are taken within turns."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

import csgd
from csgd.models import resnet20


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "experiments" / "bench"))
    before = set(sys.modules)
    import common
    import optimizer_step

    yield common, optimizer_step
    for name in ("common", "optimizer_step", "ratios"):
        if name not in before:
            sys.modules.pop(name, None)


def test_the_dense_step_is_the_step_of_csgd(bench):
    _, optimizer_step = bench
    model = resnet20(10).to(memory_format=torch.channels_last)
    spaces = csgd.find_spaces(model, torch.randn(2, 3, 16, 16), trial=False)
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 5 / 8), "even")
    twins = {kind: copy.deepcopy(model) for kind in ("CSGD", "dense", "SGD")}
    for kind, twin in twins.items():
        optimizer = optimizer_step.contender(kind, twin, spaces, clusters)
        torch.manual_seed(1)
        for p in twin.parameters():
            p.grad = torch.randn_like(p)
        for _ in range(3):
            optimizer.step()
    after = {kind: torch.cat([p.flatten() for p in twin.parameters() if p.dim() == 4]) for kind, twin in twins.items()}
    torch.testing.assert_close(after["CSGD"], after["dense"], rtol=1e-4, atol=1e-6)
    assert (after["CSGD"] - after["SGD"]).abs().max() > 1e-2, "the negative control"


def test_the_ratios_that_are_told_are_those_of_the_files(bench):
    import ratios

    told = " ".join((Path(__file__).parents[1] / "docs" / "results.md").read_text().split())
    assert ratios.sentence() in told


def test_contenders_take_turns_and_ratios_are_within_them(bench):
    common, _ = bench
    taken = []
    seconds = common.in_turns({name: lambda name=name: taken.append(name) for name in "ab"}, repeats=3, warmup=1)
    assert taken == list("abababab")
    assert [len(times) for times in seconds.values()] == [3, 3]
    assert common.ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0


def test_the_front_picture_shows_the_main_job_and_a_rival_of_the_same_widths(monkeypatch, tmp_path):
    folder = Path(__file__).parents[1] / "experiments"
    monkeypatch.syspath_prepend(str(folder))
    import front

    rows = [json.loads(line) for line in (folder / "front.jsonl").read_text().splitlines()]
    told = [json.loads(line) for line in (folder / "main_job.jsonl").read_text().splitlines()]
    main_job = {row["seed"]: row for row in told if not row["overrides"]}
    for seed in range(3):
        base, csgd_row, rival = (row for row in rows if row["seed"] == seed)
        assert (base["way"], csgd_row["way"], rival["way"]) == ("base", "csgd", "deletion")
        assert csgd_row["widths"] == rival["widths"]
        assert base["accuracies"][-1][1] == rival["cut"]["before"] == pytest.approx(main_job[seed]["base"])
        assert csgd_row["cut"]["after"] == pytest.approx(main_job[seed]["after_cut"])
        assert csgd_row["accuracies"][-1][1] == pytest.approx(main_job[seed]["end"])
        assert [step for step, _ in rival["accuracies"]][-1] == csgd_row["accuracies"][-1][0] == 225
    monkeypatch.setattr(front, "PICTURE", tmp_path / "front.png")
    front.draw(rows)
    assert (tmp_path / "front.png").stat().st_size > 10_000
    sys.modules.pop("front")
