"""What a run leaves to other programs: its exports, its card, and the test of a saved network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from commandline import run

import csgd
from csgd.checkpoint import load_weights
from evaluate import main

ROOT = Path(__file__).parents[1]
SMOKE = ["experiment=smoke", "dataset.image_size=16", "wandb=disabled"]


def started(tmp_path, *command, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )


def evaluated(tmp_path, *arguments):
    return started(tmp_path, str(ROOT / "evaluate.py"), *arguments)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("shipped")
    done = run(tmp_path, *SMOKE, "deps=5_8", "export=all", "hydra.run.dir=out")
    return tmp_path / "out", done


def test_the_exports_of_a_run_are_its_pruned_network(shipped):
    out, done = shipped
    model, images = csgd.load_pruned(out), torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        expected = model(images)
    session = onnxruntime.InferenceSession(out / "pruned.onnx")
    (answer,) = session.run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.export.load(out / "pruned.pt2").module()(images), expected)
    exported = json.loads((out / "summary.json").read_text())["export"]
    assert {name: file["bytes"] for name, file in exported["files"].items()} == {
        name: (out / name).stat().st_size for name in ("pruned.onnx", "pruned.pt2")
    }
    assert exported["weight_bytes"]["pruned"] < 0.5 * exported["weight_bytes"]["dense"]
    assert [timed["batch"] for timed in exported["latency"]] == [1, 8]
    assert all(timed[name]["median_ms"] > 0 for timed in exported["latency"] for name in ("dense", "pruned"))
    assert exported["device"] == "cpu, 1 threads"
    assert "latency, batch 8" in done.stdout
    assert "onnx_ir" not in done.stdout + done.stderr


def test_the_card_tells_what_the_network_is(shipped):
    out, _ = shipped
    card, summary = (out / "pruned.md").read_text(), json.loads((out / "summary.json").read_text())
    assert "    python run.py experiment=smoke dataset.image_size=16 wandb=disabled deps=5_8 export=all\n" in card
    for text in (
        "# resnet20 on digits, pruned",
        "## Verdict: LOSSLESS",
        f"{summary['cost']['params_after']:,} parameters are left of {summary['cost']['params_before']:,}",
        f"torch {torch.__version__.split('+')[0]}",
        f"commit `{summary['commit']}`",
        "pruned.onnx",
    ):
        assert text in card
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if "|" in line]
    for name, width in summary["widths"].items():
        assert [name, width] in [[row[0], int(row[2])] for row in rows if len(row) == 3 and row[2].isdigit()]
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(out))
    assert "normalised as by csgd.data.digits" in code
    names = {"images": torch.randn(2, 3, 16, 16)}
    exec(code, names)
    assert names["logits"].shape == (2, 10)


def test_a_finished_run_is_exported_later_without_training(shipped, tmp_path):
    out, _ = shipped
    shutil.copytree(out.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "out" / "pruned.onnx").unlink()
    before = load_weights(tmp_path / "out" / "pruned.safetensors")
    done = run(tmp_path, *SMOKE, "deps=5_8", "export=onnx", "report=false", "hydra.run.dir=out", "resume=auto")
    assert "epoch 1:" not in done.stdout
    assert (tmp_path / "out" / "pruned.onnx").stat().st_size > 0
    after = load_weights(tmp_path / "out" / "pruned.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before | after)


def test_what_fails_after_the_training_loses_nothing(tmp_path):
    for name in ("pruned.md", "pruned.onnx", "report/curves.png"):
        (tmp_path / "out" / name).mkdir(parents=True)
    done = run(tmp_path, *SMOKE, "export=all", "hydra.run.dir=out")
    for text in ("pruned.onnx could not be exported: ", "pruned.md could not be written: ", "curves.png could not be"):
        assert text in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["export"]["files"]) == ["pruned.pt2"]
    assert summary["verdict"]["lossless"]
    assert csgd.load_pruned(tmp_path / "out")(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def without(folder, *packages):
    """A folder that holds what is installed but for `packages`; with `python -S` nothing else is there."""
    site = Path(torch.__file__).parents[1]
    folder.mkdir()
    for path in site.iterdir():
        if path.name.split("-")[0].split(".")[0] not in packages:
            (folder / path.name).symlink_to(path)
    return str(folder)


def test_a_missing_package_of_an_export_is_one_line_before_the_run(tmp_path):
    site = without(tmp_path / "site", "onnxruntime", "onnxscript")
    for chosen in ("onnx", "all"):
        done = started(tmp_path, "-S", str(ROOT / "run.py"), *SMOKE, f"export={chosen}", PYTHONPATH=site)
        assert done.returncode == 2
        assert done.stderr.strip() == (
            f"error: export={chosen} needs onnxscript, onnxruntime: pip install onnx onnxscript onnxruntime"
        )
        assert "epoch" not in done.stdout


def test_a_run_needs_neither_wandb_nor_matplotlib_nor_onnx(tmp_path):
    site = without(tmp_path / "site", "wandb", "matplotlib", "onnx", "onnxscript", "onnxruntime")
    command = ["-S", str(ROOT / "run.py"), *SMOKE, "wandb=offline", "export=torch", "hydra.run.dir=out"]
    done = started(tmp_path, *command, PYTHONPATH=site)
    assert done.returncode == 0, done.stderr
    assert "W&B is left alone from here on: No module named 'wandb'; pip install wandb" in done.stdout
    assert "curves.png could not be drawn: No module named 'matplotlib'; pip install matplotlib" in done.stdout
    assert "wandb" not in json.loads((tmp_path / "out" / "summary.json").read_text())["versions"]
    for name in ("pruned.safetensors", "pruned.pt2", "pruned.md"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_a_saved_network_is_tested_on_the_dataset_of_its_run_and_on_another(shipped, tmp_path, capsys):
    out, _ = shipped
    measured = json.loads((out / "summary.json").read_text())["verdict"]["accuracy"]
    done = evaluated(tmp_path, str(out), "threads=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith(f"resnet20 of {out}, ")
    assert done.stdout.splitlines()[0].endswith(" parameters, on digits, cpu, 1 threads")
    assert done.stdout.splitlines()[1] == f"test accuracy {measured:.4f}, 360 images"
    assert main([str(out), "dataset=synthetic", "dataset.image_size=16", "dataset.test_size=50"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert " parameters, on synthetic, " in first
    assert second.endswith(", 50 images")


def test_a_file_of_weights_is_tested_as_the_model_that_is_named(shipped, monkeypatch, capsys):
    out, _ = shipped
    base = json.loads((out / "summary.json").read_text())["base"]
    monkeypatch.chdir(out.parent)
    assert main([base["source"], "model=resnet20", "dataset=digits", "dataset.image_size=16"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == f"test accuracy {base['accuracy']:.4f}, 360 images"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "'nowhere' is neither a folder nor a file"),
        (["."], "'.' is incomplete: pruned.json is missing"),
        (["out", "dataset=mnust"], "Could not find 'dataset/mnust'"),
        (["out", "dataset.depth=3"], "Could not override 'dataset.depth'"),
        (["out", "dataset=cifar10"], "CIFAR-10 in 'data' is not there; dataset.download=true fetches it"),
        (["out", "dataset=synthetic", "dataset.num_classes=20"], "the model must return logits [n, 20], got [2, 10]"),
        (["out", "model=vgg16"], "'model=vgg16' is no setting of a test; there are dataset, device, threads"),
        (["out", "threads=0"], "threads must be 1 or more, or null, got 0"),
        (["out/pruned.safetensors", "model=resnet20"], "dataset=… is needed: the network does not say which"),
        (["out/pruned.safetensors", "dataset=digits"], "model=… is needed: the network does not say which"),
        (["out/run.log", "model=resnet20", "dataset=digits"], "the file 'out/run.log' is "),
    ],
)
def test_bad_input_of_a_test_is_one_clear_line(shipped, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(shipped[0].parent)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def described(folder, **changes):
    """Changes pruned.json; what it says now."""
    says = json.loads((folder / "pruned.json").read_text()) | changes
    (folder / "pruned.json").write_text(json.dumps(says))
    return says


def test_what_a_saved_network_names_is_called_on_the_users_word(shipped, tmp_path, monkeypatch, capsys):
    shutil.copytree(shipped[0], tmp_path / "out")
    (tmp_path / "mine.py").write_text(
        "__import__('pathlib').Path('ran').touch()\n"
        "import csgd.data\n"
        "from csgd.models.resnet import CifarResNet\n"
        "def digits(batch_size, seed, device) -> csgd.data.Data:\n"
        "    return csgd.data.digits(image_size=16, shift=0, batch_size=batch_size, seed=seed, device=device)\n"
        "class Net(CifarResNet):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__(3, num_classes)\n"
        "def other():\n"
        "    return 'no data'\n"
    )

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def said(*arguments, status):
        sys.modules.pop("mine", None)
        assert main(list(arguments)) == status
        printed = capsys.readouterr()
        assert status == 0 or (printed.out == "" and len(printed.err.splitlines()) == 1)
        return printed.out + printed.err

    described(tmp_path / "out", dataset={"_target_": "mine.digits"})
    line = said("out", status=2)
    assert line.startswith(
        "error: dataset._target_ 'mine.digits' is not called: by themselves only makers in csgd.data"
    )
    assert "dataset._target_=mine.digits on the command line calls it, " in line
    assert "(--allow mine)" in line
    assert not (tmp_path / "ran").exists()
    for word in (["--allow", "mine"], ["dataset._target_=mine.digits"]):
        assert "360 images" in said("out", *word, status=0)
    (tmp_path / "ran").unlink()
    described(tmp_path / "out", model={"_target_": "mine.Net"})
    assert "model._target_ 'mine.Net' is not called" in said(
        "out", "dataset=synthetic", "dataset.image_size=16", "dataset.test_size=8", status=2
    )
    assert not (tmp_path / "ran").exists()
    assert said("--allow", "mine", "out", "seed=1", status=0).startswith("Net of out, ")
    described(tmp_path / "out", dataset={"_target_": "mine.other"})
    assert "dataset._target_ must make a csgd.data.Data, got str" in said("out", "--allow", "mine", status=2)


@pytest.mark.parametrize(
    "dataset, message",
    [
        ({"_target_": "csgd.data.Data"}, "dataset._target_ 'csgd.data.Data' is not called"),
        ({"_target_": "csgd.data._in_memory"}, "dataset._target_ 'csgd.data._in_memory' is not called"),
        ({"_target_": "csgd.data.Path"}, "dataset._target_ 'csgd.data.Path' is not called"),
        ({"_target_": "torch.hub.load", "repo_or_dir": ".", "model": "net"}, "'torch.hub.load' is not called"),
        ({"_target_": "csgd.data.digits", "defaults": [{"/model": "vgg16"}]}, "neither 'defaults' nor '${'"),
        ({"_target_": "csgd.data.digits", "shift": "${oc.env:HOME}"}, "neither 'defaults' nor '${'"),
        (
            {"_target_": "csgd.data.digits", "image_size": "x", "shift": 0},
            "fails on the settings of pruned.json: expected",
        ),
        ({"_target_": "csgd.data.digits", "image_size": 10**9, "shift": 0}, "fails on the settings of pruned.json: "),
        (
            {"_target_": "csgd.data.digits", "image_size": 16, "shift": 0, "share": 3},
            "dataset may not hold 'share', which",
        ),
        ({"root": "data"}, "pruned.json is damaged: dataset has no '_target_'"),
        ("csgd.data.digits", "pruned.json is damaged: dataset has no '_target_'"),
    ],
)
def test_a_saved_dataset_is_judged_before_it_is_made(shipped, tmp_path, capsys, dataset, message):
    shutil.copytree(shipped[0], tmp_path / "out")
    described(tmp_path / "out", dataset=dataset)
    assert main([str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert message in line


def test_a_download_is_asked_for_on_the_command_line(shipped, tmp_path, capsys, monkeypatch):
    """A run that downloaded its data does not make its test download them."""
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # where nothing listens
    shutil.copytree(shipped[0], tmp_path / "out")
    root = tmp_path / "data"
    saved = {"_target_": "csgd.data.cifar", "classes": 10, "root": str(root), "download": True}
    described(tmp_path / "out", dataset=saved)
    assert main([str(tmp_path / "out")]) == 2
    assert "is not there; dataset.download=true fetches it" in capsys.readouterr().err
    assert not root.exists()
    assert main([str(tmp_path / "out"), "dataset.download=true"]) == 2
    assert "could not be downloaded" in capsys.readouterr().err
    assert root.exists()


def test_the_data_are_drawn_with_the_seed_of_the_run(shipped, tmp_path, monkeypatch, capsys):
    shutil.copytree(shipped[0], tmp_path / "out")
    assert described(tmp_path / "out")["seed"] == 0
    (tmp_path / "drawn.py").write_text(
        "import csgd.data\n"
        "def digits(batch_size, seed, device):\n"
        "    print('seed', seed)\n"
        "    return csgd.data.digits(image_size=16, shift=0, batch_size=batch_size, seed=seed, device=device)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    described(tmp_path / "out", dataset={"_target_": "drawn.digits"}, seed=7)
    assert main([str(tmp_path / "out"), "--allow", "drawn"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "seed 7"
    assert main([str(tmp_path / "out"), "seed=3", "--allow", "drawn"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "seed 3"


def test_a_test_imports_nothing_that_lies_in_the_folder(shipped, tmp_path):
    """The folder is the current directory, where Python looks first."""
    out = tmp_path / "out"
    shutil.copytree(shipped[0], out)
    for name in ("conf/schema.py", "sklearn/__init__.py", "mine.py"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    described(out, model={"_target_": "mine.Net"})
    done = evaluated(out, ".", "dataset=digits", "dataset.image_size=16")
    assert "model._target_ 'mine.Net' is not called" in done.stderr
    assert not (tmp_path / "ran").exists()
