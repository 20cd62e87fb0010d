"""The folder of a run: how far it came, and what an older run left."""

import pytest

from csgd import InputError
from csgd.folder import RunFolder, Status


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
