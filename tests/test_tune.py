"""Trials of learning rates: images held out of the training set, and the run that goes by the best rate."""

import io
import json
import logging
import math
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from test_config import composed
from test_pull import SMOKE, rows_of, summary_of
from test_sweep import TINY
from torch.utils.data import TensorDataset

from conf.schema import ConfigError
from csgd import report
from csgd.data import Data, digits
from csgd.errors import InputError, RateError
from csgd.folder import RunFolder
from csgd.optim import check_stability
from csgd.pipeline import run, watch
from csgd.pipeline.foresee import foresee
from csgd.pipeline.launch import launch
from csgd.pipeline.progress import Progress
from csgd.pipeline.setup import prepare
from csgd.pipeline.spec import RunSpec, Trial
from csgd.sweep import conclude
from csgd.train import DivergedError

SHORT = [*SMOKE, "schedule.csgd.epochs=2", "schedule.csgd.max_steps=8", "method=prune"]
SGD = "schedule.csgd.optimizer=sgd"
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def base_cache(tmp_path_factory):
    return f"base.cache={tmp_path_factory.mktemp('base')}"


def images_of(batches):
    return [image.numpy().tobytes() for images, _ in batches for image in images]


def test_what_is_held_out_of_the_training_images_is_not_trained_on_and_the_test_images_are_not_looked_at():
    whole = digits(image_size=8, shift=0, batch_size=32, seed=3, device=CPU)
    part = whole.held_out(0.1)
    trained, held, test = (
        set(images_of(one)) for one in (part.train_batches(0), part.test_batches(), whole.test_batches())
    )
    assert (part.train_size, part.test_size) == (1293, 144)
    assert trained | held == set(images_of(whole.train_batches(0)))
    assert not trained & held
    assert len(held) == 144
    assert not held <= test
    again = digits(image_size=8, shift=0, batch_size=32, seed=4, device=CPU).held_out(0.1)
    assert set(images_of(again.test_batches())) == held, "the same for every seed"


def test_held_out_images_of_a_dataset_are_judged_as_its_test_images_are():
    plain, augmented = (
        TensorDataset(torch.arange(20.0).view(20, 1, 1, 1) + shift, torch.arange(20) % 2) for shift in (0, 100)
    )
    how = dict(classes=2, batch_size=4, seed=0, device=CPU)
    part = Data.of(augmented, plain, plain=plain, **how).held_out(0.25)
    held = torch.cat([images for images, _ in part.test_batches()])
    trained = torch.cat([images for images, _ in part.train_batches(0)])
    assert len(held) == 5
    assert (held < 100).all()
    assert (trained >= 100).all()
    assert not set(held.flatten().tolist()) & set((trained - 100).flatten().tolist())
    as_trained = Data.of(augmented, plain, **how).held_out(0.25)
    assert all((images >= 100).all() for images, _ in as_trained.test_batches()), "where there are no others"


def test_the_best_rate_of_the_trials_makes_the_run_and_each_trial_is_a_run_of_its_own(tmp_path, base_cache, caplog):
    tuned = [*SHORT, base_cache, SGD, "tune.lr=[1.0e-5,0.05,1.0e+6]", "report=true"]
    tried = run(composed(*tuned), tmp_path / "tuned")
    told = summary_of(tmp_path / "tuned")["tuned"]
    scores = [trial["score"] for trial in told["trials"]]
    assert told["lr"] == 0.05
    assert scores[1] > scores[0]
    assert scores[2] is None
    assert "not a number" in told["trials"][2]["failure"]
    by_hand = run(composed(*SHORT, base_cache, SGD, "schedule.csgd.lr=0.05"), tmp_path / "plain")
    weights = [(tmp_path / name / "pruned.safetensors").read_bytes() for name in ("tuned", "plain")]
    assert weights[0] == weights[1]
    assert tried == by_hand
    trial = run(composed(*SHORT, base_cache, SGD, "schedule.csgd.lr=0.05", "validation=0.1"), tmp_path / "trial")
    assert trial.accuracy == scores[1] != tried.accuracy
    assert "learning rate" in (tmp_path / "tuned" / "report.html").read_text("utf-8")
    assert not (tmp_path / "tuned" / "trials" / "lr_0.05" / "report.html").exists()


