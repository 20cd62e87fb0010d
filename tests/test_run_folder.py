"""The folder of a run: how far it came, and what an older run left."""

import json
from dataclasses import asdict, replace

import pytest
from test_config import composed
from test_sweep import TINY, UNDRAWN

from csgd import InputError, load_pruned
from csgd.folder import RunFolder, Status
from csgd.pipeline import run, stage
from csgd.report.tables import verdict_rows
from csgd.verify import Verdict, worst
from evaluate import evaluate


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def test_the_status_is_told_by_what_is_there(folder):
    assert folder.status() is Status.KILLED
    folder.plan.write_text("{}")
    assert folder.status() is Status.PLANNED
    with folder.reserved():
        assert folder.status() is Status.RUNNING
    folder.summary.write_text('{"seed": 3}')
    assert folder.status() is Status.FINISHED
    assert folder.read_summary() == {"seed": 3}
    folder.failure.write_text("the learning rate diverges")
    assert folder.status() is Status.FAILED


def test_a_second_process_is_kept_out(folder):
    with folder.reserved():
        assert folder.is_in_use()
        with pytest.raises(InputError, match="is in use by a run that is still alive"), folder.reserved():
            pass
    assert not folder.is_in_use()
    with folder.reserved():
        pass


def test_what_an_older_run_came_to_is_cleared_and_its_weights_are_not(folder):
    folder.checkpoint.parent.mkdir()
    folder.report.mkdir()
    (folder.report / "in_the_way.png").mkdir()
    gone = [folder.summary, folder.failure, folder.card, folder.report / "curves.png", folder.path / "report.html"]
    kept = [folder.checkpoint, folder.metrics, folder.plan, folder.path / "run.log", folder.path / "pruned.safetensors"]
    for path in gone + kept:
        path.write_text("{}")
    folder.clear()
    assert [path for path in gone if path.exists()] == []
    assert [path for path in kept if not path.exists()] == []
    folder.clear()


def test_an_export_of_older_weights_does_not_stay_beside_new_ones(tmp_path):
    config = [*TINY[:-1], *UNDRAWN, "quiet=true", f"base.cache={tmp_path}/base"]
    exports = [tmp_path / "out" / name for name in ("pruned.onnx", "pruned.onnx.data", "pruned.pt2")]
    run(composed(*config), tmp_path / "out")
    for path in exports:
        path.write_text("of these weights")
    run(composed(*config), tmp_path / "out")
    assert all(path.exists() for path in exports), "the same weights"
    run(composed(*config, "seed=1"), tmp_path / "out")
    assert not any(path.exists() for path in exports)


def test_a_run_in_the_place_of_another_says_so_and_one_of_stages_which_cut_it_tells_of(tmp_path, caplog):
    job = [*TINY[:-1], *UNDRAWN, f"base.cache={tmp_path}/base", "deps.stages=[0.75,0.5]"]
    run(composed(*job), tmp_path / "out")
    assert "holds an earlier run" not in caplog.text
    run(composed(*job), tmp_path / "out")
    assert f"'{tmp_path}/out' holds an earlier run, whose place this one takes; resume=auto would go on" in caplog.text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    rows = {what: word for what, _, word in verdict_rows(summary)}
    assert rows["… before the last cut"] == f"step {summary['cut']['step']} of stage 2"
    assert "… after the last cut" in rows


def test_the_network_between_two_stages_is_kept_as_a_folder_that_loads(tmp_path, monkeypatch):
    verdicts, verdict = [], stage.verdict

    def first_not_lossless(*outputs, **how):
        verdicts.append(verdict(*outputs, **how))
        return replace(verdicts[-1], lossless=len(verdicts) > 1)

    monkeypatch.setattr(stage, "verdict", first_not_lossless)
    job = [*TINY[:-1], *UNDRAWN, f"base.cache={tmp_path}/base"]
    run(composed(*job, "deps.stages=[0.9,0.75,0.5]", "schedule.csgd.epochs=2"), tmp_path / "out")
    stages = json.loads((tmp_path / "out" / "summary.json").read_text())["stages"]
    assert sorted(path.name for path in tmp_path.glob("out/pruned_*")) == ["pruned_1", "pruned_2"]
    for number, kept in enumerate(stages[:-1], 1):
        folder = tmp_path / "out" / f"pruned_{number}"
        for name, module in load_pruned(folder, allow=["nets"]).named_modules():
            assert kept["widths"].get(name) in (None, len(getattr(module, "weight", ()))), name
        assert f"test accuracy {kept['verdict']['accuracy']:.4f}" in evaluate(folder, [], ["nets"])
        told = json.loads((folder / "pruned.json").read_text())
        so_far = worst([Verdict(**one["verdict"]) for one in stages[:number]])
        assert not so_far.lossless
        assert told["verdict"] == asdict(so_far), "of all cuts up to it, as the network that loads went through all"
        assert told["cost"]["params_after"] == sum(p.numel() for p in load_pruned(folder, allow=["nets"]).parameters())
    assert stages[0]["widths"] != stages[1]["widths"]
    (tmp_path / "out" / "pruned_2" / "mine.txt").write_text("")
    run(composed(*job), tmp_path / "out")
    left = [path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.glob("out/pruned_*/**/*")]
    assert left == ["pruned_2/mine.txt"], "the networks of an older run are gone"
    assert not (tmp_path / "out" / "pruned_1").exists()


@pytest.mark.parametrize("anew", [True, False])
def test_what_pictures_are_drawn_from_goes_with_an_older_run_and_stays_for_one_that_goes_on(folder, anew):
    """A rival keeps no filters, and drew those of the run before it."""
    kept = (folder.filters, folder.film, folder.outputs, folder.sensitivity)
    for path in (*kept, folder.summary):
        path.write_bytes(b"{}")
    folder.clear(anew)
    assert [path.exists() for path in kept] == [not anew] * 4
    assert not folder.summary.exists()
