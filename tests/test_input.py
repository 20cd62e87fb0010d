"""What cannot be used is said in one clear line, and told apart from a bug."""

import os
from dataclasses import replace

import pytest
import torch
from commandline import run, run_fresh
from test_config import composed
from test_run import SMOKE

from csgd import InputError
from csgd.checkpoint import save_weights
from csgd.data import synthetic
from csgd.models import resnet20, vgg16
from csgd.pipeline.setup import prepare
from csgd.pipeline.spec import RunSpec
from csgd.train import DivergedError, Sums


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A folder with weights that are wrong in different ways, and empty data."""
    path = tmp_path_factory.mktemp("faulty")
    save_weights(path / "vgg.safetensors", vgg16(10, 32).state_dict())
    (path / "cut.safetensors").write_bytes((path / "vgg.safetensors").read_bytes()[:5000])
    torch.save(resnet20(10), path / "module.pt")
    (path / "file").write_text("in the way")
    (path / "conf" / "experiment").mkdir(parents=True)
    (path / "conf" / "experiment" / "bare.yaml").write_text("# @package _global_\ndefaults:\n  - override /deps: 3_4\n")
    return path


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["deps=0.5"], "deps=0.5: deps must be a name, such as 5_8; a fraction is deps.fraction=0.6, and widths are"),
        (["deps=[8,8]"], "deps=[8,8]: deps must be a name, such as 5_8; a fraction is deps.fraction=0.6, and widths"),
        (["-m", "deps=5_8,0.5"], "deps='5_8',0.5: deps must be a name, such as 5_8; a fraction is deps.fraction=0.6"),
        (["deps=5_8,staged_5_8"], "Ambiguous value for argument 'deps='5_8',staged_5_8'"),
        (
            ["experiment=bare", "--config-dir=conf"],
            "Unsupported item value in defaults : int. Supported: string or list; a name of digits must be quoted",
        ),
        (["experiment=smok"], "Could not find 'experiment/smok'"),
        (["deps=9_8"], "Could not find 'deps/9_8' Available options in 'deps': 11_16 13_16 1_2 1_4 3_4 3_8 5_8"),
        (["centri_strength=-1"], "centri_strength must be a number of 0 or more, auto, or null, got -1"),
        (["centri_strength=much"], "centri_strength must be a number of 0 or more, auto, or null, got 'much'"),
        (["vector_ratio=much"], "Value 'much' of type 'str' could not be converted to Float"),
        ([*SMOKE, "deps.macs=0.001"], "deps.macs=0.001: a budget of 0.001 of the macs cannot be met: the least"),
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


class Broken(torch.nn.Module):
    def __init__(self, width):
        raise KeyError(width)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["dataset=cifar10", "dataset.classes=20"], "dataset.classes must be 10 or 100, got 20"),
        (["dataset.image_size=0"], "dataset: 'csgd.data.digits' fails on its settings: RuntimeError: Input and output"),
        (["model=torchvision", "model.name=null"], "model.name 'None' is no torchvision classifier"),
        (
            ["model._target_=test_input.Broken", "+model.width=3"],
            "model: 'test_input.Broken' fails on its settings: KeyError: 3",
        ),
        (
            ["dataset._target_=csgd.data.synthetic"],
            "missing a required argument: 'num_classes'; ~dataset.shift leaves out what it does not take",
        ),
        (
            ["model._target_=test_input.Broken", "+model.depth=3"],
            "'width'; ~model.depth leaves out what it does not take",
        ),
    ],
)
def test_what_cannot_be_built_is_one_line_with_its_cause(overrides, message):
    with pytest.raises(InputError) as caught:
        prepare(RunSpec.of(composed(*overrides)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def not_numbers(batch_size, seed, device):
    small = dict(num_classes=2, image_size=8, train_size=8, test_size=4)
    data = synthetic(**small, batch_size=batch_size, seed=seed, device=device)
    return replace(data, example=data.example / 0)


def test_images_that_are_no_numbers_are_told():
    mine = ["dataset._target_=test_input.not_numbers", "~dataset.image_size", "~dataset.shift"]
    with pytest.raises(InputError, match="dataset: its first images hold NaN or infinity"):
        prepare(RunSpec.of(composed(*mine)))


@pytest.mark.parametrize(
    "step, why", [(0, "the images or the weights at the start hold NaN"), (3, "a lower learning rate")]
)
def test_a_loss_that_is_no_number_before_the_first_step_is_no_matter_of_the_learning_rate(step, why):
    with pytest.raises(DivergedError, match=f"the loss at step {step} is not a number: .*{why}"):
        Sums(unchecked=[torch.tensor(torch.nan)]).check(step + 1)


def test_a_trace_that_is_not_shown_is_kept(faulty):
    """A line may hide a bug, of a network of the user's too."""
    mine = ["model._target_=test_input.Broken", "+model.width=3", "wandb=disabled", "hydra.run.dir=out"]
    done = run(faulty, *mine, status=2, PYTHONPATH=os.path.dirname(__file__))
    assert done.stderr == "error: model: 'test_input.Broken' fails on its settings: KeyError: 3\n"
    assert "Traceback" not in done.stdout
    assert "raise KeyError(width)" in (faulty / "out" / "run.log").read_text()


def test_a_console_of_few_characters_shows_the_others_as_marks(tmp_path):
    done = run_fresh(tmp_path, "deps=0.5", status=2, PYTHONIOENCODING="ascii")
    assert done.stderr.endswith("deps.widths=[40,40,?]\n")


def test_a_full_trace_on_request(faulty):
    done = run_fresh(faulty, "centri_strength=-1", status=1, HYDRA_FULL_ERROR="1")
    assert "Traceback" in done.stderr
