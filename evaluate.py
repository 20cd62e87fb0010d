"""python evaluate.py outputs/2026-01-31/12-00-00-000000 dataset=cifar10 dataset.root=data

Tests a saved network: the folder of a pruned one, or a file of weights together with model=…, on the dataset of its
run or on any other.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from conf.schema import ConfigError, register
from csgd.build import build, call, judged, label, makes, off_the_path, within
from csgd.checkpoint import load_weights
from csgd.data import Data
from csgd.errors import InputError, line_of
from csgd.pipeline.device import check_fit, check_task, device_name, device_of, place
from csgd.pruned import describe, load_pruned
from csgd.ranks import Share
from csgd.reload import load_trimmed
from csgd.train import measured
from csgd.verify import count_params

CONF = Path(__file__).parent / "conf"


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 and one line for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python evaluate.py", description="Tests a saved network on a dataset.")
    parser.add_argument("network", type=Path, help="folder of a pruned network, or a file of weights with model=…")
    parser.add_argument(
        "settings", nargs="*", help="dataset=…, device=…, threads=…, seed=…, schedule.batch_size=…, as of run.py"
    )
    parser.add_argument(
        "--allow", action="append", default=[], metavar="mynet", help="a module of yours that the folder may name"
    )
    chosen = parser.parse_intermixed_args(arguments)
    try:
        print(evaluate(chosen.network, chosen.settings, chosen.allow))
    except (InputError, HydraException, OmegaConfBaseException, OSError) as error:
        text = str(error).split("Config search path")[0]
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    return 0


def evaluate(network: Path, settings: list[str], allow: Sequence[str] = ()) -> str:
    """Two lines: what was tested on what, and its score.

    What the folder names is judged as `load_pruned` does, its dataset too; what `settings` name is the user's word.
    """
    if not network.exists():
        raise InputError(f"'{network}' is neither a folder nor a file")
    described = describe(network) if network.is_dir() else {}
    with off_the_path(network):
        cfg = _composed(settings, described)
    device = device_of(cfg.device, cfg.threads)
    offered = dict(batch_size=cfg.schedule.batch_size, seed=cfg.seed, device=device, share=Share())
    target, typed = cfg.dataset["_target_"], _says(settings, "dataset")
    own_code = allow or (typed and not within(target, ["csgd"]))  # which may lie in the folder
    with nullcontext() if own_code else off_the_path(network):
        if typed:
            data = build("dataset", cfg.dataset, **offered)
        else:
            instead = f"dataset._target_={target} on the command line calls it"
            made = judged("dataset", target, {"csgd.data": _is_dataset}, allow, instead)
            try:
                data = call("dataset", made, cfg.dataset, **offered)
            except InputError:
                raise
            except Exception as error:  # whatever a dataset raises on settings that it cannot take
                why = f"fails on the settings of pruned.json: {line_of(error)}"
                raise InputError(f"dataset._target_ '{target}' {why}") from None
    if not isinstance(data, Data):
        raise InputError(f"dataset._target_ must make a csgd.data.Data, got {type(data).__name__}")
    data = data.of_classes(described.get("class_names") or ())
    model = place(load_pruned(network, allow=allow) if described else _from_file(network, cfg, data), device)
    check_fit(model, data)
    check_task(model, data)
    name = label(described.get("model", cfg.model))
    return (
        f"{name} of {network}, {count_params(model):,} parameters, on {label(cfg.dataset)}, {device_name(device)}\n"
        f"test {data.task['score']} {measured(model, data):.4f}, {data.test_size} images"
    )


def _from_file(path: Path, cfg: Any, data: Data) -> nn.Module:
    state = load_weights(path, "the file")
    model = build("model", cfg.model, num_classes=data.num_classes, image_size=data.example.size(-1))
    return load_trimmed(model, state, example=data.example.cpu())


def _is_dataset(made: Any) -> bool:
    return not isinstance(made, type) and makes(made, Data)


def _says(settings: list[str], group: str) -> bool:
    """Whether the user names what makes it."""
    return any(re.match(rf"\+*{group}(=|\._target_=)", setting) for setting in settings)


def _composed(settings: list[str], described: dict[str, Any]) -> Any:
    """The configuration with `settings`, and with the dataset and the seed of the run where they name none."""
    allowed = ("dataset", "device", "threads", "seed", "schedule.batch_size") + (() if described else ("model",))
    for setting in settings:
        if not re.match(rf"[+~]*({'|'.join(allowed)})\b", setting):
            raise InputError(f"'{setting}' is no setting of a test; there are {', '.join(allowed)}")
    of_the_run = described.get("dataset")
    for group, missing in (("dataset", of_the_run is None), ("model", not described)):
        if missing and not _says(settings, group):
            raise InputError(f"{group}=… is needed: the network does not say which")
    if of_the_run is not None and not any(setting.startswith("dataset=") for setting in settings):
        ConfigStore.instance().store(group="dataset", name="of_the_run", node=_plain(of_the_run))
        settings = ["dataset=of_the_run", *settings]
    seed = described.get("seed")
    if isinstance(seed, int) and not any(re.match(r"\+*seed=", setting) for setting in settings):
        settings = [f"seed={seed:d}", *settings]
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", settings)
    try:
        return OmegaConf.to_object(cfg)
    except ConfigError as error:
        raise InputError(str(error)) from None


def _plain(of_the_run: Any) -> dict[str, Any]:
    """The saved settings of a dataset, which download nothing and are values alone, to Hydra too."""
    if not isinstance(of_the_run, dict) or not isinstance(of_the_run.get("_target_"), str):
        raise InputError("pruned.json is damaged: dataset has no '_target_'")
    if "defaults" in of_the_run or "${" in json.dumps(of_the_run):
        raise InputError("pruned.json: dataset may hold neither 'defaults' nor '${'; dataset=… names another")
    if given := [key for key in ("batch_size", "seed", "device", "share") if key in of_the_run]:
        raise InputError(f"pruned.json: dataset may not hold '{given[0]}', which belongs to the test")
    return of_the_run | ({"download": False} if "download" in of_the_run else {})


if __name__ == "__main__":
    sys.exit(main())
