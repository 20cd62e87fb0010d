"""Where a result comes from: versions, the package's own files, commit, and the configuration it was made with."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import csgd
from csgd.errors import InputError

GIT_SECONDS = 10  # that git may take for an answer
GIT_PLACES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")

# Keys that do not change the result, with all below them.
FREE = (
    "wandb", "progress", "quiet", "plan_only", "resume", "report", "checkpoint_every", "threads", "base.cache",
    "dataset.download", "dataset.workers", "distributed.check_every",
)  # fmt: skip
# A run may also go on with other ranks, though batch norm sees their number, and be exported at its end.
FREE_TO_GO_ON = (*FREE, "distributed.nproc", "export")


def versions() -> dict[str, str]:
    """Of Python and the packages that a result may depend on; of csgd a hash of its files."""
    packages = ("torch", "torchvision", "scikit-learn", "numpy", "hydra-core", "wandb", "onnx", "onnxruntime")
    found = {"python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found | {"csgd": code()}


def code() -> str:
    """A hash of the package's own files: other code may give other bits."""
    root = Path(csgd.__file__).parent
    sources = [path.relative_to(root).as_posix().encode() + path.read_bytes() for path in sorted(root.rglob("*.py"))]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


def commit(package: Path = Path(csgd.__file__).parent) -> str | None:
    """The commit of csgd's own checkout, with "-dirty" behind it if files that it tracks differ; else None.

    None as well where the package lies in a repository of the user's, or git is missing, hangs or refuses: where a
    result comes from is worth telling, and no reason to lose it.
    """
    package = package.resolve()
    try:
        top, head = _git(package, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != package.parent:
            return None
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return f"{head}-dirty" if changed else head


def _git(folder: Path, *arguments: str) -> str:
    """What git says in `folder`, whatever repository the environment names; it takes no lock and starts no daemon."""
    environment = {key: value for key, value in os.environ.items() if key not in GIT_PLACES}
    done = subprocess.run(
        ["git", "-c", "core.fsmonitor=false", *arguments],
        cwd=folder,
        env=environment | {"GIT_OPTIONAL_LOCKS": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=GIT_SECONDS,
    )
    return done.stdout


def is_free(name: str, free: Sequence[str] = FREE) -> bool:
    """Whether a key is one of those in `free`, or below one."""
    return any(name == key or name.startswith(f"{key}.") for key in free)


def refuse_other(
    key: str, folder: Path, then: Mapping[str, Any], now: Mapping[str, Any], free: Sequence[str] = FREE
) -> None:
    """InputError with the differences between two flat configurations, but for those in keys that are `free`."""
    differ = [
        f"{name}: {then.get(name)!r} then, {now.get(name)!r} now"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name) and not is_free(name, free)
    ]
    if differ:
        raise InputError(f"{key}: '{folder}' holds another configuration or version: {'; '.join(differ)}")


def identity(config: Mapping[str, Any], versions: Mapping[str, Any]) -> dict[str, Any]:
    """What fixes the bits of a result: the configuration, flat, and the versions of torch and of this code."""
    return flat(config) | {f"versions.{name}": versions.get(name) for name in ("torch", "csgd")}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{a: {b: 1}} → {a.b: 1}, lists and other leaves as text."""
    leaves = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value if isinstance(value, int | float | str | None) else str(value)
    return leaves
