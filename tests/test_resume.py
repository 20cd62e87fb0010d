"""Runs that are killed at any moment and resumed end with the same bits as one that was left alone."""

import json
import random
import shutil
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import commandline
import pytest
import torch
from filelock import FileLock
from test_config import composed
from torch import nn

from csgd.checkpoint import load_weights
from csgd.pipeline import run
from csgd.pipeline.progress import Part, Progress

RUN = [
    "experiment=smoke", "dataset.image_size=16", "deps.stages=[0.75,0.5]", "deps.fraction=0.5", "wandb=disabled",
    "schedule.batch_size=16", "schedule.csgd={epochs: 3, lr: 0.05, max_steps: 50}", "checkpoint_every=7", "resume=auto",
    "schedule.ema=0.9", "report=false", "hydra.run.dir=out",
]  # fmt: skip


def start(folder: Path, *more: str) -> BaseProcess:
    folder.mkdir(exist_ok=True)
    return commandline.start(folder, *RUN, f"base.cache={folder / 'base'}", *more, out=folder / "log.txt")


def finish(process: BaseProcess, folder: Path, status: int = 0) -> str:
    process.join()
    text = (folder / "log.txt").read_text()
    assert process.exitcode == status, text[-3000:]
    return text


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join()


def wait_for(path: Path, process: BaseProcess) -> None:
    while not path.exists():
        assert process.is_alive()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is left alone, and the seconds it took."""
    folder = tmp_path_factory.mktemp("whole")
    began = time.perf_counter()
    finish(start(folder), folder)
    return folder / "out", time.perf_counter() - began


def assert_same_run(a: Path, b: Path) -> None:
    for name in ("pruned.safetensors", "filters.safetensors"):
        states = [load_weights(out / name) for out in (a, b)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    summaries = [json.loads((out / "summary.json").read_text()) for out in (a, b)]
    for key in ("base", "verdict", "cost", "widths", "stages"):
        one, other = (summary[key] for summary in summaries)
        if key == "base":
            one, other = one["accuracy"], other["accuracy"]
        assert one == other, key
    for name in ("pruned.safetensors", "pruned.json"):  # of the network between the stages
        one, other = ((out / "pruned_1" / name).read_bytes() for out in (a, b))
        assert one == other, name
    rows = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (a, b)]
    assert len(rows[0]) == len(rows[1])
    for one, other in zip(*rows, strict=True):
        differ = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key) and "seconds" not in key]
        assert differ == [], (one["phase"], one["step"])


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_run_goes_on_bit_by_bit(whole, tmp_path, seed):
    out, seconds = whole
    rng = random.Random(seed)
    folder = tmp_path / "killed"
    process = start(folder)
    time.sleep(rng.uniform(0.1, 0.9) * seconds)
    kill(process)
    process = start(folder)
    wait_for(folder / "out" / "checkpoints" / "last.pt", process)  # whatever the pace of the machine
    time.sleep(rng.uniform(0, 0.6) * seconds)
    kill(process)
    text = finish(start(folder), folder)
    assert "resume=auto: there is no checkpoint in '" in text
    assert "resumed from" in text
    assert_same_run(out, folder / "out")


class LeavesOut(nn.Module):
    """A block that is left out of some steps, in which nothing pulls it: it collapses later than the forecast says."""

    def __init__(self, num_classes):
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images):
        x = self.stem(images).relu()
        if not self.training or torch.rand(()) < 0.5:
            x = x + self.outer(self.inner(x).relu())
        return self.fc(x.mean((2, 3)))


def test_a_resumed_run_looks_for_the_collapse_at_the_same_steps(tmp_path, monkeypatch):
    cfg = composed(*RUN[:2], "wandb=disabled", "model._target_=test_resume.LeavesOut", "checkpoint_every=7",
                   "schedule.csgd={epochs: 3, lr: 0.05, max_steps: 75}", "centri_strength=6", "ramp=constant",
                   "resume=auto", "report=false",
                   f"base.cache={tmp_path / 'base'}")  # fmt: skip
    run(cfg, tmp_path / "whole")
    told = json.loads((tmp_path / "whole" / "summary.json").read_text())["cut"]
    foreseen, cut = told["foreseen_step"], told["step"]
    assert foreseen + 20 <= cut < 225
    save = Progress.save

    def killed(self, setup):
        save(self, setup)
        if self.part is Part.WIDE and self.step > foreseen and (self.step - foreseen) % 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(cfg, tmp_path / "killed")
    monkeypatch.setattr(Progress, "save", save)
    run(cfg, tmp_path / "killed")
    assert json.loads((tmp_path / "killed" / "summary.json").read_text())["cut"] == told


class Attends(nn.Module):
    """Shapes alone do not say whether an attention has fewer heads or smaller ones, and the places of its patches are
    no part of its state_dict."""

    def __init__(self, num_classes):
        super().__init__()
        self.patches, self.heads = nn.Conv2d(3, 16, 4, 4), 4
        self.q, self.k, self.v, self.out = *(nn.Linear(16, 32) for _ in range(3)), nn.Linear(32, 16)
        self.fc = nn.Linear(16, num_classes)
        self.register_buffer("places", torch.outer(torch.arange(16), 0.5 ** torch.arange(16)).sin(), persistent=False)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2) + self.places
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.fc(x.mean(1))


@pytest.mark.parametrize("part", [Part.WIDE, Part.NARROW])
def test_a_run_that_is_killed_goes_on_with_heads_and_buffers(tmp_path, monkeypatch, part):
    cfg = composed(*RUN[:2], "wandb=disabled", "quiet=true", "deps=1_2", "model._target_=test_resume.Attends",
                   "schedule.csgd={epochs: 2, lr: 0.01, optimizer: adamw, max_steps: 6}", "resume=auto", "report=false",
                   "schedule.ema=0.5", "checkpoint_every=4", "schedule.base.max_steps=6",
                   f"base.cache={tmp_path / 'base'}")  # fmt: skip
    run(cfg, tmp_path / "whole")
    save = Progress.save

    def killed(self, setup):
        save(self, setup)
        if self.part is part and self.step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(cfg, tmp_path / "killed")
    monkeypatch.setattr(Progress, "save", save)
    run(cfg, tmp_path / "killed")
    weights = [(tmp_path / name / "pruned.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    assert load_weights(tmp_path / "whole" / "pruned.safetensors")["places"].shape == (16, 8)


def test_a_finished_run_has_nothing_left_to_do(whole):
    out, _ = whole
    before = load_weights(out / "pruned.safetensors")
    text = finish(start(out.parent), out.parent)
    assert text.count("csgd epoch 1:") == 2, "no step was taken again"
    after = load_weights(out / "pruned.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_another_configuration_is_refused_with_the_difference(whole):
    out, _ = whole
    text = finish(start(out.parent, "centri_strength=7", "schedule.csgd.lr=0.04"), out.parent, status=2)
    last = text.splitlines()[-1]
    assert last.startswith("error: resume=auto: ")
    assert "centri_strength: None then, 7 now" in last
    assert "schedule.csgd.lr: 0.05 then, 0.04 now" in last
    assert "widths" not in last
    assert not (out / "failed.txt").exists(), "the run in that folder is in good health"


def test_a_slip_leaves_the_folder_of_another_run_as_it_is(whole):
    out, _ = whole
    before = (out / "metrics.jsonl").read_bytes()
    assert "tolerance.logits must be above 0" in finish(start(out.parent, "tolerance.logits=-1"), out.parent, status=2)
    assert not (out / "failed.txt").exists()
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_other_code_is_refused(whole, tmp_path):
    folder = tmp_path / "older"
    shutil.copytree(whole[0].parent, folder)
    for path in (folder / "out" / "checkpoints").iterdir():
        saved = torch.load(path, weights_only=True)
        saved["config"]["versions.csgd"] = "0123456789ab"
        torch.save(saved, path)
    assert "versions.csgd: '0123456789ab' then, " in finish(start(folder), folder, status=2).splitlines()[-1]


def test_a_checkpoint_of_an_older_form_is_refused_by_name(whole, tmp_path):
    folder = tmp_path / "older"
    shutil.copytree(whole[0].parent, folder)
    for path in (folder / "out" / "checkpoints").iterdir():
        saved = torch.load(path, weights_only=True)
        del saved["form"]
        torch.save(saved, path)
    last = finish(start(folder), folder, status=2).splitlines()[-1]
    assert "last.pt' is a checkpoint of form 1, this version writes form 3" in last
    assert last.endswith("move the folder away or say resume=never to start anew")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(whole, tmp_path):
    folder = tmp_path / "damaged"
    process = start(folder)
    wait_for(folder / "out" / "checkpoints" / "last.pt.previous", process)
    kill(process)
    last = folder / "out" / "checkpoints" / "last.pt"
    if last.exists():
        last.write_bytes(last.read_bytes()[:1000])
    text = finish(start(folder, "report=true"), folder)
    assert "is damaged" in text or "resumed from" in text
    assert_same_run(whole[0], folder / "out")
    assert (folder / "out" / "report.html").exists()
    assert "could not be drawn" not in text


def test_a_folder_in_use_is_refused(tmp_path):
    folder = tmp_path / "busy"
    (folder / "out").mkdir(parents=True)
    with FileLock(folder / "out" / ".lock"):
        text = finish(start(folder), folder, status=2)
        finish(start(folder, "tolerance.logits=-1"), folder, status=2)
    assert "is in use by a run that is still alive" in text.splitlines()[-1]
    assert not (folder / "out" / "failed.txt").exists()


def test_checkpoints_of_which_none_can_be_read_are_kept(tmp_path):
    checkpoints = tmp_path / "damaged" / "out" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for name in ("last.pt", "last.pt.previous"):
        (checkpoints / name).write_bytes(b"PK cut short")
    last = finish(start(tmp_path / "damaged"), tmp_path / "damaged", status=2).splitlines()[-1]
    assert last.startswith("error: resume=auto: 'out/checkpoints/last.pt' (".replace("out/", f"{checkpoints.parent}/"))
    assert last.endswith("cannot be read; move the folder away or say resume=never to start anew")
    assert {path.name: path.read_bytes() for path in checkpoints.iterdir()} == {
        "last.pt": b"PK cut short", "last.pt.previous": b"PK cut short",
    }  # fmt: skip
    torch.save({"state_dict": {}}, checkpoints / "last.pt")
    last = finish(start(tmp_path / "damaged"), tmp_path / "damaged", status=2).splitlines()[-1]
    assert last.endswith("last.pt' is no checkpoint of a run: it has no 'config'")
