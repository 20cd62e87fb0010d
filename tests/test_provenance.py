"""What fixes the bits of a result, and what may differ."""

import json
import shutil

import pytest
from test_config import composed
from test_sweep import TINY, UNDRAWN

from csgd import InputError
from csgd.pipeline import run
from csgd.pipeline.leave import finished
from csgd.pipeline.provenance import is_free

JOB = [*TINY[:-1], *UNDRAWN, "quiet=true"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    run(composed(*JOB, f"base.cache={folder}/base"), folder / "out")
    return folder


def same(job, *more):
    return finished(composed(*JOB, f"base.cache={job}/base", *more), job / "out")


def test_a_finished_job_is_the_same_under_keys_that_change_nothing(job):
    free = ["threads=1", "base.cache=elsewhere", "wandb.tags=[mine]", "quiet=false", "checkpoint_every=3"]
    assert same(job, *free) == same(job)


@pytest.mark.parametrize("other", ["seed=1", "export=onnx", "distributed.nproc=2", "base.weights=mine.pt"])
def test_a_finished_job_of_other_keys_is_refused(job, other):
    key, _, value = other.partition("=")
    with pytest.raises(InputError, match=rf"holds another configuration or version: {key}: .* then, .*{value}.* now"):
        same(job, other)


@pytest.mark.parametrize("package", ["torch", "csgd"])
def test_a_finished_job_of_other_code_is_refused(job, tmp_path, package):
    shutil.copytree(job / "out", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    summary["versions"][package] = "0.0"
    (tmp_path / "out" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(InputError, match=rf"versions.{package}: '0.0' then, "):
        finished(composed(*JOB, f"base.cache={job}/base"), tmp_path / "out")


def test_a_key_is_free_by_its_whole_name():
    assert is_free("wandb.mode")
    assert is_free("threads")
    assert not is_free("threads_of_mine")
    assert not is_free("dataset.downloaded_to")
