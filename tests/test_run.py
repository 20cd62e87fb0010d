"""The command line itself, in processes of their own."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from commandline import ROOT, run, run_fresh
from test_config import composed

from csgd import load_trimmed
from csgd.build import build
from csgd.checkpoint import load_weights, save_weights
from csgd.data import FASHION_PACKAGE, synthetic
from csgd.models import resnet20, vgg16
from csgd.pipeline.base import cache_path
from csgd.pipeline.spec import RunSpec

SHORT = [  # the main job's own path, on fewer steps
    "schedule.batch_size=8",
    "schedule.base={epochs: 1, lr: 3e-4, warmup_epochs: 0, max_steps: 3}",
    "schedule.csgd={epochs: 2, lr: 0.01, warmup_epochs: 0, max_steps: 15, decay: constant}",
    "centri_strength=60",
    "ramp=constant",
]
SMOKE = ["model=resnet20", "schedule=smoke", "wandb=disabled"]
UNDRAWN = ["wandb=disabled", "report=false"]


def only(paths):
    (path,) = paths
    return path


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("main")
    done = run_fresh(tmp_path, "model=vgg16", "deps=5_8", *SHORT, "hydra.run.dir=out")
    return tmp_path / "out", done


def test_the_main_job_proves_its_cut(main_job):
    out, done = main_job
    summary = json.loads((out / "summary.json").read_text())
    verdict, cost = summary["verdict"], summary["cost"]
    assert verdict["lossless"] is True
    assert verdict["relative_logit_change"] <= 1e-4
    assert verdict["relative_deviation"] <= 1e-5
    assert 0 < verdict["deviation"] < 1e-4
    assert verdict["accuracy_before_trim"] == verdict["accuracy_after_trim"]
    assert 0 <= verdict["accuracy"] <= 1
    assert 1 - cost["macs_after"] / cost["macs_before"] >= 0.60
    assert cost["params_after"] < cost["params_before"]
    assert list(summary["widths"].values()) == [40, 40, 80, 80, 160, 160, 160] + [320] * 6
    assert {"base", "cluster", "csgd", "csgd_wide", "csgd_trimmed", "trim", "total"} == summary["seconds"].keys()
    assert summary["seed"] == 0
    assert summary["config"]["deps"]["fraction"] == 0.625
    assert {"device", "versions", "commit"} <= summary.keys()
    assert 0 <= summary["base"]["accuracy"] <= 1
    assert "LOSSLESS" in done.stdout
    assert "features.28" in done.stdout
    assert str(out) in done.stdout


def test_the_main_job_leaves_its_files(main_job):
    out, _ = main_job
    for name in (
        "metrics.jsonl",
        "clusters.json",
        "pruned.json",
        "run.log",
        "checkpoints/last.pt",
        "report/curves.png",
    ):
        assert (out / name).stat().st_size > 0, name
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    wide = [row for row in rows if "left/kernels" in row]
    assert [row["phase"] for row in rows] == ["base"] + ["csgd"] * 3, "an epoch, the cut within the next, its rest"
    assert [row["epoch"] for row in rows] == [1, 2, 1 + wide[-1]["step"] / 15, 3]
    assert len(wide) == 2
    for row in wide:
        assert row["left/kernels"] == pytest.approx(row["forecast/kernels"], rel=0.01, abs=1e-6)
        assert row["left/vectors"] == pytest.approx(row["forecast/vectors"], rel=0.01, abs=1e-6)
    cut = json.loads((out / "summary.json").read_text())["cut"]
    assert cut["step"] == cut["foreseen_step"] == wide[-1]["step"]
    clusters = json.loads((out / "clusters.json").read_text())
    assert sorted(slot for part in clusters["features.0"] for slot in part) == list(range(64))
    folder = out / "checkpoints"
    done = torch.load(folder / "last.pt", weights_only=True)
    assert done["facts"]["part"] == "between"
    assert len(done["facts"]["results"]) == 1
    last_step = torch.load(folder / "last.pt.previous", weights_only=True)
    assert (last_step["facts"]["part"], last_step["facts"]["step"]) == ("narrow", 30)
    assert last_step["facts"]["clusters"] == clusters
    run_file = only(out.glob("wandb/offline-run-*/run-*.wandb"))
    content = run_file.read_bytes()
    for key in (b"left/kernels", b"forecast/vectors", b"csgd/test_accuracy", b"verdict/lossless"):
        assert key in content, key


def test_the_pruned_file_is_the_small_network(main_job):
    out, _ = main_job
    state = load_weights(out / "pruned.safetensors")
    assert state["features.0.weight"].shape == (40, 3, 3, 3)
    assert state["classifier.0.weight"].shape == (10, 320)
    model = load_trimmed(vgg16(10, 32), state)
    assert (
        sum(p.numel() for p in model.parameters())
        == json.loads((out / "summary.json").read_text())["cost"]["params_after"]
    )
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_a_sweep_trains_its_base_once_and_gives_each_job_its_own_run(tmp_path):
    sweep = [
        "-m",
        "model=resnet20",
        "schedule=smoke",
        "dataset.image_size=16",
        "centri_strength=0.1,12",
        "deps=5_8,1_2",
        "report=false",
    ]
    done = run(tmp_path, *sweep, "hydra.sweep.dir=sweep")
    summaries = [json.loads((tmp_path / "sweep" / str(i) / "summary.json").read_text()) for i in range(4)]
    pairs = [
        (s["config"]["centri_strength"], s["config"]["deps"]["fraction"], s["verdict"]["lossless"]) for s in summaries
    ]
    assert pairs == [(0.1, 0.625, False), (0.1, 0.5, False), (12.0, 0.625, True), (12.0, 0.5, True)]
    assert len({s["base"]["accuracy"] for s in summaries}) == 1
    assert done.stdout.count("base network: from the cache") == 3
    assert "the filters will not collapse" in done.stdout
    assert len(list((tmp_path / "sweep").glob("*/wandb/offline-run-*"))) == 4
    for i in range(4):
        phases = [
            json.loads(line)["phase"]
            for line in (tmp_path / "sweep" / str(i) / "metrics.jsonl").read_text().splitlines()
        ]
        assert phases.count("csgd") in (2, 3)


def test_a_cut_that_is_not_lossless_is_made_measured_and_fails(tmp_path):
    short = ["experiment=smoke", "dataset.image_size=16", *UNDRAWN, "hydra.run.dir=out"]
    done = run(tmp_path, *short, "centri_strength=0.5", status=1)
    verdict = json.loads((tmp_path / "out" / "summary.json").read_text())["verdict"]
    assert not verdict["lossless"]
    assert not verdict["collapsed"]
    assert verdict["relative_logit_change"] > 1e-4
    assert "NOT LOSSLESS: the filters have not collapsed" in done.stdout
    assert "would do" in done.stdout


def test_the_same_seed_gives_the_same_network(tmp_path):
    for name in ("one", "two"):
        run(tmp_path, "experiment=smoke", "dataset.image_size=16", *UNDRAWN, f"base.cache={name}",
            f"hydra.run.dir=out/{name}")  # fmt: skip
    states = [load_weights(tmp_path / "out" / name / "pruned.safetensors") for name in ("one", "two")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_other_models_and_a_network_of_ones_own(tmp_path):
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(),\n"
        "            nn.Conv2d(16, 16, 3, 2), nn.ReLU(),\n"
        "            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))\n"
    )
    short = ["schedule=smoke", "dataset.image_size=16", *UNDRAWN]
    run(tmp_path, "model._target_=mynet.Net", *short, "hydra.run.dir=own", PYTHONPATH=str(tmp_path))
    gentle = ["schedule.base.lr=0.01", "schedule.csgd.lr=0.01", "centri_strength=60", "ramp=constant", *UNDRAWN]
    named = ["model=torchvision", "model.name=squeezenet1_1", "deps=3_4", "schedule=smoke"]
    run(tmp_path, *named, *gentle, "hydra.run.dir=squeezenet")
    for name in ("own", "squeezenet"):
        assert json.loads((tmp_path / name / "summary.json").read_text())["verdict"]["lossless"]


def test_a_dataset_of_ones_own_is_a_function_and_a_yaml(tmp_path):
    """torchvision's, in workers: the function of README.md, on images that are there."""
    (tmp_path / "mydata.py").write_text(
        "from torchvision import datasets, transforms\n"
        "from csgd.data import Data\n"
        "def noise(size, batch_size, seed, device, share):\n"
        "    crop = transforms.RandomCrop(size, padding=2)\n"
        "    train = datasets.FakeData(520, (3, size, size), 4, crop)\n"
        "    test = datasets.FakeData(40, (3, size, size), 4, random_offset=520)\n"
        "    return Data.of(train, test, classes=4, mean=(0.5, 0.5, 0.5), std=(0.3, 0.3, 0.3), workers=1,\n"
        "                   batch_size=batch_size, seed=seed, device=device, share=share)\n"
    )
    (tmp_path / "mine" / "dataset").mkdir(parents=True)
    (tmp_path / "mine" / "dataset" / "noise.yaml").write_text("_target_: mydata.noise\nsize: 16\n")
    mine = ["--config-dir=mine", "dataset=noise", "hydra.run.dir=out"]
    run(tmp_path, *mine, *SMOKE, "report=false", PYTHONPATH=str(tmp_path))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["verdict"]["lossless"]
    assert summary["config"]["dataset"] == {"_target_": "mydata.noise", "size": 16}