def test_a_run_that_goes_on_does_not_repeat_its_trials(tmp_path, base_cache, caplog):
    config = composed(*SHORT, base_cache, SGD, "tune.lr=[0.01,0.05]", "resume=auto", "report=false")
    terminal = logging.StreamHandler(io.StringIO())
    logging.getLogger().addHandler(terminal)
    with caplog.at_level(logging.INFO):
        first = run(config, tmp_path)
    logging.getLogger().removeHandler(terminal)
    assert terminal.stream.getvalue().count("multiply-accumulates") == 1, "quiet: the run's verdict, not its trials'"
    trials = [tmp_path / "trials" / name / "metrics.jsonl" for name in ("lr_0.01", "lr_0.05")]
    before = [path.stat().st_mtime_ns for path in trials]
    (tmp_path / "trials" / "lr_0.05" / "summary.json").unlink()  # as if killed at the end of the second
    assert run(config, tmp_path) == first
    after = [path.stat().st_mtime_ns for path in trials]
    assert before[0] == after[0]
    assert before[1] < after[1]


def test_a_trial_that_ends_for_another_reason_than_its_rate_ends_the_run(tmp_path, base_cache):
    """It says nothing of the rate, which may be the best; the run would go by one of the others."""
    tuned = [*SHORT, base_cache, SGD, "tune.lr=[0.05,0.01]", "resume=auto"]
    run(composed(*tuned, "schedule.csgd.epochs=1"), tmp_path)
    shutil.rmtree(tmp_path / "trials" / "lr_0.01")
    with pytest.raises(InputError, match=r"resume=auto: '.*lr_0\.05' holds another configuration"):
        run(composed(*tuned), tmp_path)


def no_number(outputs, targets):
    return math.nan if len(targets) > 8 else 0.0  # of all of them, not of the first batch


def scored_by_no_number(batch_size, seed, device):
    images = TensorDataset(torch.randn(100, 3, 16, 16), torch.arange(100) % 10)
    return Data.of(images, images, classes=10, batch_size=batch_size, seed=seed, device=device, score=no_number)


def test_a_score_that_is_not_a_number_is_no_best_one_and_says_why(tmp_path, base_cache):
    mine = ["dataset._target_=test_tune.scored_by_no_number", "~dataset.image_size", "~dataset.shift"]
    with pytest.raises(InputError, match=r"no trial came to its end; 0\.05: its score is not a number"):
        run(composed(*SHORT, base_cache, SGD, "tune.lr=[0.05]", *mine), tmp_path)


def diverging():
    raise DivergedError("the loss at step 3 is not a number: a lower learning rate is needed")


def test_a_rate_that_diverges_is_known_from_other_errors_of_a_rank():
    with pytest.raises(RateError, match="^the loss at step 3 is not a number"):
        launch(diverging, (), 1, None)
    with pytest.raises(RateError, match="diverges at learning rate 1"):
        check_stability(1.0, 1e6, 0.0, 0.9, True)


@pytest.mark.slow
def test_trials_of_torchruns_ranks_are_not_repeated_and_name_a_rate_that_diverges(tmp_path):
    job = [*SMOKE, "schedule.base.max_steps=4", "schedule.csgd.max_steps=6", "hydra.run.dir=out"]
    torchrun = "-m torch.distributed.run --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:0"

    def started(*overrides):
        command = [sys.executable, *torchrun.split(), str(ROOT / "run.py"), *job, SGD, *overrides]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert started("tune.lr=[0.01,0.05]").returncode == 0
    before = summary_of(tmp_path / "out")
    again = started("tune.lr=[0.01,0.05]", "resume=auto")
    assert again.returncode == 0, again.stderr
    assert summary_of(tmp_path / "out")["verdict"] == before["verdict"]
    assert "error: tune.lr: 1e+06: the loss at step" in started("tune.lr=[1.0e+6,0.01]").stderr


def without_held_out(batch_size, seed, device):
    return replace(digits(image_size=16, shift=0, batch_size=batch_size, seed=seed, device=device), held_out=None)


