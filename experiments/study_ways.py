"""Four ways to a narrow network, at one cost: which is best, for which network, with how many images?

    OMP_NUM_THREADS=1 python experiments/study_ways.py run              adds the rows that study_ways.jsonl lacks
    OMP_NUM_THREADS=1 python experiments/study_ways.py more vgg16 --images 512      … those that vary one thing
    OMP_NUM_THREADS=1 python experiments/study_ways.py early --images 512           … or `allot`
    python experiments/study_ways.py draw                               the picture; the tables are in docs/results.md

Three networks on Fashion-MNIST, with all 60,000 images and with 512 of them, cut to 3/4, 1/2 and 1/4 of every width, in
the four ways of `method`, with three seeds.  `cost=equal` gives each the training cost of the C-SGD run.  Learning
rates are tuned alike: for each network, number of images and way three rates are tried with seed 0 at half of the
widths, on images held out of the training set, a tenth of 60,000 and a quarter of 512; the best is that of all its
runs.  Every row is what run.py says of the command that it holds.  `more` varies one thing at half of the widths and
with 512 images: the learning rate, the optimizer, what is clustered, the importance, and the pull as published.
`early` cuts at 15 %, or 5 %, of a longer run of the same cost, `allot` shares a budget of multiply-accumulates in two
ways.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

ROWS, PICTURE = (Path(__file__).with_suffix(suffix) for suffix in (".jsonl", ".png"))
CACHE = ROOT / "outputs" / "study_ways" / "base"
WAYS, WIDTHS, SEEDS = ("csgd", "merge", "prune", "scratch"), ("3_4", "1_2", "1_4"), range(3)
RATES = (5e-4, 1.5e-3, 5e-3)
MORE_RATES = (1.5e-4, *RATES, 1.5e-2)
NETWORKS = {  # settings, learning rate of the base
    "vgg16": ("model=vgg16 +model.width=0.125 dataset.image_size=32", 1e-3),
    "resnet20": ("model=resnet20 dataset.image_size=14", 3e-3),
    "convnext": ("model=convnext dataset.image_size=14", 3e-3),
}
IMAGES = {  # settings, epochs of the base, of its warm-up and of what follows
    "512": ("dataset.train_size=512 schedule.batch_size=32 schedule.test_every=1000", 40, 3, 20),
    "60000": ("schedule.batch_size=256 schedule.test_every=1000", 1, 0.1, 1),
}
EARLY = {  # fraction of a run by which filters are equal → epochs for each of WIDTHS, at the cost of IMAGES["512"]
    0.15: {"vgg16": (24, 34, 51), "resnet20": (24, 34, 51), "convnext": (21, 33, 49)},
    0.05: {"vgg16": (26, 42, 91), "resnet20": (26, 43, 95), "convnext": (22, 41, 85)},
}
HELD_OUT = {"512": 0.25, "60000": 0.1}
NAMES = {"vgg16": "VGG-16, no norm", "resnet20": "ResNet-20, batch norm", "convnext": "ConvNeXt, layer norm"}
TOLD = {
    "csgd": "csgd",
    "early": "csgd, cut early",
    "merge": "merged at once",
    "prune": "deleted",
    "scratch": "from scratch",
}
COLORS = {
    "csgd": "tab:blue",
    "early": "tab:purple",
    "merge": "tab:green",
    "prune": "tab:orange",
    "scratch": "tab:gray",
}
OWN = {  # of each way
    "csgd": "clustering.of=outputs",
    "merge": "method=merge clustering.of=outputs",
    "prune": "method=prune importance=l2",
    "scratch": "method=scratch",
}


def command(network: str, images: str, width: str, way: str, seed: int, lr: float, more: str = "") -> str:
    """What a person would type for a run; `more` may hold epochs=… and optimizer=… of its training, too."""
    of_network, base_lr = NETWORKS[network]
    of_images, base_epochs, warmup, epochs = IMAGES[images]
    said = dict(word.split("=", 1) for word in more.split())
    epochs, optimizer = said.pop("epochs", epochs), said.pop("optimizer", "adamw")
    more = " ".join(f"{key}={value}" for key, value in said.items())
    base = f"schedule.base={{epochs: {base_epochs}, lr: {base_lr}, warmup_epochs: {warmup}, optimizer: adamw}}"
    csgd = f"schedule.csgd={{epochs: {epochs}, lr: {lr}, optimizer: {optimizer}}}"
    whole = any(key in more for key in ("centri_strength", "clustering", "importance"))  # nothing of OWN beside it
    own = more if whole else f"{OWN[way]} {more}"
    deps = f"deps.{width}" if "=" in width else f"deps={width}"
    words = f"dataset=fashion_mnist {of_network} {of_images} {deps} seed={seed} {own}".split()
    return shlex.join(["python", "run.py", *words, base, csgd])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    studies = {"run": runs_of, "more": further_runs, "early": early_runs, "allot": allotted_runs}
    parser.add_argument("what", choices=(*studies, "draw"))
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--images", nargs="*", default=list(IMAGES))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    given = parser.parse_args()
    if given.what == "draw":
        draw()
        return
    for images in given.images:
        for seed in given.seeds:
            for network in given.networks:
                for facts in studies[given.what](network, images, seed):
                    add(facts)


def runs_of(network: str, images: str, seed: int) -> Iterator[dict]:
    """Every run of a network, so many images and a seed, with what sets it apart; trials first."""
    for way in WAYS:
        for lr in RATES:
            one = dict(network=network, images=images, width="1_2", way=way, seed=0, lr=lr)
            yield {"study": "trial", **one, "more": f"validation={HELD_OUT[images]}"}
        lr = best_rate(network, images, way)
        for width in WIDTHS:
            yield dict(study="ways", network=network, images=images, width=width, way=way, seed=seed, lr=lr, more="")


def further_runs(network: str, images: str, seed: int) -> Iterator[dict]:
    """At half of the widths, one thing after the other is varied."""
    one = dict(network=network, images=images, width="1_2", seed=seed)
    for way in WAYS[:3]:
        for lr in MORE_RATES:
            yield {"study": "rates", **one, "way": way, "lr": lr, "more": ""}
    for way in ("csgd", "merge"):
        kernels = ("" if way == "csgd" else f"method={way} ") + "clustering.of=pacesetter"
        yield {"study": "kernels", **one, "way": way, "lr": best_rate(network, images, way), "more": kernels}
    for by in ("l1", "taylor"):
        rate = best_rate(network, images, "prune")
        yield {"study": "importance", **one, "way": "prune", "lr": rate, "more": f"method=prune importance={by}"}
    for lr in (5e-3, 1.5e-2, 5e-2):
        yield {"study": "sgd", **one, "way": "csgd", "lr": lr, "more": "optimizer=sgd"}
        yield {"study": "published", **one, "way": "csgd", "lr": lr, "more": "optimizer=sgd centri_strength=auto"}


def early_runs(network: str, images: str, seed: int) -> Iterator[dict]:
    """The pull in the first part of a run; what the narrow network then saves makes it longer."""
    one = {"study": "early", "network": network, "images": images, "seed": seed, "way": "csgd"}
    for by, epochs in EARLY.items():
        for width, longer in zip(WIDTHS, epochs[network], strict=True):
            lr = best_rate(network, images, "csgd")
            yield one | {"width": width, "lr": lr, "more": f"epochs={longer} collapse_by={by}"}


def allotted_runs(network: str, images: str, seed: int) -> Iterator[dict]:
    """A quarter of the multiply-accumulates: one fraction of all widths, or by what a layer can spare."""
    one = {"study": "allot", "network": network, "images": images, "width": "macs=0.25", "seed": seed}
    for allot in ("uniform", "sensitivity"):
        for way in ("csgd", "merge"):
            yield one | {"way": way, "lr": best_rate(network, images, way), "more": f"deps.allot={allot}"}


def rows() -> list[dict]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def compared() -> list[dict]:
    """The rows of the four ways, and those of a cut at 15 % as a fifth."""
    early = [row | {"way": "early"} for row in rows() if row["study"] == "early" and "=0.15" in row["more"]]
    return [row for row in rows() if row["study"] == "ways"] + early


def best_rate(network: str, images: str, way: str) -> float:
    """Of the trials, the rate whose images held out were told best."""
    asked = dict(study="trial", network=network, images=images, way=way)
    trials = [row for row in rows() if asked.items() <= row.items()]
    return max(trials, key=lambda row: row["end"])["lr"]


def add(facts: dict) -> None:
    """Makes a run, unless its row is there; the same run of another part of the study is not made again."""
    told = command(*(facts[key] for key in ("network", "images", "width", "way", "seed", "lr", "more")))
    found = [row for row in rows() if row["command"] == told]
    if any(row["study"] == facts["study"] for row in found):
        return
    row = facts | ({key: found[0][key] for key in found[0] if key not in facts} if found else outcome(told))
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(*(row[key] for key in ("study", "network", "images", "width", "way", "seed", "lr")), end=": ", flush=True)
    print(row.get("failure") or f"{row['base']:.4f} {row['after_cut']:.4f} {row['end']:.4f}, {row['seconds']:.0f} s")


def outcome(told: str) -> dict:
    """What the run of a command gives, made in this process; a run that cannot be made says why."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from conf.schema import register
    from csgd.errors import InputError
    from csgd.pipeline import run
    from csgd.pipeline.provenance import commit

    quiet = ["threads=1", "wandb=disabled", "quiet=true", "report=false", f"base.cache={CACHE}"]
    words = [word.replace("deps=", "deps='") + "'" if word.startswith("deps=") else word for word in shlex.split(told)]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        register()
        config = OmegaConf.to_object(compose("config", [*words[2:], *quiet]))
    facts = {"command": told, "commit": (commit() or "").removesuffix("-dirty")}  # the rows that were written so far
    with tempfile.TemporaryDirectory() as folder:
        try:
            run(config, Path(folder), told)
        except InputError as error:
            return facts | {"failure": str(error), "base": 0.0, "after_cut": 0.0, "end": 0.0}
        summary = json.loads((Path(folder) / "summary.json").read_text())
    verdict, cost, seconds = summary["verdict"], summary["cost"], summary["seconds"]
    return facts | {
        "base": summary["base"]["accuracy"],
        "before_cut": verdict["accuracy_before_trim"],
        "after_cut": verdict["accuracy_after_trim"],
        "end": verdict["accuracy"],
        "lossless": verdict["lossless"],
        "logits": verdict["relative_logit_change"],
        "macs": cost["macs_after"] / cost["macs_before"],
        "steps": summary["stages"][-1]["forecast"]["steps"],
        "seconds": round(seconds["cluster"] + seconds["csgd"] + seconds["trim"], 1),
        "torch": summary["versions"]["torch"],
    }