def test_base_weights_from_a_file(tmp_path):
    torch.manual_seed(7)
    model = resnet20(10)
    save_weights(tmp_path / "base.safetensors", model.state_dict())
    run(tmp_path, "experiment=smoke", "dataset.image_size=16", *UNDRAWN, "base.weights=base.safetensors",
        "hydra.run.dir=out")  # fmt: skip
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["base"]["source"] == "base.safetensors"
    assert not (tmp_path / "outputs").exists(), "nothing was trained for the cache"


def tiny_data(train_size=8):
    sizes = dict(num_classes=2, image_size=4, train_size=train_size, test_size=2, batch_size=8)
    return synthetic(**sizes, seed=0, device=torch.device("cpu"))


def test_a_base_network_of_other_code_is_another_one(tmp_path, monkeypatch):
    sources = {
        "convs": "from torch import nn\nclass Conv(nn.Conv2d):\n    pass\n",
        "blocks": "import convs_of_mine\nclass Block(convs_of_mine.Conv):\n    pass\n",
        "nets": "from torch import nn\nimport blocks_of_mine\n"
        "def net(num_classes):\n    return nn.Sequential(blocks_of_mine.Block(3, num_classes, 8), nn.Flatten())\n",
        "pixels": "from functools import partial\nfrom csgd.data import digits\nmine = partial(digits, shift=1)\n",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}_of_mine.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    spec = RunSpec.of(composed("model._target_=nets_of_mine.net", "dataset._target_=pixels_of_mine.mine"))
    model, data = build("model", spec.model, num_classes=10), tiny_data()
    paths = [cache_path(spec, model, data)]
    assert cache_path(spec, model, data) == paths[0]
    for name, source in sources.items():
        (tmp_path / f"{name}_of_mine.py").write_text(source + "# other code\n")
        paths.append(cache_path(spec, model, data))
    paths.append(cache_path(spec, build("model", spec.model, num_classes=11), data))
    paths.append(cache_path(spec, model, tiny_data(train_size=9)))
    assert len(set(paths)) == 7


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    """A dataset of the user's own whose third epoch is damaged, the second of C-SGD."""
    (tmp_path / "mydata.py").write_text(
        "from dataclasses import replace\n"
        "import csgd.data\n"
        "def damaged(batch_size, seed, device):\n"
        "    data = csgd.data.digits(image_size=16, shift=0, batch_size=batch_size, seed=seed, device=device)\n"
        "    def batches(epoch):\n"
        "        for images, labels in data.train_batches(epoch):\n"
        "            yield images / (0.0 if epoch == 2 else 1.0), labels\n"
        "    return replace(data, train_batches=batches)\n"
    )
    mine = ["~dataset.image_size", "~dataset.shift", "dataset._target_=mydata.damaged"]
    done = run(tmp_path, *SMOKE, *mine, "hydra.run.dir=out", status=2, PYTHONPATH=str(tmp_path))
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert first["phase"] == "csgd"
    assert f"the loss at step {first['step']} is not a number" in done.stderr
    checkpoint = torch.load(tmp_path / "out" / "checkpoints" / "last.pt", weights_only=True)
    assert checkpoint["facts"]["step"] == first["step"]
    assert all(value.isfinite().all() for value in checkpoint["state"]["model"].values())
    assert not (tmp_path / "out" / "summary.json").exists()


