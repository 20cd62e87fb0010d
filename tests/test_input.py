"""What cannot be used is said in one clear line, and told apart from a bug."""

import os
import subprocess
import sys

import pytest
import torch
from test_run import ROOT, SMOKE, run

from csgd.checkpoint import save_weights
from csgd.models import resnet20, vgg16


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A folder with weights that are wrong in different ways, and empty data."""
    path = tmp_path_factory.mktemp("faulty")
    save_weights(path / "vgg.safetensors", vgg16(10, 32).state_dict())
    (path / "cut.safetensors").write_bytes((path / "vgg.safetensors").read_bytes()[:5000])
    torch.save(resnet20(10), path / "module.pt")
    (path / "file").write_text("in the way")
    return path


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["deps=9_8"], "Could not find 'deps/9_8' Available options in 'deps': 11_16 13_16 1_2 1_4 3_4 3_8 5_8"),
        (["centri_strength=-1"], "centri_strength must be a number of 0 or more, auto, or null, got -1"),
        (["centri_strength=much"], "centri_strength must be a number of 0 or more, auto, or null, got 'much'"),
        (["vector_ratio=much"], "Value 'much' of type 'str' could not be converted to Float"),
        ([*SMOKE, "centri_strength=auto", "collapse_by=0.05"], "centri_strength=auto: no stable strength collapses"),
        (["centri_strength=1e5"], "centri_strength 100000 diverges at learning rate"),
        (["schedule.csgd.lr=100", "centri_strength=0.8"], "diverges at learning rate 100"),
        (["dataset=imagefolder", "dataset.root=nowhere"], "dataset.root 'nowhere' is not a folder"),
        (["dataset=cifar10"], "CIFAR-10 in 'data' is not there; dataset.download=true fetches it"),
        ([*SMOKE, "base.weights=vgg.safetensors"], "base.weights 'vgg.safetensors' are of another architecture"),
        ([*SMOKE, "base.weights=cut.safetensors"], "base.weights 'cut.safetensors' is damaged"),
        ([*SMOKE, "base.weights=module.pt"], "is a pickle of more than tensors and is not loaded"),
        ([*SMOKE, "base.weights=gone.pt"], "base.weights 'gone.pt' is not a file"),
        ([*SMOKE, "hydra.run.dir=file/out"], "'file/out"),
        ([*SMOKE, "deps.widths=[10,10]"], "deps.widths has 2 entries, the network has 21 trimmable layers"),
        ([*SMOKE, "deps.layers={nothing: 0.5}"], "deps.layers: no layer matches 'nothing'"),
        ([*SMOKE, "deps.keep=['*']"], "nothing is left to trim"),
        ([*SMOKE, "model._target_=torch.nn.Flatten"], "nothing in this network can be trimmed"),
        (["model=vgg16", "dataset.image_size=16"], "the model cannot take images of [3, 16, 16]"),
        ([*SMOKE, "model._target_=torch.nn.ReLU"], "the model must return logits [n, 10], got [2, 3, 32, 32]"),
        ([*SMOKE, "model._target_=pathlib.Path"], "model._target_ must make a torch.nn.Module"),
        (
            [*SMOKE, "~dataset.image_size", "~dataset.shift", "dataset._target_=csgd.ranks.Share"],
            "dataset._target_ must make a csgd.data.Data, got Share",
        ),
        ([*SMOKE, "model._target_=nowhere.Net"], "model._target_ 'nowhere.Net' cannot be imported"),
        ([*SMOKE, "+model.depth=3"], "model: 'csgd.models.resnet20' does not fit its settings"),
        ([*SMOKE, "device=cuda"], "device=cuda: torch sees no CUDA device here"),
        ([*SMOKE, "schedule.base.lr=1e30"], "the loss at step"),
        (
            ["model=torchvision", *SMOKE[1:], "model.name=resnet18", "schedule.batch_size=718"],
            "schedule.batch_size=718 leaves a last batch of 1 of the 1437 images, on which this network cannot be "
            "trained: Expected more than 1 value per channel",
        ),
    ],
)
def test_bad_input_is_one_clear_line(faulty, arguments, message):
    if "device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = run(faulty, *arguments, status=2)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert "Traceback" not in done.stdout + done.stderr


def test_a_full_trace_on_request(faulty):
    environment = {**os.environ, "HYDRA_FULL_ERROR": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "centri_strength=-1"],
        cwd=faulty, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Traceback" in done.stderr
