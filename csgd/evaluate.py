"""python -m csgd.evaluate outputs/2026-01-31/12-00-00-000000 dataset=cifar10 dataset.root=data

Tests a saved network: the folder of a pruned one, or a file of weights together with model=…, on the dataset of its
run or on any other.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from csgd.build import build, label, makes, named
from csgd.checkpoint import load_weights
from csgd.data import Data
from csgd.errors import InputError
from csgd.pipeline.build import check_fit, device_name, device_of, placed
from csgd.pruned import describe, load_pruned
from csgd.reload import load_trimmed
from csgd.train import accuracy, predict
from csgd.verify import count_params

CONF = Path(__file__).parents[1] / "conf"


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 and one line for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m csgd.evaluate", description="Tests a saved network on a dataset.")
    parser.add_argument("network", type=Path, help="folder of a pruned network, or a file of weights with model=…")
    parser.add_argument(
        "settings", nargs="*", help="dataset=…, device=…, threads=…, schedule.batch_size=…, as of run.py"
    )
    chosen = parser.parse_args(arguments)
    try:
        print(evaluate(chosen.network, chosen.settings))
    except (InputError, HydraException, OmegaConfBaseException, OSError) as error:
        text = str(error).split("Config search path")[0]
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    return 0


def evaluate(network: Path, settings: list[str]) -> str:
    """Two lines: what was tested on what, and the accuracy."""
    if not network.exists():
        raise InputError(f"'{network}' is neither a folder nor a file")
    described = describe(network) if network.is_dir() else {}
    cfg = _composed(settings, described.get("dataset"), of_file=not described)
    device = device_of(cfg)
    data = build("dataset", cfg.dataset, batch_size=cfg.schedule.batch_size, seed=cfg.seed, device=device)
    model = placed(load_pruned(network) if described else _from_file(network, cfg, data), device)
    check_fit(model, data)
    measured = accuracy(*predict(model, data))
    name = label(described.get("model", cfg.model))
    return (
        f"{name} of {network}, {count_params(model):,} parameters, on {label(cfg.dataset)}, {device_name(device)}\n"
        f"test accuracy {measured:.4f}, {data.test_size} images"
    )


def _from_file(path: Path, cfg: Any, data: Data) -> nn.Module:
    state = load_weights(path, "the file")
    model = build("model", cfg.model, num_classes=data.num_classes, image_size=data.example.size(-1))
    return load_trimmed(model, state)


def _composed(settings: list[str], of_the_run: dict[str, Any] | None, of_file: bool) -> Any:
    """The configuration with `settings`, and with the dataset `of_the_run` where they name none."""
    try:
        from conf.schema import ConfigError, register
    except ModuleNotFoundError:
        raise InputError(f"the folder conf/ of the checkout is needed, and is not in '{CONF.parent}'") from None
    allowed = ("dataset", "device", "threads", "schedule.batch_size") + (("model",) if of_file else ())
    for setting in settings:
        if not re.match(rf"[+~]*({'|'.join(allowed)})\b", setting):
            raise InputError(f"'{setting}' is no setting of a test; there are {', '.join(allowed)}")
    says = {group: any(re.match(rf"{group}(=|\._target_=)", s) for s in settings) for group in ("dataset", "model")}
    for group, missing in (("dataset", of_the_run is None), ("model", of_file)):
        if missing and not says[group]:
            raise InputError(f"{group}=… is needed: the network does not say which")
    if of_the_run is not None and not any(setting.startswith("dataset=") for setting in settings):
        ConfigStore.instance().store(group="dataset", name="of_the_run", node=of_the_run)
        settings = ["dataset=of_the_run", *settings]
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", settings)
    try:
        cfg = OmegaConf.to_object(cfg)
    except ConfigError as error:
        raise InputError(str(error)) from None
    target = cfg.dataset["_target_"]
    if not says["dataset"] and not makes(named("dataset", target), Data):
        raise InputError(
            f"dataset._target_ '{target}' of the saved network is not called: it is not annotated to return "
            f"csgd.data.Data; dataset._target_={target} calls it"
        )
    return cfg


if __name__ == "__main__":
    sys.exit(main())