def test_help_and_cfg_answer_without_torch(tmp_path):
    for arguments in (["--help"], ["--cfg", "job"]):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", str(ROOT / "run.py"), *arguments],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "torch" not in {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
        assert "centri_strength" in done.stdout


@pytest.mark.parametrize("mode", [["hydra.run.dir=out"], ["-m", "hydra.sweep.dir=out", "seed=0,1"]])
def test_an_interrupted_run_says_in_one_line_how_to_go_on(tmp_path, mode):
    endless = [*mode, *SMOKE, "dataset.image_size=8", "schedule.csgd.epochs=300", "checkpoint_every=5", "deps=5_8"]
    command = [sys.executable, str(ROOT / "run.py"), *endless]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, env=environment)
        while not list(tmp_path.rglob("last.pt")):
            assert process.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    text = (tmp_path / "log.txt").read_text()
    assert "Traceback" not in text
    _, told, command = text.splitlines()[-1].partition("interrupted: to go on: python run.py ")
    assert told
    *words, folder, resume = shlex.split(command)
    assert words == [one for one in endless if not one.startswith("hydra.")]
    assert (tmp_path / folder.partition("=")[2] / ("0" if "-m" in mode else "") / "checkpoints").is_dir()
    assert resume == "resume=auto"


@pytest.mark.slow
@pytest.mark.skipif(not any(FASHION_PACKAGE.glob("*.gz")), reason="needs Debian's dataset-fashion-mnist")
def test_a_small_vision_transformer_that_is_trained_on_fashion_mnist(tmp_path):
    """Whole heads, MLPs and the stream, all to half, when a Collapse has made them equal beside AdamW."""
    sizes = dict(image_size=28, patch_size=7, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128)
    trained = "{epochs: 3, lr: 0.001, optimizer: adamw}"
    run(
        tmp_path,
        "model._target_=torchvision.models.VisionTransformer",
        *(f"+model.{key}={n}" for key, n in sizes.items()),
        "dataset=fashion_mnist",
        "dataset.train_size=6000",
        "deps=1_2",
        f"schedule.base={trained}",
        f"schedule.csgd={trained}",
        *UNDRAWN,
        "base.cache=base",
        "hydra.run.dir=out",
    )
    told = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert told["verdict"]["max_logit_change"] <= 5e-6, "in float32"
    assert told["base"]["accuracy"] > 0.5
    state = load_weights(tmp_path / "out" / "pruned.safetensors")
    assert state["class_token"].shape == (1, 1, 32)
    assert state["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"].shape == (96, 32)
    assert state["encoder.layers.encoder_layer_0.mlp.0.weight"].shape == (64, 32)
