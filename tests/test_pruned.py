"""The folder of a pruned network, rebuilt in processes that know nothing of the run."""

import hashlib
import importlib
import inspect
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
    model = csgd.load_pruned(folder, allow=["nets"])
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


def test_a_class_within_a_class_a_function_and_a_network_that_is_given(tmp_path):
    (tmp_path / "family.py").write_text(
        "from tests.nets import Plain\n"
        "class Family:\n"
        "    Inner = Plain\n"
        "def made(num_classes):\n"
        "    return Plain()\n"
        "def other():\n"
        "    return 'no network'\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        params = left_by(tmp_path, nets.Plain(), {"_target_": "family.Family.Inner"}, nets.example_of(nets.Plain), 5)

        def loaded(*given, **word):
            return sum(p.numel() for p in load_pruned(tmp_path, *given, **word).parameters())

        with pytest.raises(InputError, match=r"'family.Family.Inner' is not called: .*load_pruned.folder, model. .*"):
            load_pruned(tmp_path)
        assert "family" not in sys.modules
        with pytest.raises(InputError, match="is not called: it is tests.nets.Plain; .*"):
            load_pruned(tmp_path, allow=["family"])
        assert loaded(allow=["family", "tests"]) == loaded(allow=["family.Family.Inner"]) == params
        assert loaded(nets.Plain()) == params
        tamper(tmp_path, model={"_target_": "family.made"})
        assert loaded(allow=["family"]) == loaded(allow=["family.made"]) == params
        for word in (["famil"], ["family.Family"], ["family.mad"], [""], ["."], ["family."], ["made"]):
            with pytest.raises(InputError, match=r"'family.made' is not called: .*allow=.\"family\". .--allow family."):
                load_pruned(tmp_path, allow=word)
        with pytest.raises(InputError, match="allow must be a list of dotted names, got the text 'family'"):
            load_pruned(tmp_path, allow="family")
        tamper(tmp_path, model={"_target_": "family.other"})
        with pytest.raises(InputError, match="'family.other' must make a torch.nn.Module, got str"):
            load_pruned(tmp_path, allow=["family"])
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("family", None)


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
        (lambda f: tamper(f, input=[3, 30000, 30000]), "input [3, 30000, 30000] has more than 67,108,864 numbers"),
        (lambda f: (f / "pruned.json").write_text("[" * 100_000), "pruned.json' is damaged: maximum recursion depth"),
        (lambda f: tamper(f, model={"_target_": "net\nNet"}), r"model._target_ 'net\nNet' is not called: "),
        (lambda f: tamper(f, input=[1, 8, 8]), "cannot take the example of [2, 1, 8, 8]"),
        (lambda f: tamper(f, model={"_target_": "nowhere.Net"}), "model._target_ 'nowhere.Net' is not called: "),
        (lambda f: tamper(f, model={"_target_": "os.system", "command": "exit"}), "'os.system' is not called"),
        (lambda f: tamper(f, model={"_target_": "csgd.models.vgg16"}), "weights of another architecture"),
        (lambda f: tamper(f, model={"_target_": "csgd.models.resnet20", "n": 1}), "does not fit its settings"),
        (lambda f: tamper(f, num_classes=-1), "fails on the settings of pruned.json"),
        (lambda f: tamper(f, num_classes=100), "num_classes is 100, the network has 10 outputs"),
        (lambda f: tamper(f, widths={"conv1": 99}), "pruned.json: width 99 of 'conv1' does not fit its weight of ["),
        (lambda f: with_sum(f, narrower), "conv1.weight of [2, 8, 3, 3] keeps 2, layer1.0.bn1.weight of ["),
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


@pytest.mark.parametrize(
    "target, settings, message",
    [
        ("torch.nn.Linear", {"in_features": 20_000, "out_features": 20_000}, "has more than 67,108,864 numbers"),
        ("torch.nn.Conv1d", {"in_channels": 10**9, "out_channels": 10, "kernel_size": 3}, "has more than 67,108,864"),
        ("csgd.models.vgg16", {"width": 1000}, "has more than 67,108,864 numbers"),
        (
            "torch.nn.Linear",
            {"in_features": 6, "out_features": 10, "device": "meta"},
            "weight of the model is on the meta",
        ),
    ],
)
def test_a_folder_makes_no_network_that_is_too_large_or_has_no_values(tmp_path, target, settings, message):
    """One line, before memory is filled; 20,000 inputs and outputs would be 1.6 GB."""
    save_pruned(tmp_path, torch.nn.Linear(6, 10), {"_target_": target} | settings, torch.zeros(1, 6), 10)
    with pytest.raises(InputError) as caught:
        load_pruned(tmp_path)
    assert message in str(caught.value)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(InputError, match="nowhere' is not a folder"):
        load_pruned(tmp_path / "nowhere")


def makers_of_torch():
    """Every public function of torch that is annotated to return a Module, and every class but the layers of nn."""
    for name in ("hub", "jit", "fx.experimental.optimization", "export.unflatten", "quantization", "package", "onnx"):
        importlib.import_module(f"torch.{name}")
    importlib.import_module("torch.ao.quantization.quantize_fx")
    makers = {"torch.hub.load": torch.hub.load, "torch.jit.load": torch.jit.load, "torch.load": torch.load}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "torch" and "._" not in name:
            for attribute, made in vars(module).items():
                public = callable(made) and not attribute.startswith("_")
                if public and csgd.build.makes(made, torch.nn.Module):
                    makers[f"{name}.{attribute}"] = made
    return {
        target: made
        for target, made in makers.items()
        if not (isinstance(made, type) and made.__module__.startswith("torch.nn.modules."))
    }


def called_by(act):
    """The code of every Python function that runs during act()."""
    seen = set()
    sys.setprofile(lambda frame, event, _: seen.add(frame.f_code) if event == "call" else None)
    try:
        act()
    finally:
        sys.setprofile(None)
    return seen


def test_no_function_of_torch_is_called_because_a_folder_names_it(folder):
    makers = makers_of_torch()
    assert {"torch.fx.symbolic_trace", "torch.jit.ScriptModule", "torch.export.unflatten.unflatten"} <= makers.keys()
    (folder / "hubconf.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nfrom torch.nn import Linear as net\n")
    payload = {"repo_or_dir": str(folder), "model": "net", "source": "local", "f": str(folder), "module": "net"}

    def refused(target, **settings):
        tamper(folder, model={"_target_": target, **settings})
        with pytest.raises(InputError, match=f"^model._target_ '{target}' is not called: by themselves only") as caught:
            load_pruned(folder)
        assert "\n" not in str(caught.value)
        assert "load_pruned(folder, model)" in str(caught.value)

    for target, made in makers.items():
        code = getattr(made, "__code__", None) or getattr(made.__init__, "__code__", None)
        taken = {name: str(folder) for name, p in inspect.signature(made).parameters.items() if p.default is p.empty}
        assert code not in called_by(lambda target=target, taken=taken: refused(target, **taken)), target
    refused("torch.hub.load", **payload)
    for way in ("csgd.models.torchvision.nn.utils.skip_init", "csgd.models.torchvision.models.resnet18"):
        refused(way)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "target",
    [
        "csgd.models.published_weights",
        "csgd.models.torchvision.classifier_names",
        "csgd.pruned.load_pruned",
        "csgd.models.nowhere",
        "csgd.models",
        "csgd.modelsx.resnet20",
        "torchvision.models.get_model",
        "torchvision.models.get_model_weights",
        "torchvision.models.feature_extraction.create_feature_extractor",
        "torchvision.models.resnet.load_state_dict_from_url",
        "torchvision.models._api.get_model",
        "torchvision.models.ResNet.get_submodule",
        "torchvision.models.resnet.nn.Linear",
        "torchvision.datasets.CIFAR10",
        "torch.nn.utils.skip_init",
        "torch.nn.Module.get_submodule",
        "builtins.eval",
        "subprocess.Popen",
        "net",
        "",
        ".",
        "..os.system",
        "csgd.models.",
        "nets:Plain",
    ],
)
def test_what_a_folder_may_name_is_narrow(folder, target):
    tamper(folder, model={"_target_": target})
    with pytest.raises(InputError, match=r"is not called: by themselves only makers in csgd.models, torchvision.mod"):
        load_pruned(folder)


