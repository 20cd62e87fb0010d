"""The folder of a pruned network, rebuilt in processes that know nothing of the run."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import csgd
import csgd.build
import csgd.models
from csgd import InputError, load_pruned, save_pruned
from csgd.proof import randomise
from csgd.trial import random_clusters
from tests import nets

ROOT = Path(__file__).parents[1]
REBUILD = """
import sys
import torch
from safetensors.torch import load_file
import csgd
torch.set_grad_enabled(False)
for folder in sys.argv[1:]:
    expected = load_file(folder + "/expected.safetensors")
    model = csgd.load_pruned(folder)
    assert not model.training
    assert torch.equal(model(expected["inputs"]), expected["outputs"]), folder
    print(folder, sum(p.numel() for p in model.parameters()))
print({"hydra", "omegaconf", "wandb", "conf"} & sys.modules.keys())
"""


def left_by(folder, model, settings, example, num_classes):
    """A folder with `model` cut to random clusters, and what it answers to `example`; its number of parameters."""
    randomise(model)
    spaces = csgd.find_spaces(model, example)
    clusters = random_clusters(spaces)
    csgd.merge_equal(model, spaces, clusters)
    csgd.trim(model, spaces, clusters)
    widths = {name: len(parts) for name, parts in clusters.items()}
    save_pruned(folder, model, settings, example, num_classes, widths, verdict={"lossless": True})
    with torch.no_grad():
        expected = {"inputs": example, "outputs": model.eval()(example)}
    save_file(expected, folder / "expected.safetensors")
    return sum(p.numel() for p in model.parameters())


def rebuilt(cwd, *folders, modules=()):
    """Runs REBUILD on the folders, on a path that holds the package and `modules` alone."""
    (cwd / "site").mkdir()
    (cwd / "site" / "csgd").symlink_to(ROOT / "csgd")
    for module in modules:
        (cwd / "site" / module.name).write_text(module.read_text())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd / "site")}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", REBUILD, *map(str, folders)],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_networks_of_ones_own_are_rebuilt_elsewhere(tmp_path):
    torch.set_num_threads(1)
    expected = []
    for net in nets.EXAMPLES:
        folder = tmp_path / net.__name__
        params = left_by(folder, net(), {"_target_": f"nets.{net.__name__}"}, nets.example_of(net), 5)
        assert params < sum(p.numel() for p in net().parameters())
        expected.append(f"{folder} {params}")
    lines = rebuilt(tmp_path, *(line.split()[0] for line in expected), modules=[ROOT / "tests" / "nets.py"])
    assert lines == [*expected, "set()"]


def test_our_networks_and_torchvisions_are_rebuilt_elsewhere(tmp_path):
    torch.set_num_threads(1)
    example, expected = torch.randn(2, 3, 32, 32), []
    for settings in (
        {"_target_": "csgd.models.vgg16"},
        {"_target_": "csgd.models.resnet20"},
        {"_target_": "csgd.models.torchvision", "name": "mobilenet_v2"},
        {"_target_": "torchvision.models.shufflenet_v2_x0_5"},
    ):
        model = csgd.build.build("model", settings, num_classes=10, image_size=32)
        folder = tmp_path / settings["_target_"]
        expected.append(f"{folder} {left_by(folder, model, settings, example, 10)}")
    assert rebuilt(tmp_path, *(line.split()[0] for line in expected)) == [*expected, "set()"]


def test_a_class_within_a_class_and_a_network_that_is_given(tmp_path):
    (tmp_path / "family.py").write_text(
        "from tests.nets import Plain\n"
        "class Family:\n"
        "    Inner = Plain\n"
        "def made(num_classes):\n"
        "    raise SystemExit('called')\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        params = left_by(tmp_path, nets.Plain(), {"_target_": "family.Family.Inner"}, nets.example_of(nets.Plain), 5)
        assert sum(p.numel() for p in load_pruned(tmp_path).parameters()) == params
        tamper(tmp_path, model={"_target_": "family.made"})
        with pytest.raises(InputError, match="'family.made' is not called: .* function annotated to return one"):
            load_pruned(tmp_path)
        assert sum(p.numel() for p in load_pruned(tmp_path, nets.Plain()).parameters()) == params
    finally:
        sys.path.remove(str(tmp_path))


@pytest.fixture
def folder(tmp_path):
    left_by(tmp_path, csgd.models.resnet20(10), {"_target_": "csgd.models.resnet20"}, torch.randn(2, 3, 16, 16), 10)
    return tmp_path


def tamper(folder, **changes):
    """Changes pruned.json; a key that is None is removed."""
    described = json.loads((folder / "pruned.json").read_text()) | changes
    kept = {key: value for key, value in described.items() if value is not None}
    (folder / "pruned.json").write_text(json.dumps(kept))


def with_sum(folder, change):
    """Changes the tensors, and the checksum with them."""
    path = folder / "pruned.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    tamper(folder, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def flip_a_bit(folder):
    path = folder / "pruned.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def as_pickle(folder, name):
    (folder / "pruned.safetensors").unlink()
    torch.save({"weight": torch.ones(2)}, folder / name)


def narrower(state):
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"][:2].clone()


def wider(state):
    state["conv1.weight"] = torch.ones(99, 3, 3, 3)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "pruned.json").unlink(), "is incomplete: pruned.json is missing"),
        (lambda f: (f / "pruned.safetensors").unlink(), "is incomplete: pruned.safetensors is missing"),
        (lambda f: as_pickle(f, "pruned.pt"), "pruned.safetensors is missing; 'pruned.pt' is a pickle and is not"),
        (lambda f: as_pickle(f, "pruned.safetensors"), "is not a safetensors file; pickles are not loaded"),
        (flip_a_bit, "is not the file that pruned.json describes: its SHA-256 is another"),
        (lambda f: (f / "pruned.json").write_text("{"), "pruned.json' is damaged: "),
        (lambda f: (f / "pruned.json").write_text("[]"), "pruned.json' is damaged: it has no 'format'"),
        (lambda f: tamper(f, sha256=None), "pruned.json' is damaged: it has no 'sha256' of type str"),
        (lambda f: tamper(f, num_classes="10"), "it has no 'num_classes' of type int"),
        (lambda f: tamper(f, format=9), "is of format 9, this csgd reads format 1"),
        (lambda f: tamper(f, model={}), "model has no '_target_'"),
        (lambda f: tamper(f, input=[]), "input must be a list of sizes, got []"),
        (lambda f: tamper(f, input=[1, 8, 8]), "it cannot take [1, 8, 8]"),
        (lambda f: tamper(f, model={"_target_": "nowhere.Net"}), "model._target_ 'nowhere.Net' cannot be imported"),
        (lambda f: tamper(f, model={"_target_": "os.system", "command": "exit"}), "'os.system' is not called"),
        (lambda f: tamper(f, model={"_target_": "csgd.models.vgg16"}), "weights of another architecture"),
        (lambda f: tamper(f, model={"_target_": "csgd.models.resnet20", "n": 1}), "does not fit its settings"),
        (lambda f: tamper(f, num_classes=-1), "fails on the settings of pruned.json"),
        (lambda f: tamper(f, num_classes=100), "num_classes is 100, the network has 10 outputs"),
        (lambda f: tamper(f, widths={"conv1": 99}), "pruned.json: width 99 of 'conv1' does not fit its weight of ["),
        (lambda f: with_sum(f, narrower), "does not fit together, it cannot take [3, 16, 16]"),
        (lambda f: with_sum(f, wider), "weights of another architecture: conv1.weight is [99, 3, 3, 3], at most"),
        (lambda f: with_sum(f, lambda state: state.pop("fc.bias")), "missing ['fc.bias']"),
    ],
)
def test_a_folder_that_does_not_hold_together_is_refused(folder, damage, message):
    load_pruned(folder)
    damage(folder)
    with pytest.raises(InputError) as caught:
        load_pruned(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(InputError, match="nowhere' is not a folder"):
        load_pruned(tmp_path / "nowhere")
