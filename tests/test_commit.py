"""The commit of a result: never another repository's, never without its changes, and never a reason to lose a run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_sweep import TINY, UNDRAWN, launch

from csgd.pipeline import provenance
from csgd.pipeline.provenance import commit


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A repository with a package in it."""
    package = tmp_path / "checkout" / "csgd"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(package.parent, "init", "-q")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-q", "-m", "one")
    return package.parent


def test_changes_of_tracked_files_are_told(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert commit(checkout / "csgd") == head
    (checkout / "notes.txt").write_text("not tracked")
    assert commit(checkout / "csgd") == head
    (checkout / "csgd" / "__init__.py").write_text("changed = True")
    assert commit(checkout / "csgd") == f"{head}-dirty"


def test_a_repository_of_the_user_is_not_told(checkout, monkeypatch):
    installed = checkout / ".venv" / "lib" / "site-packages" / "csgd"
    beside = checkout.parent / "plain" / "csgd"
    for package in (installed, beside):
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        assert commit(package) is None
    git(beside.parent, "init", "-q")
    git(beside.parent, "commit", "-q", "--allow-empty", "-m", "one")
    assert commit(beside) is None, "it lies there and is not tracked"
    head = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(beside.parent / ".git"))
    assert commit(checkout / "csgd") == head, "whatever the environment says"


def test_a_git_that_is_broken_refuses_or_hangs_costs_nothing(checkout, monkeypatch):
    (checkout / ".git" / "HEAD").write_text("ref: refs/heads/nowhere")
    assert commit(checkout / "csgd") is None
    (checkout / ".git" / "HEAD").write_text("nonsense")
    assert commit(checkout / "csgd") is None
    monkeypatch.setattr(provenance, "GIT_SECONDS", 0.3)
    fake = checkout.parent / "bin" / "git"
    fake.parent.mkdir()
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    for script in ("sleep 20", "echo 'fatal: detected dubious ownership' >&2; exit 128", "printf '\\377\\n'", "true"):
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
        started = time.monotonic()
        assert commit(checkout / "csgd") is None
        assert time.monotonic() - started < 10
    monkeypatch.setenv("PATH", str(checkout))
    assert commit(checkout / "csgd") is None


def test_a_run_without_git_comes_to_its_end(tmp_path):
    launch(tmp_path, *TINY[:-1], "hydra.run.dir=out", *UNDRAWN, PATH=str(Path(sys.executable).parent))
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["commit"] is None
    assert "`None`" not in (tmp_path / "out" / "pruned.md").read_text()
