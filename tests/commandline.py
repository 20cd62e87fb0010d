"""`python run.py …` in a process of its own, forked from one that has imported the libraries, as that takes seconds."""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from functools import cache
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).parents[1]
LIBRARIES = [  # not csgd, which each run imports in its own order, nor wandb, which makes a folder when it is imported
    "torch._dynamo", "torch.distributed.fsdp", "torch.utils.flop_counter", "torchvision", "sklearn.cluster",
    "sklearn.datasets", "sklearn.model_selection", "hydra.main", "tqdm", "jinja2", "filelock",
    "matplotlib.backends.backend_agg", "matplotlib.figure",
]  # fmt: skip
ALWAYS = {"OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
ELSEWHERE = [path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "tests"))]


@cache
def _server():
    """What the processes are forked from: on one thread, as a pool of threads would not outlive a fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def _main(arguments: list[str], environment: dict[str, str], folder: str, out: str, err: str) -> None:
    for number, name, path in ((1, "stdout", out), (2, "stderr", err)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
        setattr(sys, name, os.fdopen(number, "w", 1, "utf-8", closefd=False))  # the old one knew what it wrote to
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(ROOT / "run.py"), *arguments]
    sys.path[:] = [str(ROOT), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *ELSEWHERE]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing leaves without them


def start(folder: Path, *arguments: str, out: Path, err: Path | None = None, **environment: str) -> BaseProcess:
    """A run that has begun in `folder`, on one thread; what it prints is appended to the files `out` and `err`."""
    environment = {**os.environ, **ALWAYS, **environment}
    given = (list(arguments), environment, str(folder), str(out), str(err or out))
    process = _server().Process(target=_main, args=given)
    process.start()
    return process


def run(folder: Path, *arguments: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """A run that has ended with this status: what it printed is `stdout` and `stderr`."""
    with TemporaryDirectory() as scratch:
        out, err = Path(scratch) / "out", Path(scratch) / "err"
        process = start(folder, *arguments, out=out, err=err, **environment)
        process.join()
        told = [path.read_text() if path.exists() else "" for path in (out, err)]
    assert process.exitcode == status, told[0][-3000:] + told[1][-3000:]
    return subprocess.CompletedProcess(list(arguments), process.exitcode, *told)


def run_fresh(
    folder: Path, *arguments: str, status: int = 0, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """The same by `python run.py …` itself; a variable that is None is not there."""
    environment = {key: value for key, value in {**os.environ, **ALWAYS, **environment}.items() if value is not None}
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done
