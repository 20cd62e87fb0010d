"""What does a whole pruned model cost, and how accurate is it right after the cut and at the end?

    pip install torch-pruning && python experiments/bench/pruned_model.py

From one trained base network per seed: C-SGD cut at the collapse, C-SGD cut at the end (as published), and
Torch-Pruning's magnitude pruning of every layer to 5/8, fine-tuned for as many epochs with the same schedule and data.
Seconds are those after the base network: training, tests, cut.
"""

import json
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from common import ROOT, arguments, leave
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from conf.schema import register
from csgd.build import build
from csgd.checkpoint import load_weights
from csgd.pipeline.device import place
from csgd.pipeline.spec import RunSpec, timetable_of
from csgd.train import Learner, accuracy, predict, train
from csgd.verify import count_macs

NETWORKS = {"ResNet-20": ["model=resnet20", "dataset.image_size=16"], "VGG-16": ["model=vgg16"]}
WAYS = ("C-SGD, cut at the collapse", "C-SGD, cut at the end", "Torch-Pruning, fine-tuned")


def main() -> None:
    given = arguments(__doc__)
    torch.set_num_threads(max(given.threads))
    if not (peer := find_spec("torch_pruning")):
        print("Torch-Pruning is not installed: pip install torch-pruning")
    rows, numbers = [], []
    for network in list(NETWORKS)[: 1 if given.quick else None]:
        found = {way: [] for way in (WAYS if peer else WAYS[:2])}
        for seed in range(1 if given.quick else 3):
            settings = [*NETWORKS[network], "deps='5_8'", f"seed={seed}", "wandb=disabled"]
            for way, trim_at in zip(WAYS, ("collapse", "end"), strict=False):
                folder = given.output / "pruned_model" / f"{network}-{trim_at}-{seed}"
                found[way].append(of_run(settings, trim_at, folder, max(given.threads)))
            if peer:
                found[WAYS[2]].append(torch_pruning(settings, found[WAYS[0]][-1]["base"]))
        for way, results in found.items():
            numbers += [{"network": network, "way": way, "seed": seed} | one for seed, one in enumerate(results)]
            seconds, cut, end = ([one[key] for one in results] for key in ("seconds", "after_cut", "at_end"))
            saved = results[0]["macs_share"]
            rows.append((network, way, spread(seconds, ".0f"), spread(cut, ".4f"), spread(end, ".4f"), f"{saved:.1%}"))
    header = ("network", "", "seconds", "accuracy after the cut", "at the end", "MACs left")
    leave("pruned_model", given, header, rows, numbers)


def of_run(settings: list[str], trim_at: str, folder: Path, threads: int) -> dict:
    command = [sys.executable, "run.py", *settings, f"trim_at={trim_at}", f"threads={threads}", "quiet=true"]
    command.append(f"hydra.run.dir={folder.resolve()}")
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "seconds": summary["seconds"]["cluster"] + summary["seconds"]["csgd"] + summary["seconds"]["trim"],
        "after_cut": summary["verdict"]["accuracy_after_trim"],
        "at_end": summary["verdict"]["accuracy"],
        "macs_share": summary["cost"]["macs_after"] / summary["cost"]["macs_before"],
        "base": summary["base"],
    }


def torch_pruning(settings: list[str], base: dict) -> dict:
    import torch_pruning

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        register()
        spec = RunSpec.of(OmegaConf.to_object(compose("config", settings)))
    device = torch.device("cpu")
    data = build("dataset", spec.dataset, batch_size=spec.batch_size, seed=spec.seed, device=device)
    model = build("model", spec.model, num_classes=data.num_classes, image_size=data.example.size(-1))
    model = place(model, device)
    model.load_state_dict(load_weights(ROOT / base["source"]))
    before = count_macs(model, data.example)
    started = time.perf_counter()
    heads = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    importance = torch_pruning.importance.MagnitudeImportance(p=2)
    how = dict(importance=importance, pruning_ratio=1 - spec.deps.fraction, ignored_layers=heads)
    torch_pruning.pruner.MagnitudePruner(model, data.example, **how).step()
    after_cut = accuracy(*predict(model, data))
    sgd, pull = spec.sgd, spec.pull
    inertia = dict(momentum=sgd.momentum, nesterov=sgd.nesterov, weight_decay=sgd.weight_decay)
    optimizer = torch.optim.SGD(model.parameters(), pull.rates.lr, **inertia)
    timetable = timetable_of(pull.rates, data.steps_per_epoch)
    for moment in train(Learner.of(model, optimizer), data, timetable, pull.train, range(timetable.steps)):
        if moment.epoch_ends:
            at_end = accuracy(*predict(model, data))
    return {
        "seconds": time.perf_counter() - started,
        "after_cut": after_cut,
        "at_end": at_end,
        "macs_share": count_macs(model, data.example) / before,
        "base": base,
    }


def spread(values: list[float], how: str) -> str:
    middle = f"{statistics.mean(values):{how}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{how}} … {max(values):{how}})"


if __name__ == "__main__":
    main()
