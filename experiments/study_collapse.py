"""How gently should the filters collapse?  Accuracy at the cut and at the end, over shapes and times of the collapse.

    OMP_NUM_THREADS=1 python experiments/study_collapse.py run        adds what is missing to study_collapse.jsonl
    python experiments/study_collapse.py report                       the tables and the picture

Two networks (VGG-16 without batch norm at an eighth of its width, ResNet-20) on the digits, cut to 5/8 and to 1/4,
several seeds, each with its own base network.  Every run has the same schedule; settings differ in

    ramp         shape of the centripetal strength
    collapse_by  fraction of the run by which the filters have collapsed; the strength is solved for it
    wide_lr      factor of the learning rate until then
    of           what k-means sees: the pacesetter's kernels, or those of all producers
    after_trim   the rescaled gradients of fact F7 (same_run), or plain SGD

beside one-shot merging with fine-tuning, the narrow network from scratch, and three stages at the cost of one.
Seconds are CPU seconds of training on one thread.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import csgd  # noqa: E402
from csgd.centripetal import collapse_step, forecast, strength_to_collapse  # noqa: E402
from csgd.data import digits  # noqa: E402
from csgd.models import resnet20, vgg16  # noqa: E402
from csgd.optim import CSGD  # noqa: E402
from csgd.report import table  # noqa: E402
from csgd.schedule import RAMPS, Timetable, learning_rate, ramp  # noqa: E402
from csgd.train import Learner, TrainSpec, accuracy, predict, train  # noqa: E402
from csgd.verify import relative_change  # noqa: E402

RESULTS = HERE / "study_collapse.jsonl"
EPOCHS, WARMUP, STEPS_PER_EPOCH = 6, 1, 45
STEPS = EPOCHS * STEPS_PER_EPOCH
LOOKS = 10  # at the test accuracy, per run
TOLERANCE = 1e-5
COLLAPSE_BY = (0.15, 0.25, 0.5, 0.75)
STAGES = {5 / 8: (13 / 16, 11 / 16, 5 / 8), 1 / 4: (3 / 4, 1 / 2, 1 / 4)}


@dataclass(frozen=True)
class Network:
    make: partial
    image_size: int
    base_lr: float  # of AdamW
    lr: float  # of C-SGD


NETWORKS = {
    "vgg16": Network(partial(vgg16, 10, 32, 1 / 8), 32, 2e-3, 0.01),
    "resnet20": Network(partial(resnet20, 10), 16, 3e-3, 0.03),
}


@dataclass(frozen=True)
class Setting:
    """One way to the narrow network; method: csgd | staged | one_shot | scratch."""

    method: str = "csgd"
    ramp: str = "constant"
    collapse_by: float = 0.5
    wide_lr: float = 1.0
    of: str = "pacesetter"
    after_trim: str = "same_run"


def settings(network: str) -> list[Setting]:
    grid = [Setting(ramp=shape, collapse_by=by) for shape in RAMPS for by in COLLAPSE_BY]
    grid += [Setting(ramp=shape, collapse_by=by, wide_lr=0.3) for shape in ("constant", "cosine") for by in COLLAPSE_BY]
    grid += [Setting(collapse_by=by, after_trim="plain") for by in COLLAPSE_BY]
    if network == "resnet20":  # VGG's spaces have one producer each
        grid += [Setting(collapse_by=by, of="producers") for by in COLLAPSE_BY]
    return [*grid, Setting("staged"), Setting("one_shot"), Setting("scratch")]


@cache
def base(network: str, seed: int):
    """The data and the trained base network, and the training of any network on the base schedule."""
    kind = NETWORKS[network]
    data = digits(
        image_size=kind.image_size, batch_size=32, shift=kind.image_size // 16, seed=seed, device=torch.device("cpu")
    )

    def trained(model: nn.Module) -> nn.Module:
        optimizer = torch.optim.AdamW(model.parameters(), kind.base_lr, weight_decay=5e-4)
        advance(model, optimizer, data, range(STEPS), partial(rate, kind.base_lr, STEPS), seed=seed)
        return model

    torch.manual_seed(seed)
    return data, trained(kind.make().to(memory_format=torch.channels_last)), trained


def rate(lr: float, steps: int, step: int) -> float:
    """The learning rate of a run of `steps` steps, with a warm-up of a sixth of it."""
    return learning_rate(step, steps_per_epoch=steps // EPOCHS, epochs=EPOCHS, lr=lr, warmup_epochs=WARMUP)


def advance(model, optimizer, data, steps: range, lr_at, *, seed: int, ramp_at=None) -> float:
    """Trains for some steps; CPU seconds."""
    started = time.process_time()
    rates, ramps = ([at(step) for step in range(steps.stop)] if at else None for at in (lr_at, ramp_at))
    timetable = Timetable(STEPS_PER_EPOCH, rates, ramps)
    for _ in train(Learner.of(model, optimizer), data, timetable, TrainSpec(seed), steps):
        pass
    return time.process_time() - started


def measure(network: str, width: float, seed: int, setting: Setting) -> dict:
    data, trained_base, train_base = base(network, seed)
    model, spaces = copy.deepcopy(trained_base), None
    seconds, looks = 0.0, []
    lr, steps = NETWORKS[network].lr, range(STEPS)
    row = {"before": accuracy(*predict(model, data))}
    if setting.method in ("csgd", "staged"):
        stages = STAGES[width] if setting.method == "staged" else (width,)
        length = STEPS // len(stages)
        widths_at_start = csgd.find_spaces(model, data.example, trial=False)
        for stage, fraction in enumerate(stages):
            spaces = csgd.find_spaces(model, data.example, trial=False)
            widths = csgd.target_widths(widths_at_start, fraction)
            clusters = csgd.cluster(model, spaces, widths, seed=seed, of=setting.of)
            done = pull(model, spaces, clusters, data, setting, lr, seed, stage * length, length)
            if done is None:
                return row | {"unreachable": True}
            seconds += done["seconds"]
            looks += done["looks"]
        row |= {"cut": done["cut"], "cut_step": done["cut_step"], "relative_change": done["relative_change"]}
    else:
        spaces = csgd.find_spaces(model, data.example, trial=False)
        widths = csgd.target_widths(spaces, width)
        if setting.method == "one_shot":
            clusters = csgd.cluster(model, spaces, widths, seed=seed)
            csgd.merge_equal(model, spaces, clusters)
            csgd.trim(model, spaces, clusters, tolerance=None)
            row["cut"] = accuracy(*predict(model, data))
        else:
            csgd.trim(model, spaces, csgd.cluster(model, spaces, widths, "even"), tolerance=None)
            torch.manual_seed(seed)
            started = time.process_time()
            train_base(initialised(model))
            seconds += time.process_time() - started
        optimizer = torch.optim.SGD(model.parameters(), lr, 0.9, nesterov=True, weight_decay=5e-4)
        for part in parts(steps):
            seconds += advance(model, optimizer, data, part, partial(rate, lr, STEPS), seed=seed)
            looks.append(accuracy(*predict(model, data)))
    return row | {"lowest": min(looks), "end": looks[-1], "seconds": seconds, "looks": looks}


def pull(model, spaces, clusters, data, setting: Setting, lr: float, seed: int, first: int, length: int):
    """One C-SGD phase of `length` steps with its cut at the collapse; None if no stable strength collapses in time."""
    within = round(setting.collapse_by * length)

    def lr_at(step: int) -> float:
        return rate(lr, length, step - first) * (setting.wide_lr if step - first < within else 1.0)

    def ramp_at(step: int) -> float:
        return ramp(step - first, length=within, shape=setting.ramp)

    here = range(first, first + length)
    rates, ramps = [lr_at(step) for step in here], [ramp_at(step) for step in here]
    strengths = [strength_to_collapse(rates, TOLERANCE, eta, ramp=ramps, within=within) for eta in (5e-4, 0.0)]
    if None in strengths:
        return None
    groups = csgd.param_groups(
        model,
        spaces,
        clusters,
        centri_strength=strengths[0],
        vector_ratio=strengths[1] / strengths[0],
        weight_decay=5e-4,
    )
    optimizer = CSGD(groups, lr)
    cut_step = max(
        collapse_step(forecast(rates, [e * r for r in ramps], eta), TOLERANCE)
        for e, eta in zip(strengths, (5e-4, 0.0), strict=True)
    )
    seconds, looks, result = 0.0, [], {}
    for part in parts(here, first + cut_step):
        seconds += advance(model, optimizer, data, part, lr_at, seed=seed, ramp_at=ramp_at)
        looks.append(accuracy(*predict(model, data)))
        if part.stop == first + cut_step:
            wide, labels = predict(model, data)
            csgd.trim(model, spaces, clusters, optimizer, tolerance=None)
            if setting.after_trim == "plain":
                optimizer.unscale()
            narrow, _ = predict(model, data)
            change = float(relative_change(wide, narrow).max())
            result = {"cut": accuracy(narrow, labels), "cut_step": cut_step, "relative_change": change}
    return result | {"seconds": seconds, "looks": looks}


def parts(steps: range, *cuts: int) -> list[range]:
    """`steps` in LOOKS parts, and at `cuts`."""
    stops = sorted({*range(steps.start, steps.stop, len(steps) // LOOKS), steps.stop, *cuts})
    return [range(a, b) for a, b in zip(stops, stops[1:], strict=False)]


def initialised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def run(seeds: int) -> None:
    torch.set_num_threads(1)
    done = {json.dumps(row["key"]) for row in rows()}
    for seed in range(seeds):
        for network in NETWORKS:
            for width in STAGES:
                for setting in settings(network):
                    key = {"network": network, "width": width, "seed": seed, **asdict(setting)}
                    if json.dumps(key) in done:
                        continue
                    row = {"key": key} | measure(network, width, seed, setting)
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(key, {k: v for k, v in row.items() if k not in ("key", "looks")}, flush=True)
        base.cache_clear()


def rows() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def report() -> None:
    """study_collapse.md and study_collapse.png, from the rows."""
    results = [row for row in rows() if row["key"]["seed"] in complete_seeds()]
    whole = grouped([row for row in results if row["key"]["of"] == "pacesetter"])
    residual = grouped([row for row in results if row["key"]["network"] == "resnet20"])
    sources = [(setting, members) for setting, members in residual if _is_plain_pull(setting)]
    unreachable = sorted({name(s) for s, members in whole if any("end" not in row for row in members)})
    text = [
        "# How gently should the filters collapse?",
        "",
        f"Generated by `python experiments/study_collapse.py report`: {len(results)} runs,"
        f" {len(complete_seeds())} seeds, {STEPS} steps of batch 32 each, torch {torch.__version__}, one CPU thread."
        " Accuracy in per cent of 360 test images, mean over networks, widths and seeds (± standard error);"
        f" base networks {percent(mean(results, 'before'))}. `s`: CPU seconds of training.",
        "",
        accuracies(whole),
        "",
        "No stable strength collapses in time: " + ("; ".join(unreachable) or "none") + ".",
        "",
        "## What is clustered: ResNet-20 alone, whose spaces have several producers",
        "",
        accuracies(sources),
        "",
    ]
    (HERE / "study_collapse.md").write_text("\n".join(text))
    draw(whole)


def grouped(results: list[dict]) -> list[tuple[Setting, list[dict]]]:
    """The rows of each setting, the best one at the end first."""
    groups = defaultdict(list)
    for row in results:
        groups[Setting(*(row["key"][field] for field in Setting.__dataclass_fields__))].append(row)
    return sorted(groups.items(), key=lambda group: -mean(group[1], "end"))


def _is_plain_pull(setting: Setting) -> bool:
    return setting == Setting(collapse_by=setting.collapse_by, of=setting.of)


def accuracies(groups: list[tuple[Setting, list[dict]]]) -> str:
    return accuracy_table([(name(setting), rows) for setting, rows in groups if all("end" in row for row in rows)])


def accuracy_table(groups: list[tuple[str, list[dict]]]) -> str:
    """A line a group: the lowest accuracy on the way, at the cut, at the end, the last also by network and width."""
    places = sorted({(row["key"]["network"], row["key"]["width"]) for _, members in groups for row in members})[::-1]
    header = ("", "at worst", "at the cut", "at the end", *(f"{n}, {w:g}" for n, w in places), "s", "n")
    lines = []
    for title, members in groups:
        each = [[r for r in members if (r["key"]["network"], r["key"]["width"]) == place] for place in places]
        error = statistics.stdev(row["end"] for row in members) / len(members) ** 0.5
        lines.append(
            (
                title,
                percent(mean(members, "lowest")),
                percent(mean(members, "cut")),
                f"{percent(mean(members, 'end'))} ± {100 * error:.1f}",
                *(percent(mean(at, "end")) for at in each),
                f"{mean(members, 'seconds'):.1f}",
                len(members),
            )
        )
    return table(header, lines)


def complete_seeds() -> set[int]:
    """The seeds of which every setting was run."""
    wanted = len(STAGES) * sum(len(settings(network)) for network in NETWORKS)
    counts = defaultdict(int)
    for row in rows():
        counts[row["key"]["seed"]] += 1
    return {seed for seed, count in counts.items() if count == wanted}


def mean(members: list[dict], key: str) -> float:
    values = [row[key] for row in members if row.get(key) is not None]
    return statistics.fmean(values) if values else float("nan")


def percent(value: float) -> str:
    return "" if value != value else f"{100 * value:.1f}"


def name(setting: Setting) -> str:
    if setting.method == "csgd":
        changed = {"wide_lr": 1.0, "of": "pacesetter", "after_trim": "same_run"}
        extra = [f"{key}={getattr(setting, key)}" for key, usual in changed.items() if getattr(setting, key) != usual]
        return ", ".join([f"{setting.ramp} by {setting.collapse_by:.0%}", *extra])
    return {
        "staged": "three stages, constant by 50%",
        "one_shot": "one-shot merging, fine-tuning",
        "scratch": "narrow from scratch, twice the steps",
    }[setting.method]


def draw(cells) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = [(shape, 1.0, f"{shape}") for shape in RAMPS] + [("cosine", 0.3, "cosine, lr × 0.3 until the cut")]
    for shape, wide_lr, label in curves:
        line = {
            s.collapse_by: m for s, m in cells if s == Setting(ramp=shape, collapse_by=s.collapse_by, wide_lr=wide_lr)
        }
        line = {by: m for by, m in sorted(line.items()) if all("end" in row for row in m)}
        left.plot(list(line), [100 * mean(m, "cut") for m in line.values()], "o-", label=label)
        right.plot([mean(m, "seconds") for m in line.values()], [100 * mean(m, "end") for m in line.values()], "o-")
    for setting, members in cells:
        if setting.method != "csgd":
            right.plot(mean(members, "seconds"), 100 * mean(members, "end"), "k^")
            right.annotate(
                name(setting).split(",")[0],
                (mean(members, "seconds"), 100 * mean(members, "end")),
                xytext=(0, 7),
                ha="center",
                textcoords="offset points",
                fontsize=8,
            )
    left.set(
        xlabel="collapse by, fraction of the run", ylabel="test accuracy at the cut, %", title="Accuracy at the cut"
    )
    right.set(xlabel="CPU seconds of training", ylabel="test accuracy at the end, %", title="Accuracy at the end")
    figure.legend(loc="outside lower center", ncol=5, frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "study_collapse.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.action == "run":
        run(arguments.seeds)
    else:
        report()


if __name__ == "__main__":
    main()
