"""The first picture of README: filters that collapse into one, and accuracy through the cut, beside a deletion.

    pip install torch-pruning
    OMP_NUM_THREADS=1 python experiments/front.py run 3    the main job with seeds 0, 1, 2: adds to front.jsonl
    python experiments/front.py                            draws front.png from it

The main job is `run.py model=vgg16 deps=5_8`.  Its rival deletes the filters of least norm from the same base network,
with Torch-Pruning, down to the same widths, and trains on for as many epochs with the same optimizer, rates and
batches.  Both are tested every nine steps, just before their cut and just after it.
"""

import json
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

ROWS, PICTURE = (Path(__file__).with_name(f"front.{kind}") for kind in ("jsonl", "png"))
SETTINGS = ["model=vgg16", "deps='5_8'"]
EVERY = 9  # steps between two tests
SHOWN = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the way to the cut: where filters are kept
CLUSTERS, DRAWN = 3, 2  # whose filters are kept, and drawn
WIDE, TALL = 1.75, 1.12  # from filter to filter, of the width of one
WAYS = {
    "base": ("base network", "tab:gray"),
    "deletion": ("filters of least norm deleted", "tab:orange"),
    "csgd": ("csgd", "tab:blue"),
}
PLACES = {  # of a note beside a point
    "csgd": dict(xytext=(0, -24), textcoords="offset points", ha="center"),
    "deletion": dict(xytext=(10, -6), textcoords="offset points"),
}


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("run", "draw"), default="draw")
    parser.add_argument("seeds", nargs="?", type=int, default=3)
    given = parser.parse_args()
    if given.what == "draw":
        draw([json.loads(line) for line in ROWS.read_text().splitlines()])
        return
    for seed in range(given.seeds):
        with ROWS.open("a") as file:
            for row in measured_rows(seed):
                print({key: value for key, value in row.items() if key != "filters"}, flush=True)
                file.write(json.dumps(row) + "\n")


