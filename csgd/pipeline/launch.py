"""Several ranks for one run: started here, or found already started by torchrun."""

import logging
import logging.config
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm import tqdm

from csgd import ranks
from csgd.errors import InputError, RateError
from csgd.pipeline.device import device_of
from csgd.pipeline.spec import Machine

GRACE = 2.0  # seconds for which a rank that lost another one waits, so that the other one is found first


class RankError(InputError):
    """A rank was killed, and the run with it."""


def started_outside() -> bool:
    """Whether this process is one of several ranks already, of torchrun or of `launch`."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def started_first() -> bool:
    """Whether this process is rank 0, or alone; before it has joined the others too."""
    return os.environ.get("RANK", "0") == "0"


def rank_count(machine: Machine) -> int:
    """How many ranks share a batch, also before they are started."""
    return max(machine.ranks, ranks.own_share().ranks)


def check_ranks(machine: Machine) -> None:
    """InputError for ranks that cannot be had here."""
    asked, device = f"distributed.nproc={machine.ranks}", device_of(machine.device)
    if started_outside() and machine.ranks > 1:
        raise InputError(f"{asked}: torchrun has started {os.environ['WORLD_SIZE']} ranks already, leave it out")
    if device.type == "cuda" and machine.ranks > torch.cuda.device_count():
        raise InputError(f"{asked}: each rank needs a CUDA device, there are {torch.cuda.device_count()} here")
    if device.type != "cuda" and machine.sync_bn:
        raise InputError("distributed.sync_bn: torch has synchronised batch norm for CUDA devices only")


@contextmanager
def join_ranks(machine: Machine) -> Iterator[None]:
    """Within it this process is one of the ranks, if there are several; only rank 0 speaks.

    Once for a run and its trials: torchrun's ranks may wait for ever where they meet for a second time.
    """
    if not started_outside() or torch.distributed.is_initialized():
        yield
        return
    if not started_first():
        logging.disable(logging.WARNING)
    with ranks.group(device_of(machine.device)):
        yield


def launch(run: Callable[..., Any], arguments: tuple, nproc: int, logs: Mapping[str, Any] | None) -> Any:
    """What rank 0 of `nproc` ranks, each in its own process, returns of run(*arguments).

    logs  what logging.config.dictConfig takes, for rank 0.  An error names its rank: InputError, or RateError, if the
    user can mend it, RankError for a rank that was killed.
    """
    for name in ("torch.multiprocessing.spawn", "torch.distributed.elastic.multiprocessing.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # their traces: the cause is told below, once
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns that it looks for parameters without a gradient
    threads = max(1, torch.get_num_threads() // nproc)
    with tempfile.TemporaryDirectory() as errors:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=str(os.getpid()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=errors),
        )
        try:
            return elastic_launch(config, _rank)(run, arguments, logs, threads)[0]
        except ChildFailedError as error:
            raise _cause(*error.get_first_failure()) from None
        except SignalException as stopped:  # by Ctrl-C, as without ranks, or by a scheduler
            raise KeyboardInterrupt if stopped.sigval == signal.SIGINT else SystemExit(128 + stopped.sigval) from None


def _rank(run: Callable[..., Any], arguments: tuple, logs: Mapping[str, Any] | None, threads: int) -> Any:
    if logs and started_first():
        logging.config.dictConfig(dict(logs))
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own one is for several processes, and is left behind when this one is killed
    try:
        return run(*arguments)
    except InputError:
        raise
    except Exception:
        time.sleep(GRACE)  # torch blames the rank that ends first, and a lost connection is not the cause
        raise


def _cause(rank: int, failure: ProcessFailure) -> Exception:
    if failure.exitcode < 0:
        return RankError(f"rank {rank} was killed by {failure.signal_name()}; resume=auto goes on where it was")
    if not isinstance(failure.message, dict):
        return RankError(f"rank {rank} ended with status {failure.exitcode}; resume=auto goes on where it was")
    kind, _, text = failure.message["message"].partition(": ")
    for known in (RateError, InputError):
        if kind in _names(known):
            return known(text)
    return RuntimeError(f"rank {rank} failed\n{failure.message['extraInfo']['py_callstack']}")


def _names(kind: type[Exception]) -> set[str]:
    """Of an exception and of all that are derived from it."""
    return {kind.__name__}.union(*map(_names, kind.__subclasses__()))
