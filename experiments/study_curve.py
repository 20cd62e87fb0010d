"""When should a Collapse have made the filters equal, and along which curve?  Accuracy at the cut and at the end.

    OMP_NUM_THREADS=1 python experiments/study_curve.py run        adds what is missing to study_curve.jsonl
    OMP_NUM_THREADS=1 python experiments/study_curve.py report     the table

Networks, widths, data, schedule and seeds of study_collapse.py, whose rows of the published pull stand beside these.
Settings differ in

    curve        along which the deviation falls
    collapse_by  fraction of the run after which filters are equal, and are cut
    optimizer    sgd, or adamw at the base network's learning rate
    after_trim   the rescaled gradients of fact F7 (same_run), or plain SGD
"""

import argparse
import copy
import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import study_collapse
import torch
from study_collapse import NETWORKS, STAGES, STEPS, accuracy_table, advance, base, mean, parts, rate

import csgd
from csgd.carry_over import unscale
from csgd.train import accuracy, predict
from csgd.verify import relative_change

HERE = Path(__file__).parent
RESULTS = HERE / "study_curve.jsonl"
COLLAPSE_BY = (0.15, 0.3, 0.5, 0.75)
PLACES = [(network, width) for network in NETWORKS for width in STAGES]


@dataclass(frozen=True)
class Setting:
    curve: str = "cosine"
    collapse_by: float = 0.5
    optimizer: str = "sgd"
    after_trim: str = "same_run"

    def __str__(self) -> str:
        after = ", plain after the cut" if self.after_trim == "plain" else ""
        return f"{self.optimizer}, {self.curve} by {self.collapse_by:.0%}{after}"


SETTINGS = [
    *(Setting(curve, by) for curve in ("cosine", "linear") for by in COLLAPSE_BY),
    *(Setting(collapse_by=by, after_trim="plain") for by in COLLAPSE_BY),
    *(Setting(collapse_by=by, optimizer="adamw") for by in COLLAPSE_BY),
]


def measure(network: str, width: float, seed: int, setting: Setting) -> dict:
    data, trained_base, _ = base(network, seed)
    model, kind = copy.deepcopy(trained_base), NETWORKS[network]
    if setting.optimizer == "sgd":
        lr, optimizer = kind.lr, torch.optim.SGD(model.parameters(), kind.lr, 0.9, nesterov=True, weight_decay=5e-4)
    else:
        lr, optimizer = kind.base_lr, torch.optim.AdamW(model.parameters(), kind.base_lr, weight_decay=5e-4)
    spaces = csgd.find_spaces(model, data.example, trial=False)
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, width), seed=seed)
    stop = round(setting.collapse_by * STEPS)
    csgd.Collapse(optimizer, model, spaces, clusters, stop=stop, curve=setting.curve)
    row, looks = {"before": accuracy(*predict(model, data)), "seconds": 0.0}, []
    for part in parts(range(STEPS), stop):
        row["seconds"] += advance(model, optimizer, data, part, partial(rate, lr, STEPS), seed=seed)
        looks.append(accuracy(*predict(model, data)))
        if part.stop == stop:
            wide, labels = predict(model, data)
            csgd.trim(model, spaces, clusters, optimizer, tolerance=0.0)
            if setting.after_trim == "plain":
                unscale(optimizer)
            narrow, _ = predict(model, data)
            row |= {"cut": accuracy(narrow, labels), "relative_change": float(relative_change(wide, narrow).max())}
    return row | {"lowest": min(looks), "end": looks[-1], "looks": looks}


def run(seeds: int) -> None:
    torch.set_num_threads(1)
    done = {json.dumps(row["key"]) for row in rows()}
    for seed in range(seeds):
        for network, width in PLACES:
            for setting in SETTINGS:
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
    """study_curve.md, from the rows of seeds that are whole, and those of the published pull on the same seeds."""
    counts = defaultdict(int)
    for row in rows():
        counts[row["key"]["seed"]] += 1
    seeds = {seed for seed, count in counts.items() if count == len(PLACES) * len(SETTINGS)}
    groups = defaultdict(list)
    for row in rows():
        if row["key"]["seed"] in seeds:
            groups[str(Setting(*(row["key"][field] for field in Setting.__dataclass_fields__)))].append(row)
    for row in study_collapse.rows():
        key = {k: v for k, v in row["key"].items() if k not in ("network", "width", "seed")}
        setting = study_collapse.Setting(**key)
        usual = study_collapse.Setting(ramp="cosine", collapse_by=setting.collapse_by)
        if setting == usual and row["key"]["seed"] in seeds and "end" in row:
            groups[f"as published, cosine by {setting.collapse_by:.0%}"].append(row)
    text = [
        "# When should the filters be equal?",
        "",
        f"Generated by `python experiments/study_curve.py report`: {sum(map(len, groups.values()))} runs,"
        f" {len(seeds)} seeds, {STEPS} steps of batch 32 each, torch {torch.__version__}, one CPU thread. Accuracy in"
        " per cent of 360 test images, mean over networks, widths and seeds (± standard error). `s`: CPU seconds of"
        " training, on a machine with other work; the published pull's were measured earlier.",
        "",
        accuracy_table(sorted(groups.items(), key=lambda group: -mean(group[1], "end"))),
        "",
    ]
    (HERE / "study_curve.md").write_text("\n".join(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    run(arguments.seeds) if arguments.action == "run" else report()


if __name__ == "__main__":
    main()
