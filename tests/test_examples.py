"""Other people's loops: the examples, and the package without the libraries of the experiments."""

import json
import os
import re
import runpy
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest

import evaluate

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "experiments" / "examples"

# Loops of other packages: what a test of one needs installed, how long it is, and at which step it is cut.
LOOPS = {
    "lightning_loop": (["lightning"], 60, 60),
    "hugging_face_trainer": (["transformers", "accelerate"], 60, 60),
    "accelerate_loop": (["accelerate"], 4, 112),
    "timm_train": (["timm"], 60, 30),
}


def run_main(name, *arguments):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*arguments)


def lines(path):
    """Its lines without the marks round what the documentation quotes, and the quoted ones."""
    every = [line.strip() for line in path.read_text().splitlines()]
    start, end = (every.index(mark) if mark in every else 0 for mark in ("# [start]", "# [end]"))
    return [line for line in every if line not in ("# [start]", "# [end]")], every[start + 1 : end]


def test_an_example_fits_a_screen():
    lengths = {path.stem: len(lines(path)[0]) for path in EXAMPLES.glob("*.py")}
    assert len(lengths) == 12
    assert max(length for name, length in lengths.items() if name not in LOOPS) < 60, lengths
    assert max(lengths.values()) < 85, lengths


def test_what_the_documentation_quotes_fits_a_screen():
    lengths = {path.stem: len(quoted) for path in EXAMPLES.glob("*.py") if (quoted := lines(path)[1])}
    assert set(lengths) == {*LOOPS, "plain_loop", "any_optimizer", "data_parallel"}
    assert max(lengths.values()) < 40, lengths


@pytest.mark.parametrize(
    "name, length",
    [
        ("plain_loop", 6),
        ("accumulate_and_clip", 120),
        ("torch_schedule", 150),
        ("hidden_widths", 120),
        ("any_optimizer", 60),
    ],
)
def test_an_example_is_lossless(name, length):
    changes = run_main(name, length)
    for change in changes if isinstance(changes, list) else [changes]:
        assert 0 <= change < 1e-5


def test_the_forecast_of_an_example_is_what_it_measures(capsys):
    run_main("torch_schedule", 100)
    line = next(line for line in capsys.readouterr().out.splitlines() if "by the forecast" in line)
    left, expected = line.split()[2], line.split()[-4]
    assert float(left) == pytest.approx(float(expected), rel=1e-2)
    assert 0 < float(expected) < 0.5


@pytest.fixture(scope="module")
def denoised(tmp_path_factory):
    folder = tmp_path_factory.mktemp("denoised")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.chdir(folder)
        yield run_main("denoising", "out"), folder / "out"


def test_another_task_than_classification_is_pruned_by_a_run(denoised):
    verdict, out = denoised
    assert verdict.lossless
    assert verdict.relative_logit_change < 1e-5
    assert verdict.accuracy > 14, "decibels; the noisy images have 10.4"
    assert verdict.accuracy_after_trim == pytest.approx(verdict.accuracy_before_trim, abs=1e-3)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["task"] == {"criterion": "mse_loss", "score": "psnr"}
    assert summary["base"]["accuracy"] > 14
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["csgd/test_psnr"] == verdict.accuracy
    assert not any("accuracy" in key for row in rows for key in row)
    for name in ("pruned.md", "report.html"):
        told = (out / name).read_text()
        assert "test psnr, base network" in told, name
        assert "accuracy" not in told.lower(), name
    assert (out / "report" / "curves.png").exists()


def test_another_task_is_planned_and_tested_again(denoised, tmp_path, capsys):
    verdict, out = denoised
    assert run_main("denoising", str(tmp_path), "plan_only=true") is None
    assert json.loads((tmp_path / "plan.json").read_text())["estimate"]["seconds_per_step"] > 0
    assert evaluate.main([str(out), "--allow", "denoising"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"test psnr {verdict.accuracy:.4f}, 397 images"


def test_ranks_of_ones_own():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "data_parallel.py"), "100"], capture_output=True, text=True, check=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = sorted(re.findall(r"rank \d: .*?(?=rank \d: |\n)", done.stdout))  # two ranks may share a line
    assert [line.split(":")[0] for line in lines] == ["rank 0", "rank 1"]
    assert lines[0].split(": ")[1] == lines[1].split(": ")[1], "the same network on both"
    assert float(lines[0].split("changed by ")[1].split(",")[0]) < 1e-5


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning", "ignore:.*`weights_only`:UserWarning")
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_of_another_package(name, monkeypatch, capsys):
    """Three of them are interrupted and resume, so that they are cut at the step that was named before."""
    packages, length, step = LOOPS[name]
    for package in packages:
        pytest.importorskip(package)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert 0 <= run_main(name, length) < 1e-5
    assert f", cut at step {step}: logits changed by" in capsys.readouterr().out


def test_a_network_of_timm():
    pytest.importorskip("timm")
    assert 0 <= run_main("timm_network", "test_resnet", 80) < 1e-4


def test_the_library_needs_none_of_the_experiments_libraries():
    """The main idea end to end, with everything that run.py needs out of reach."""
    blocked = ("hydra", "omegaconf", "wandb", "matplotlib", "torchvision", "tqdm", "yaml", "jinja2", "timm")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked}))
import torch, csgd
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
spaces = csgd.find_spaces(model, torch.randn(2, 4))
clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 1 / 2))
optimizer = csgd.CSGD(csgd.param_groups(model, spaces, clusters, centri_strength=1.0), lr=0.01)
csgd.merge_equal(model, spaces, clusters)
csgd.trim(model, spaces, clusters, optimizer)
print(model[0].out_features)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "4\n", done.stderr


def test_what_pip_installs(tmp_path):
    """The package alone, with the four libraries that it needs; the others are extras."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    copy = tmp_path / "source"  # pip builds in the tree that it is given
    copy.mkdir()
    for name in ("csgd", "pyproject.toml", "README.md", "LICENSE"):
        (copy / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [*command, "--target", str(tmp_path / "site"), str(copy)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (metadata,) = (tmp_path / "site").glob("csgd-*.dist-info")
    installed = Distribution.at(metadata)
    needed = {line.split(">")[0] for line in installed.requires if "extra ==" not in line}
    assert needed == {"torch", "scikit-learn", "numpy", "safetensors", "filelock", "threadpoolctl"}
    assert set(installed.metadata.get_all("Provides-Extra")) == {"experiments", "sweeps", "examples", "export", "docs"}
    assert {path.parts[0] for path in installed.files} == {"csgd", metadata.name}
    assert {"csgd/card.md.j2", "csgd/report/page.html.j2"} <= {path.as_posix() for path in installed.files}