def measured_rows(seed: int) -> list[dict]:
    """A row of each way: its accuracies over the steps of the run, and what they were around the cut."""
    import torch

    from csgd.pipeline.provenance import commit

    facts = {"seed": seed, "command": f"python experiments/front.py run {sys.argv[2] if len(sys.argv) > 2 else 3}"}
    facts |= {"commit": commit(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        base, collapsed = collapse(seed, Path(folder))
        return [facts | base, facts | collapsed, facts | delete(seed, Path(folder))]


class Looks:
    """What looks on, in the place of a run's own Watch: tests every nine steps, and keeps filters of the first layer.

    accuracies  [(step of the part, accuracy)]
    """

    def __init__(self, plan):
        self.plan, self.accuracies, self.filters = plan, [], []

    def starts(self, setup, progress) -> None:
        pass

    def after(self, setup, progress, moment, tells=False) -> None:
        from csgd.pipeline.progress import Part
        from csgd.train import measured

        if tells or moment.epoch_ends or moment.step % EVERY == 0:
            self.accuracies.append((moment.step, measured(setup.model, setup.data)))
            print(progress.part, *self.accuracies[-1], flush=True)
        if progress.part is Part.WIDE and moment.step in [round(at * progress.plan.due) for at in SHOWN]:
            self.keep(setup, progress, moment.step)

    def keep_outputs(self, progress, before, after) -> None:
        pass

    def keep_filters(self, setup, progress, when) -> None:
        if when == "start":
            self.keep(setup, progress, 0)

    def keep(self, setup, progress, step: int) -> None:
        layer = progress.spaces[0].name
        parts = sorted(progress.clusters[layer], key=len, reverse=True)[:CLUSTERS]
        kernel = setup.model.get_parameter(f"{layer}.weight").detach().sum(1)  # digits are gray: what all colours add
        tiles = [[[round(float(weight), 4) for weight in kernel[slot].flatten()] for slot in part] for part in parts]
        self.filters.append({"step": step, "layer": layer, "clusters": tiles})


def prepared(seed: int):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from conf.schema import register
    from csgd.pipeline.setup import prepare
    from csgd.pipeline.spec import RunSpec

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        register()
        return prepare(RunSpec.of(OmegaConf.to_object(compose("config", [*SETTINGS, f"seed={seed}"]))))


def collapse(seed: int, folder: Path) -> tuple[dict, dict]:
    """The main job: the training of its base network, and what follows."""
    from csgd.checkpoint import save_weights
    from csgd.folder import RunFolder
    from csgd.pipeline.foresee import foresee
    from csgd.pipeline.learners import base_learner
    from csgd.pipeline.progress import BaseResult, Part, Progress
    from csgd.pipeline.stage import begin, cut_stage, go_on_narrow, pull

    setup = prepared(seed)
    progress, looks = Progress(RunFolder(folder)), Looks(foresee(setup))
    progress.learner = base_learner(setup)
    for moment in progress.train(setup, setup.base, setup.spec.base.train):
        looks.after(setup, progress, moment, tells=moment.epoch_ends)
    save_weights(folder / "base.safetensors", setup.model.state_dict())
    base = {"way": "base", "accuracies": looks.accuracies}
    progress.base = BaseResult(looks.accuracies[-1][1], "trained")
    progress.sums.clear()
    progress.part, progress.step, progress.learner = Part.BETWEEN, 0, None
    looks.accuracies = []
    begin(setup, progress, looks)
    pull(setup, progress, looks)
    cut_stage(setup, progress, looks)
    go_on_narrow(setup, progress, looks)
    cut, widths = progress.results[-1], {name: int(width) for name, width in setup.widths[-1].items()}
    around = {
        "step": cut.cut_step,
        "before": cut.verdict.accuracy_before_trim,
        "after": cut.verdict.accuracy_after_trim,
    }
    told = {"way": "csgd", "accuracies": looks.accuracies, "cut": around, "widths": widths, "filters": looks.filters}
    return base, told | {"relative_logit_change": cut.verdict.relative_logit_change}


def delete(seed: int, folder: Path) -> dict:
    """The rival, from the same base network."""
    import torch_pruning
    from torch import nn

    from csgd.checkpoint import load_weights
    from csgd.pipeline.learners import base_learner
    from csgd.train import measured, train

    setup = prepared(seed)
    model, data = setup.model, setup.data
    model.load_state_dict(load_weights(folder / "base.safetensors"))
    before = measured(model, data)
    heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
    importance = torch_pruning.importance.MagnitudeImportance(p=2)
    how = dict(importance=importance, pruning_ratio=1 - setup.spec.deps.fraction, ignored_layers=heads)
    torch_pruning.pruner.MagnitudePruner(model, data.example, **how).step()
    widths = {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    around, accuracies = {"step": 0, "before": before, "after": measured(model, data)}, []
    print("deletion", around, flush=True)
    steps = range(setup.csgd.steps)
    for moment in train(base_learner(setup), data, setup.csgd, setup.spec.pull.train, steps):
        if moment.epoch_ends or moment.step % EVERY == 0:
            accuracies.append((moment.step, measured(model, data)))
    return {"way": "deletion", "accuracies": accuracies, "cut": around, "widths": widths}


def draw(rows: list[dict]) -> None:
    """front.png: on the left filters of seed 0, on the right all seeds, their mean as a line and what lies between as a
    band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3), wspace=0.03)
    base_steps = rows[0]["accuracies"][-1][0]
    _draw_filters(left, next(row for row in rows if row["way"] == "csgd"), base_steps)
    _draw_accuracies(right.subplots(), rows, base_steps)
    figure.savefig(PICTURE, dpi=130)


def _draw_filters(figure, row: dict, base_steps: int) -> None:
    """A line a filter, a column a step; the members of a cluster below each other."""
    looks = [look | {"clusters": look["clusters"][:DRAWN]} for look in row["filters"]]
    columns = [(f"step {base_steps + look['step']}", look["clusters"]) for look in looks]
    columns.append(("the cut", [part[:1] for part in looks[-1]["clusters"]]))
    sizes = [len(part) for part in looks[0]["clusters"]]
    axes = figure.subplots()
    for x, (_, clusters) in enumerate(columns):
        top = 0.0
        for part, size, whole in zip(clusters, sizes, looks[0]["clusters"], strict=True):
            largest = max(abs(weight) for tile in whole for weight in tile)
            for k, tile in enumerate(part):
                side = round(len(tile) ** 0.5)
                picture = [tile[side * r : side * (r + 1)] for r in range(side)]
                left, y = WIDE * x, TALL * (top + k)
                axes.imshow(picture, cmap="RdBu_r", vmin=-largest, vmax=largest, extent=(left, left + 1, y + 1, y))
                frame = ([left, left + 1, left + 1, left, left], [y, y, y + 1, y + 1, y])
                axes.plot(*frame, color="tab:gray", linewidth=0.5)
            top += size + 0.4
    axes.set(xlim=(-0.05, WIDE * len(columns)), ylim=(TALL * top, -0.05))
    axes.set_xticks([WIDE * x + 0.5 for x in range(len(columns))], [name for name, _ in columns], fontsize=8.5)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(f"{' and '.join(map(str, sizes))} filters of the first layer become one each", fontsize=11)


def _draw_accuracies(axes, rows: list[dict], base_steps: int) -> None:
    for way, (name, colour) in WAYS.items():
        own = [row for row in rows if row["way"] == way]
        starts = [base["accuracies"][-1][1] for base in rows if base["way"] == "base"]
        lines = [_line(row | {"base": start}, base_steps) for row, start in zip(own, starts, strict=True)]
        steps = [step for step, _ in lines[0]]
        values = list(zip(*([value for _, value in line] for line in lines), strict=True))
        axes.plot(steps, [mean(at) for at in values], color=colour, label=name, linewidth=1.6)
        axes.fill_between(
            steps, [min(at) for at in values], [max(at) for at in values], color=colour, alpha=0.2, linewidth=0
        )
        if way != "base":
            cut = own[0]["cut"]["step"] + base_steps
            after = mean(row["cut"]["after"] for row in own)
            axes.plot([cut], [after], "o", color=colour, markersize=6, zorder=4)
            before = mean(row["cut"]["before"] for row in own)
            what = "cut" if way == "csgd" else "deleted"
            axes.annotate(f"{what}: {before:.1%} → {after:.1%}", (cut, after), color=colour, **PLACES[way])
    axes.set(xlabel="step of the run", ylabel="test accuracy", ylim=(0, 1.02))
    axes.set_title(f"VGG-16 on the digits, 61% of the multiply-accumulates cut, {len(own)} seeds", fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)


def _line(row: dict, base_steps: int) -> list[tuple[int, float]]:
    """(step of the run, accuracy), with those around the cut."""
    if row["way"] == "base":
        return row["accuracies"]
    cut = row["cut"]
    at_cut = [(cut["step"], cut["before"]), (cut["step"], cut["after"])]
    at_cut += [(0, row["base"])] if cut["step"] else []
    points = sorted([*row["accuracies"], *at_cut], key=lambda point: point[0])
    return [(base_steps + step, value) for step, value in points]


if __name__ == "__main__":
    main()