def draw() -> None:
    """Accuracy right after the cut and at the end against the width, a panel for each network and number of images."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = compared()
    figure, panels = plt.subplots(2, len(NETWORKS), figsize=(11, 6.4), sharex=True, sharey="row")
    for line, images in zip(panels, IMAGES, strict=True):
        for panel, network in zip(line, NETWORKS, strict=True):
            here = [row for row in found if (row["network"], row["images"]) == (network, images)]
            draw_panel(panel, here)
            panel.set_title(f"{NAMES[network]}, {int(images):,} images", fontsize=10)
        line[0].set_ylabel("test accuracy, %")
    for panel in panels[-1]:
        panel.set_xticks(range(len(WIDTHS)), [width.replace("_", "/") for width in WIDTHS])
        panel.set_xlabel("of every width")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(PICTURE, dpi=110)


def draw_panel(panel, here: list[dict]) -> None:
    """A way's mean over seeds at the end as a line, its seeds as dots; right after the cut as a dashed line."""
    for place, (way, color) in enumerate(COLORS.items()):
        for key, style in (("end", "-"), ("after_cut", ":")):
            values = {width: [100 * r[key] for r in here if (r["way"], r["width"]) == (way, width)] for width in WIDTHS}
            if not all(values.values()) or (key == "after_cut" and way == "scratch"):
                continue
            at = [x + 0.05 * (place - 2) for x in range(len(WIDTHS))]
            label = f"{TOLD[way]}, {'at the end' if key == 'end' else 'after the cut'}"
            panel.plot(at, [mean(values[width]) for width in WIDTHS], style, color=color, label=label)
            for x, width in zip(at, WIDTHS, strict=True):
                panel.plot([x] * len(values[width]), values[width], ".", color=color, markersize=4)
    if not here:
        panel.text(0.5, 0.5, "not run yet", transform=panel.transAxes, ha="center", color="0.5")
    bases = {row["seed"]: 100 * row["base"] for row in here if row["way"] != "scratch"}
    if bases:
        panel.axhline(mean(bases.values()), color="0.6", linewidth=0.8, label="base network")


if __name__ == "__main__":
    main()
