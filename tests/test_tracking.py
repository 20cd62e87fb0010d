"""W&B, offline and real: what fails there loses nothing, and mixes no runs."""

import json

import pytest
import wandb
from test_sweep import logged_steps

from csgd.tracking import Tracker


@pytest.fixture
def tracker(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")

    def start(name):
        folder = tmp_path / name
        folder.mkdir()
        return Tracker(folder, mode="offline", config={"name": name}, settings={"project": "csgd", "name": name})

    return start


def row(step):
    return {"phase": "csgd", "step": step, "epoch": step}


def offline_runs(folder):
    wandb.teardown()  # a run that is finished may be written a moment later; this waits for W&B's service
    return [logged_steps(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


def test_after_a_failure_the_next_job_has_a_run_of_its_own(tmp_path, tracker, caplog):
    with tracker("first") as first:
        first.log(row(1))
        first.log_image("picture", tmp_path / "missing.png")
        first.log(row(2))
    assert "W&B is left alone from here on: " in caplog.text
    with tracker("second") as second:
        second.log(row(3))
    assert offline_runs(tmp_path / "first") == [[("csgd", 1)]]
    assert offline_runs(tmp_path / "second") == [[("csgd", 3)]]
    lines = (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2], "metrics.jsonl has them all"


def test_a_run_beside_one_that_is_open_is_its_own(tmp_path, tracker):
    with tracker("first") as first, tracker("second") as second:
        first.log(row(1))
        second.log(row(2))
    assert offline_runs(tmp_path / "first") == [[("csgd", 1)]]
    assert offline_runs(tmp_path / "second") == [[("csgd", 2)]]