def test_what_cannot_be_tried_is_refused_in_a_line(tmp_path, base_cache):
    with pytest.raises(ConfigError, match=r"validation must be null beside tune\.lr"):
        composed("tune.lr=[0.1]", "validation=0.1")
    with pytest.raises(ConfigError, match=r"tune\.lr must be different rates above 0, .*, got \[0\.1, 0\.1\]"):
        composed("tune.lr=[0.1,0.1]")
    with pytest.raises(
        ConfigError, match=r"tune\.lr must be different rates above 0, in their first six digits, or \[\]"
    ):
        composed("tune.lr=[0.1,0.10000001]")  # whose trials would share a folder
    few = ["dataset=synthetic", "dataset.train_size=8", "dataset.image_size=16", "validation=0.95"]
    with pytest.raises(InputError, match=r"^validation=0\.95 leaves 1 training image, 2 are the least$"):
        prepare(RunSpec.of(composed(*few)))
    with pytest.raises(InputError, match=r"tune\.lr: no trial came to its end; 1e\+06: the loss at step"):
        run(composed(*SHORT, base_cache, SGD, "tune.lr=[1.0e+6]"), tmp_path / "diverges")
    mine = ["dataset._target_=test_tune.without_held_out", "~dataset.image_size", "~dataset.shift", "validation=0.1"]
    with pytest.raises(InputError, match="makes a Data without held_out"):
        run(composed(*SHORT, base_cache, *mine), tmp_path / "mine")


def test_held_out_images_that_a_file_of_weights_may_know_are_warned_of(caplog):
    prepare(RunSpec.of(composed(*SMOKE, "validation=0.1", "base.weights=mine.pt")))
    assert "base.weights 'mine.pt' may have been trained on images held out here" in caplog.text


def test_a_plan_says_that_trials_are_not_in_it(tmp_path, base_cache, caplog):
    caplog.set_level("INFO")
    run(composed(*SMOKE, base_cache, SGD, "tune.lr=[0.01,0.05]", "plan_only=true"), tmp_path)
    assert "the plan is without its 2 trials, each a run as this one, at learning rate 0.05" in caplog.text
    assert not (tmp_path / "trials").exists()


def test_wandb_is_told_the_rate_that_trials_gave(tmp_path, monkeypatch):
    given, spec = {}, RunSpec.of(composed(*SMOKE, "tune.lr=[0.5]"))
    rates = replace(spec.pull.rates, lr=0.5)
    setup = prepare(replace(spec, pull=replace(spec.pull, rates=rates), trials=(Trial(0.5, 0.1, 1.0, ""),)))
    monkeypatch.setattr(watch, "Tracker", lambda where, **how: given.update(how) or nullcontext())
    with watch.Watch(setup, foresee(setup), Progress(RunFolder(tmp_path))):
        pass
    assert given["config"]["tuned"] == {"lr": 0.5}


def test_nothing_is_called_a_test_that_was_held_out(tmp_path, base_cache, caplog, monkeypatch):
    caplog.set_level("INFO")
    words, job = [], [*TINY[:-1], base_cache, "validation=0.25", "schedule.csgd.epochs=2", "wandb=disabled"]
    monkeypatch.setattr(report, "draw_collapse", lambda _: None)  # which takes seconds
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *_, **__: words.extend(one.get_text() for one in figure.findobj(Text))
    )
    run(composed(*job), tmp_path / "0")
    summary = summary_of(tmp_path / "0")
    assert "test" not in summary["data"]
    assert summary["data"]["held_out"] == 16
    assert not [key for row in rows_of(tmp_path / "0") for key in row if "test" in key]
    page, card = ((tmp_path / "0" / name).read_text("utf-8") for name in ("report.html", "pruned.md"))
    told = page.split("<h2>Configuration")[0].replace("tested", "")
    for text in (told, card.split("## Use")[0], caplog.text, "\n".join(words)):
        assert "held-out" in text
        assert re.findall(r".*\btest\b.*", text) == []
    assert json.loads((tmp_path / "0" / "pruned.json").read_text())["validation"] == 0.25
    (tmp_path / "0" / ".hydra").mkdir()
    (tmp_path / "0" / ".hydra" / "overrides.yaml").write_text("- seed=0")
    words.clear()
    assert "| held-out accuracy |" in conclude(tmp_path)[0]
    assert "held-out accuracy" in words


def test_tests_come_at_the_end_of_every_so_many_epochs_and_of_the_last(tmp_path, base_cache):
    often, seldom = tmp_path / "often", tmp_path / "seldom"
    verdicts = [
        run(
            composed(*SMOKE, base_cache, "schedule.csgd.epochs=5", f"schedule.test_every={every}"),
            folder,
        )
        for folder, every in ((often, 1), (seldom, 3))
    ]
    assert verdicts[0] == verdicts[1]
    steps = [[row["step"] for row in rows_of(folder) if row["phase"] == "csgd"] for folder in (often, seldom)]
    assert len(steps[1]) < len(steps[0])
    assert set(steps[1]) <= set(steps[0])
    assert steps[1][-1] == steps[0][-1]
    assert json.loads((seldom / "summary.json").read_text())["config"]["schedule"]["test_every"] == 3
