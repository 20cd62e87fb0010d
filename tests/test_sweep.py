"""Sweeps from the command line, in processes of their own, and what is read back from their folders."""

import csv
import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from shutil import which

import commandline
import pytest
import yaml
from filelock import FileLock
from joblib import cpu_count
from matplotlib.figure import Figure
from test_config import composed

from csgd import sweep

ROOT = Path(__file__).parents[1]
TINY = [
    "model._target_=nets.Plain", "dataset=synthetic", "dataset.num_classes=5", "dataset.image_size=8",
    "dataset.train_size=64", "dataset.test_size=32",
    "schedule=smoke", "schedule.base.max_steps=2", "schedule.csgd.max_steps=4", "hydra.sweep.dir=sweep",
]  # fmt: skip

UNDRAWN = ["wandb=disabled", "report=false"]
NETS = str(Path(__file__).parent)


def launch(folder, *arguments, run=commandline.run, **more):
    return run(folder, *arguments, **{"PYTHONPATH": NETS, **more})


SWEPT = ["-m", *TINY, "deps=5_8", "seed=0,1", "centri_strength=12,1e5"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two seeds that come to their end, and two jobs whose strength is refused."""
    folder = tmp_path_factory.mktemp("swept")
    return folder, launch(folder, *SWEPT, status=2)


def test_a_sweep_tells_what_came_out(swept):
    folder, done = swept
    assert "| job | seed | centri_strength | cut " in done.stdout
    assert "job 1 failed: centri_strength 100000 diverges at learning rate" in done.stdout
    with (folder / "sweep" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["job"], row["seed"], row["centri_strength"], row["status"]) for row in rows] == [
        ("0", "0", "12", "not lossless"),
        ("1", "0", "100000.0", "failed"),
        ("2", "1", "12", "not lossless"),
        ("3", "1", "100000.0", "failed"),
    ]
    summary = json.loads((folder / "sweep" / "2" / "summary.json").read_text())
    assert float(rows[2]["accuracy"]) == summary["verdict"]["accuracy"]
    assert int(rows[2]["macs_after"]) == summary["cost"]["macs_after"]
    assert "Traceback" not in done.stderr
    text = (folder / "sweep" / "sweep.md").read_text()
    assert sweep.jobs_table(sweep.read_jobs(folder / "sweep"), linked=True) in text
    assert "[0](0/report.html)" in text
    note = "The base network had 1 epoch of training, and C-SGD trained it for 8 steps more."
    assert text.count(note) == done.stdout.count(note) == 1
    assert "[1](1/)" in text, "it left no report"
    assert all((folder / "sweep" / target).exists() for target in re.findall(r"\]\(([^)]*)\)", text))
    for name in ("accuracy_macs", "deviation"):
        assert f"({name}.png)" in text
        assert (folder / "sweep" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert not (folder / "sweep" / "accuracy_strength.png").exists(), "one strength came to its end"


def test_the_same_command_runs_only_what_is_missing(swept):
    folder, _ = swept
    kept = {n: (folder / "sweep" / n / "summary.json").stat().st_mtime_ns for n in ("0", "2")}
    done = launch(folder, *SWEPT, status=2)
    assert done.stdout.count("finished before") == 2
    assert done.stderr.count("error: centri_strength 100000 diverges") == 2
    assert "csgd epoch" not in done.stdout
    assert kept == {n: (folder / "sweep" / n / "summary.json").stat().st_mtime_ns for n in kept}
    assert "| not lossless |" in done.stdout


def test_the_folder_of_another_sweep_is_refused_before_it_is_touched(swept):
    folder, _ = swept
    before = {path: path.stat().st_mtime_ns for path in (folder / "sweep").rglob("*")}
    done = launch(folder, *SWEPT, "schedule.csgd.lr=0.04", "clustering=even", "wandb=disabled", status=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: hydra.sweep.dir: 'sweep/0' holds another configuration or version: ")
    assert "clustering.method: 'kmeans' then, 'even' now; schedule.csgd.lr: 0.05 then, 0.04 now" in line
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "sweep").rglob("*")}


def test_wandb_sync_takes_every_offline_run_of_a_sweep(swept):
    folder, done = swept
    assert "wandb sync sweep/*/wandb/offline-run-*" in done.stdout
    taken = subprocess.run(
        f"{Path(sys.executable).parent / 'wandb'} sync --dry-run sweep/*/wandb/offline-run-*",
        shell=True, cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Would sync 2 run(s)" in taken.stdout + taken.stderr


def test_a_sweep_over_the_ways_has_its_pictures(tmp_path):
    tiny = [*TINY, "schedule.csgd.epochs=2", "wandb=disabled", "threads=1"]
    done = launch(tmp_path, "-m", *tiny, "method=csgd,merge,prune,scratch")
    assert "could not be drawn" not in done.stdout + done.stderr
    jobs = sweep.read_jobs(tmp_path / "sweep")
    text = (tmp_path / "sweep" / "sweep.md").read_text()
    assert all(f"({name}.png)" in text for name in ("accuracy_macs", "deviation"))
    ((label, _),) = sweep._bases(jobs)
    assert label == "base", "a network that was not trained is no base to compare with"


def test_a_job_that_breaks_leaves_its_trace_and_the_others_go_on(tmp_path):
    (tmp_path / "broken.py").write_text(
        "import nets\n\nclass Net(nets.Plain):\n    def forward(self, x):\n"
        "        return super().forward(x) if not self.training else self.missing\n"
    )
    path = os.pathsep.join([NETS, str(tmp_path)])
    arguments = ["model._target_=broken.Net,nets.Plain", *TINY[1:], *UNDRAWN]
    done = launch(tmp_path, "-m", *arguments, status=2, PYTHONPATH=path)
    assert [job.status for job in sweep.read_jobs(tmp_path / "sweep")] == ["failed", "lossless"]
    told = "the network cannot run on its example: AttributeError: 'Net' object has no attribute 'missing'"
    assert (tmp_path / "sweep" / "0" / "failed.txt").read_text() == f"{told}\n"
    log = (tmp_path / "sweep" / "0" / "run.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert 'broken.py", line 5' in log
    assert f"job 0 failed: {told}" in done.stdout


def test_a_killed_sweep_goes_on_where_it_was(tmp_path):
    arguments = [
        "-m", *TINY, "schedule.csgd.epochs=6", "schedule.csgd.max_steps=60", "dataset.train_size=480", "deps=5_8,1_2",
        "schedule.csgd.lr=0.01", "resume=auto", "checkpoint_every=5", "report=false",
    ]  # fmt: skip
    process = commandline.start(tmp_path, *arguments, out=Path(os.devnull), PYTHONPATH=NETS)
    rows = tmp_path / "sweep" / "1" / "metrics.jsonl"
    while not rows.exists() or rows.read_text().count("\n") < 3:
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    assert [job.status == "killed" for job in sweep.read_jobs(tmp_path / "sweep")] == [False, True]
    done = launch(tmp_path, *arguments)
    assert done.stdout.count("finished before") == 1
    assert "resumed from sweep/1/checkpoints/last.pt" in done.stdout.replace(f"{tmp_path}/", "")
    assert [job.status == "killed" for job in sweep.read_jobs(tmp_path / "sweep")] == [False, False]
    for job in ("0", "1"):
        (offline,) = (tmp_path / "sweep" / job).glob("wandb/offline-run-*/run-*.wandb")
        rows = [json.loads(line) for line in (tmp_path / "sweep" / job / "metrics.jsonl").read_text().splitlines()]
        assert logged_steps(offline) == [(row["phase"], row["step"]) for row in rows], "one run a job, whole"


def logged_steps(path):
    """Phase and step of each row that a W&B run holds, in its own format: LevelDB's log of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, data, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if (left := -at % 2**15) < 7:
            at += left  # no header is split between blocks
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        data, at = data + content[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            items = Record.FromString(data).history.item
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            if "phase" in row:
                rows.append((row["phase"], row["step"]))
            data = b""
    return rows


SLURM = bool(which("scontrol")) and subprocess.run(["scontrol", "ping"], capture_output=True).returncode == 0
ON_SLURM = pytest.param("submitit_slurm", cpu_count(), marks=pytest.mark.skipif(not SLURM, reason="no Slurm"))


@pytest.mark.parametrize("launcher, beside", [("joblib", 2), ("submitit_local", 3), ON_SLURM])
def test_jobs_side_by_side_share_one_base_and_the_cores(tmp_path, launcher, beside):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    arguments = ["-m", *TINY, "centri_strength=12,11,1e5", *UNDRAWN, f"hydra/launcher={launcher}"]
    own = {"joblib": ["hydra.launcher.n_jobs=2"], "submitit_slurm": ["hydra.launcher.cpus_per_task=1"]}
    arguments += own.get(launcher, [])
    done = launch(tmp_path, *arguments, run=commandline.run_fresh, status=2, OMP_NUM_THREADS=None)
    jobs = sweep.read_jobs(tmp_path / "sweep")
    assert [job.status for job in jobs] == ["not lossless", "not lossless", "failed"]
    assert {job.summary["device"] for job in jobs[:2]} == {f"cpu, {max(1, cpu_count() // beside)} threads"}
    logs = [(job.folder / "run.log").read_text() for job in jobs[:2]]
    assert sum("base network: from the cache" in log for log in logs) == 1
    assert sum("base epoch 1" in log for log in logs) == 1
    assert "| centri_strength | cut " in done.stdout
    assert (tmp_path / "sweep" / "accuracy_strength.png").exists()


@pytest.mark.parametrize(
    "launcher, message",
    [
        ("joblub", "Could not find 'hydra/launcher/joblub'"),
        ("joblub", "pip install '.[sweeps]'"),
        ("submitit_slurm", "hydra/launcher=submitit_slurm: there is no srun here"),
    ],
)
def test_a_launcher_that_cannot_be_used_is_one_clear_line(tmp_path, launcher, message):
    if launcher == "submitit_slurm":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    done = launch(tmp_path, "-m", *TINY, f"hydra/launcher={launcher}", status=2, PATH=str(Path(sys.executable).parent))
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.skipif(not which("sbatch"), reason="no Slurm")
def test_what_slurm_refuses_is_one_clear_line(tmp_path):
    done = launch(tmp_path, "-m", *TINY, "hydra/launcher=submitit_slurm", "hydra.launcher.partition=nowhere", status=2)
    assert done.stderr.splitlines()[-1].startswith("error: sbatch: error: ")
    assert "Traceback" not in done.stderr


def test_wandb_online_without_a_key_is_said_before_training(tmp_path):
    environment = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "netrc")}
    done = launch(tmp_path, *TINY, "hydra.run.dir=out", "wandb=online", status=2, **environment)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: wandb=online: No API key configured. Use `wandb login`")
    assert line.endswith("wandb=offline needs no account")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    assert not (tmp_path / "outputs").exists(), "no base network was trained"


