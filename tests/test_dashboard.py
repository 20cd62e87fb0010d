"""The dashboard of W&B: it is built offline, and shows nothing that no run logs."""

import json
import warnings
from functools import reduce

import pytest
from commandline import ROOT, start

pytest.importorskip("wandb_workspaces")

SHORT = "schedule.base.max_steps=10", "schedule.csgd.max_steps=10", "dataset.image_size=16"


@pytest.fixture(scope="module")
def dashboard():
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the package's own
        patch.syspath_prepend(ROOT / "experiments" / "wandb")
        import dashboard

        yield dashboard


def as_saved(workspace):
    """The view as W&B gets it; the two calls are private to its package."""
    return workspace._to_model()


def as_read(view):
    from wandb_workspaces.workspaces import Workspace

    return Workspace._from_model(view)


def named(value, *keys):
    """The values of these keys, at any depth, lists flat."""
    if isinstance(value, list):
        return [name for item in value for name in named(item, *keys)]
    if not isinstance(value, dict):
        return []
    found = [one for key in keys if (one := value.get(key))]
    return [name for one in found for name in (one if isinstance(one, list) else [one])] + [
        name for item in value.values() for name in named(item, *keys)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of two real runs: under a Collapse, and as published."""
    folders = []
    for pull in ("centri_strength=null", "centri_strength=1"):
        folders.append(tmp_path_factory.mktemp("run"))
        arguments = ["experiment=smoke", pull, "wandb=offline", *SHORT, "hydra.run.dir=."]
        process = start(folders[-1], *arguments, out=folders[-1] / "log.txt")
        process.join()
        told = (folders[-1] / "log.txt").read_text()
        assert process.exitcode in (0, 1), told  # 1: the cut of a run so short need not be lossless
    return folders


def logged(folder):
    """The names that W&B has of a run, and its configuration."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    keys = {key for row in rows for key in row} | {f"report/{path.stem}" for path in folder.glob("report/*.png")}
    keys |= {f"{part}/{key}" for part in ("verdict", "cost") for key in summary[part]}
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    return {key for key in keys if key.encode() in content}, summary["config"]


def test_every_metric_of_the_dashboard_is_logged_by_a_run(dashboard, runs):
    view = json.loads(as_saved(dashboard.dashboard("me", group="mine")).model_dump_json(by_alias=True))
    panels = view["spec"]["section"]["panelBankConfig"]["sections"]
    axes = named(panels, "metrics", "mediaKeys", "accessor", "yAxis", "zAxis") + named(
        [panel["config"] for section in panels for panel in section["panels"]], "xAxis"
    )
    (shown,) = view["spec"]["section"]["runSets"]
    axes += [column for column in shown["runFeed"]["columnOrder"] if column != "run:displayName"]
    axes += [f"config:{key['name']}" for key in shown["grouping"]]
    metrics = {axis.removeprefix("summary:") for axis in axes if not axis.startswith("config:")}
    (collapse, config), (published, _) = map(logged, runs)
    assert metrics <= collapse | published
    assert {"left/filters", "csgd/deviation", "csgd/test_accuracy", "report/curves", "verdict/lossless"} <= metrics
    for axis in axes:
        if axis.startswith("config:"):
            path = axis.removeprefix("config:").replace(".value", "", 1).split(".")
            reduce(dict.__getitem__, path, config)
    assert shown["filters"]["filters"][0]["value"] == "mine"


def test_the_dashboard_is_read_back_as_it_was_saved(dashboard):
    view = as_saved(dashboard.dashboard("me", "csgd", score="psnr"))
    again = as_saved(as_read(view))
    assert again.model_dump_json(by_alias=True) == view.model_dump_json(by_alias=True)
    assert "csgd/test_psnr" in view.model_dump_json()


def test_without_a_key_there_is_one_line(dashboard, monkeypatch, capsys, tmp_path):
    for name, value in {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_API_KEY": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["dashboard.py", "me"])
    with pytest.raises(SystemExit) as left:
        dashboard.main()
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: No API key configured.")