def test_what_a_folder_may_name_by_itself(tmp_path):
    for settings, shape in (
        ({"_target_": "torchvision.models.mnasnet0_5", "weights": None}, (3, 32, 32)),
        ({"_target_": "torchvision.models.squeezenet.SqueezeNet"}, (3, 64, 64)),
        ({"_target_": "csgd.models.resnet.CifarResNet", "blocks": 1}, (3, 16, 16)),
        ({"_target_": "torch.nn.Linear", "in_features": 6, "out_features": 10}, (6,)),
    ):
        model = csgd.build.build("model", settings, num_classes=10)
        save_pruned(tmp_path, model, settings, torch.zeros(1, *shape), 10)
        assert type(load_pruned(tmp_path)) is type(model)


@pytest.mark.parametrize("key", ["weights", "weights_backbone", "pretrained", "pretrained_backbone"])
def test_a_folder_downloads_nothing(folder, key, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(folder / "cache"))
    tamper(folder, model={"_target_": "torchvision.models.resnet18", key: "DEFAULT"})
    with pytest.raises(
        InputError, match=f"model.{key} 'DEFAULT' of pruned.json is not downloaded; load_pruned.folder, m"
    ):
        load_pruned(folder)
    # By its own default this builder downloads a backbone.
    tamper(folder, model={"_target_": "torchvision.models.segmentation.fcn_resnet50"})
    with pytest.raises(InputError, match="weights of another architecture"):
        load_pruned(folder)
    assert not (folder / "cache").exists()


LIES_IN_THE_FOLDER = ("evil.py", "evil2/net.py", "nets.py", "torchvision.py", "csgd/models/evil.py", "sklearn.py")


def test_code_that_lies_in_the_folder_is_not_imported(folder):
    """Neither what pruned.json names, nor what goes by the name of a package that is imported only now."""
    for name in LIES_IN_THE_FOLDER:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"open({str(folder / 'ran')!r}, 'w')\nfrom torch.nn import Linear as Net\n")
    targets = [
        "evil.Net",
        "evil2.net.Net",
        "nets.Plain",
        "csgd.models.evil.Net",
        "torchvision.Net",
        "csgd.models.resnet20",
    ]
    code = (
        "import csgd, json, os, sys\n"
        "os.chdir(sys.argv.pop(1))\n"
        "assert sys.path[0] == ''\n"
        "described = json.load(open('pruned.json'))\n"
        "for target in sys.argv[1:]:\n"
        "    json.dump(described | {'model': {'_target_': target}}, open('pruned.json', 'w'))\n"
        "    try:\n"
        "        print(type(csgd.load_pruned('.')).__name__)\n"
        "    except csgd.InputError as error:\n"
        "        print(error)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), *targets],
        cwd=folder.parent, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not (folder / "ran").exists()
    lines = done.stdout.splitlines()
    assert lines.pop() == "CifarResNet", done.stderr
    assert len(lines) == len(targets) - 1
    for target, line in zip(targets, lines, strict=False):
        assert line.startswith(f"model._target_ '{target}' is not called")