def written(folder, number, *, seed, deps, accuracy, macs, lossless=True, strength=1.0):
    """The files of a job, as a run leaves them."""
    path = folder / str(number)
    (path / ".hydra").mkdir(parents=True)
    overrides = ["model=resnet20", f"deps='{deps}'", f"centri_strength={strength}", f"seed={seed}"]
    (path / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    summary = {
        "base": {"accuracy": 0.9 + seed / 50, "source": f"base-s{seed}"},
        "verdict": {
            "lossless": lossless, "accuracy": accuracy, "relative_logit_change": 1e-6, "relative_deviation": 1e-7,
        },
        "cost": {"macs_before": 4_000_000, "macs_after": macs},
        "strengths": {"kernels": strength, "vectors": strength / 10},
        "cut": {"step": 5},
        "seconds": {"total": 3.0},
        "way": {"pulls": True, "trained": True},
        "stages": [{"forecast": {"steps": 8, "curves": {"kernels": [[1, 1.0], [8, 1e-6]]}}}],
        "config": {"base": {"weights": None}, "schedule": {"base": {"epochs": 1}, "csgd": {"epochs": 2}}},
    }  # fmt: skip
    (path / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def jobs(tmp_path):
    written(tmp_path, 10, seed=1, deps="1_2", accuracy=0.5, macs=1_000_000, lossless=False)
    written(tmp_path, 9, seed=0, deps="1_2", accuracy=0.7, macs=1_000_000)
    written(tmp_path, 2, seed=1, deps="5_8", accuracy=0.8, macs=2_000_000)
    written(tmp_path, 1, seed=0, deps="5_8", accuracy=0.9, macs=2_000_000)
    return sweep.read_jobs(tmp_path)


def test_jobs_are_in_order_and_told_apart_by_what_was_swept(jobs):
    assert [job.folder.name for job in jobs] == ["1", "2", "9", "10"]
    assert [job.settings for job in jobs] == [
        {"deps": deps, "seed": seed} for deps in ("5_8", "1_2") for seed in ("0", "1")
    ]


def test_a_job_that_is_alive_is_not_called_killed(tmp_path):
    written(tmp_path, 0, seed=0, deps="1_2", accuracy=0.5, macs=1)
    (tmp_path / "0" / "summary.json").unlink()
    with FileLock(tmp_path / "0" / ".lock"):
        assert [job.status for job in sweep.read_jobs(tmp_path)] == ["running"]
    assert [job.status for job in sweep.read_jobs(tmp_path)] == ["killed"]


def test_a_job_that_was_planned_is_not_called_killed(tmp_path):
    written(tmp_path, 0, seed=0, deps="1_2", accuracy=0.5, macs=1)
    (tmp_path / "0" / "summary.json").rename(tmp_path / "0" / "plan.json")
    assert [job.status for job in sweep.read_jobs(tmp_path)] == ["planned"]


def test_the_tables_of_a_sweep_that_was_killed_are_made_from_its_folder(jobs, tmp_path, capsys):
    (tmp_path / "9" / "summary.json").unlink()
    for folder in tmp_path.glob("*/"):
        (folder / "metrics.jsonl").write_text("")
        if (folder / "summary.json").exists():
            summary = json.loads((folder / "summary.json").read_text())
            summary |= {"device": "cpu", "commit": None}
            (folder / "summary.json").write_text(json.dumps(summary))
    assert sweep.main([str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert "job 9 killed: it was killed" in said
    assert said.splitlines()[-1].endswith(f"with the same command and hydra.sweep.dir={tmp_path}")
    assert "job 9 killed" in (tmp_path / "sweep.md").read_text()
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 5
    assert sweep.main([str(tmp_path / "9")]) == 2
    assert "holds no job of a sweep" in capsys.readouterr().err


def test_means_over_seeds(jobs):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in sweep.means_table(jobs).splitlines()[2:]]
    assert rows == [
        ["deps=5_8", "0.9100 ± 0.0141", "0.8500 ± 0.0707", "2", "2"],
        ["deps=1_2", "0.9100 ± 0.0141", "0.6000 ± 0.1414", "2", "1"],
    ]


def test_the_picture_shows_means_spread_and_base(jobs):
    axes = Figure().subplots()
    sweep._accuracy_macs(axes, jobs)
    (line,) = [container for container in axes.containers if container.get_label() == "csgd"]
    data, _, (bars,) = line.lines
    assert data.get_xydata().ravel().tolist() == pytest.approx([1, 0.6, 2, 0.85])
    spreads = [(segment[1, 1] - segment[0, 1]) / 2 for segment in bars.get_segments()]
    assert spreads == pytest.approx([0.1414, 0.0707], abs=1e-4)
    (base,) = [one for one in axes.get_lines() if one.get_label() == "base"]
    assert base.get_ydata()[0] == pytest.approx(0.91)
    (dense,) = [one for one in axes.collections if one.get_label() == "base, not cut"]
    macs = jobs[0].summary["cost"]["macs_before"] / 1e6
    assert dense.get_offsets().tolist() == [[macs, pytest.approx(0.91)]]
    hollow = [one.get_facecolors() for one in axes.collections if len(one.get_offsets()) == 2][-1]
    assert hollow[0, :3].tolist() == [1, 1, 1], "one of its seeds is not lossless"
    assert hollow[1, :3].tolist() != [1, 1, 1]


def test_the_picture_of_strengths_is_of_those_of_the_kernels(tmp_path):
    """Also beside a job that was pulled along a curve, and where vectors are pulled more."""
    for number, strength in enumerate((1.0, 2.0, None)):
        written(tmp_path, number, seed=0, deps="5_8", accuracy=0.9, macs=1_000_000, strength=strength or 0.0)
        path = tmp_path / str(number) / "summary.json"
        summary = json.loads(path.read_text())
        summary |= {"strengths": {"kernels": strength, "vectors": 10 * strength} if strength else {}, "stages": []}
        path.write_text(json.dumps(summary))
        (path.parent / "metrics.jsonl").touch()
    jobs = sweep.read_jobs(tmp_path)
    assert [path.name for path in sweep.draw(tmp_path, jobs)][-1] == "accuracy_strength.png"
    axes = Figure().subplots()
    sweep._accuracy_strength(axes, jobs[:2])
    assert axes.get_xticks().tolist() == [1.0, 2.0]


def test_a_sweep_whose_tables_could_not_be_made_is_refused(tmp_path):
    for subdir in ("null", "mine"):
        done = launch(tmp_path, "-m", *TINY, "seed=0,1", f"hydra.output_subdir={subdir}", status=2)
        assert done.stderr.startswith("error: hydra.output_subdir must be .hydra in a sweep, got ")
    assert not (tmp_path / "sweep" / "0").exists()


SWEEP_FILES = sorted((ROOT / "experiments" / "wandb").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEP_FILES, ids=lambda path: path.stem)
def test_the_arguments_of_a_wandb_sweep_compose(path):
    """Each value of each parameter, by the builder that `wandb agent` uses."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    config = yaml.safe_load(path.read_text())
    assert config["method"] in ("grid", "bayes")
    assert config["metric"] == {"name": "verdict/accuracy", "goal": "maximize"}
    values = {
        key: one.get("values") or ([one["value"]] if "value" in one else [one["min"], one["max"]])
        for key, one in config["parameters"].items()
    }
    for turn in range(max(map(len, values.values()))):
        job = {key: {"value": of[turn % len(of)]} for key, of in values.items()}
        variables = {**create_sweep_command_args({"args": job}), "env": [], "interpreter": [], "program": []}
        arguments = [
            argument
            for chunk in create_sweep_command(list(config["command"]))
            for argument in (variables[chunk[2:-1]] if chunk.startswith("${") else [chunk])
        ]
        cfg = composed(*arguments)
        assert cfg.wandb.mode == "online"
        assert cfg.centri_strength == job["centri_strength"]["value"]
        above, below = map(int, job["deps"]["value"].split("_"))
        assert cfg.deps.fraction == above / below
    assert [path.stem for path in SWEEP_FILES] == ["bayes", "grid"]
