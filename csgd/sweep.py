"""python -m csgd.sweep multirun/2026-01-31/12-00-00

A sweep, read back from the folders of its jobs: sweep.csv, sweep.md and pictures, whichever launcher ran them, and also
of a sweep that was killed.
"""

import argparse
import csv
import json
import logging
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from csgd.errors import line_of
from csgd.folder import RunFolder, Status
from csgd.report import baseline_note, table, task_of, tested_on

log = logging.getLogger("csgd")

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")
UNFINISHED = {
    Status.RUNNING: "it is still running",
    Status.KILLED: "it was killed",
    Status.PLANNED: "nothing was trained (plan_only=true)",
}


@dataclass(frozen=True)
class Job:
    """One job: its folder, what sets it apart from the others, and its summary if it came to its end.

    status  lossless | not lossless | rival (not meant to be) | failed | running | killed | planned
    """

    folder: Path
    settings: dict[str, str]
    status: str
    failure: str
    summary: dict[str, Any] | None

    def without(self, *keys: str) -> str:
        """Its settings as a label, but for those of some keys and what is below them."""
        kept = {key: value for key, value in self.settings.items() if key.split(".")[0] not in keys}
        return ", ".join(f"{key}={value}" for key, value in kept.items())


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 if a job has not come to its end, or if there is none."""
    parser = argparse.ArgumentParser(prog="python -m csgd.sweep", description="Makes the tables of a sweep.")
    parser.add_argument("folder", type=Path, help="of the sweep: hydra.sweep.dir")
    folder = parser.parse_args(arguments).folder
    if not read_jobs(folder):
        print(f"error: '{folder}' holds no job of a sweep", file=sys.stderr)
        return 2
    text, complete = conclude(folder)
    print(text)
    return 0 if complete else 2


def conclude(sweep_dir: Path) -> tuple[str, bool]:
    """Writes tables and pictures; what there is to say on the terminal, and whether every job has come to its end."""
    jobs = read_jobs(sweep_dir)
    said = [leave(sweep_dir, jobs), "", f"files: {sweep_dir}/sweep.csv, sweep.md, *.png"]
    if any(sweep_dir.glob("*/wandb/offline-run-*")):
        said.append(f"W&B, offline: upload every run with `wandb sync {sweep_dir}/*/wandb/offline-run-*`")
    complete = not any(job.status in (Status.FAILED, Status.RUNNING, Status.KILLED) for job in jobs)
    if not complete:
        said.append(f"what is missing or failed runs again with the same command and hydra.sweep.dir={sweep_dir}")
    return "\n".join(said), complete


def read_jobs(sweep_dir: Path) -> list[Job]:
    """The jobs that have begun, in their order."""
    folders = sorted((path.parent.parent for path in sweep_dir.glob("*/.hydra/overrides.yaml")), key=_place)
    overrides = [_overrides(folder) for folder in folders]
    keys = dict.fromkeys(key for one in overrides for key in one)
    swept = [key for key in keys if len({one.get(key) for one in overrides}) > 1]
    return [
        _job(folder, {key: one[key] for key in swept if key in one})
        for folder, one in zip(folders, overrides, strict=True)
    ]


def _place(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdigit() else 0, folder.name)


def _overrides(folder: Path) -> dict[str, str]:
    import yaml

    lines = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text("utf-8"))
    pairs = (line.lstrip("+~").partition("=") for line in lines)
    return {key: value.strip("'\"") for key, _, value in pairs}


def _job(folder: Path, settings: dict[str, str]) -> Job:
    left = RunFolder(folder)
    status = left.status()
    if status is Status.FINISHED:
        summary = left.read_summary()
        told = "lossless" if summary["verdict"]["lossless"] else "not lossless" if summary["way"]["pulls"] else "rival"
        return Job(folder, settings, told, "", summary)
    failure = left.failure.read_text("utf-8").strip() if status is Status.FAILED else UNFINISHED[status]
    return Job(folder, settings, str(status), failure, None)


def leave(sweep_dir: Path, jobs: list[Job]) -> str:
    """Writes sweep.csv, sweep.md and the pictures into the sweep's folder; the tables, as text for the terminal."""
    write_csv(sweep_dir / "sweep.csv", jobs)
    tables = []
    if any("seed" in job.settings for job in finished(jobs)):
        tables.append(means_table(jobs))
    tables += dict.fromkeys(baseline_note(job.summary) for job in finished(jobs))
    tables += [f"job {job.folder.name} {job.status}: {job.failure}" for job in jobs if job.failure]
    text, drawn = "\n\n".join([jobs_table(jobs), *tables]), []
    try:
        drawn = draw(sweep_dir, jobs)
    except Exception as error:  # a picture never loses a sweep
        log.warning("the pictures could not be drawn: %s", line_of(error))
    origin = {key: summary[key] for summary in (job.summary for job in finished(jobs)) for key in ("device", "commit")}
    facts = [f"{len(jobs)} jobs", *(str(fact) for fact in origin.values() if fact)]
    images = "".join(f"\n![{path.stem.replace('_', ' ')}]({path.name})\n" for path in drawn)
    told = "\n\n".join([f"# {sweep_dir.name}", ", ".join(facts), jobs_table(jobs, linked=True), *tables])
    (sweep_dir / "sweep.md").write_text(f"{told}\n{images}", "utf-8")
    return text


def finished(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if job.summary]


def jobs_table(jobs: list[Job], linked: bool = False) -> str:
    """Every job with its cut, as a table; linked  to its report, or else to its folder"""
    keys = dict.fromkeys(key for job in jobs for key in job.settings)
    tuned = any("tuned" in job.summary for job in finished(jobs))
    header = (
        "job",
        *keys,
        *(("rate (trials)",) if tuned else ()),
        "cut",
        "base",
        _score(jobs),
        "MACs",
        "saved",
        "change",
        "deviation",
        "seconds",
    )
    rows = []
    for job in jobs:
        row = [_link(job) if linked else job.folder.name, *(job.settings.get(key, "-") for key in keys)]
        row += [*([_rate(job)] if tuned else []), job.status]
        if job.summary:
            verdict, cost = job.summary["verdict"], job.summary["cost"]
            row += [f"{job.summary['base']['accuracy']:.4f}", f"{verdict['accuracy']:.4f}", f"{cost['macs_after']:,}"]
            row += [f"{1 - cost['macs_after'] / cost['macs_before']:.1%}", f"{verdict['relative_logit_change']:.1e}"]
            row += [f"{verdict['relative_deviation']:.1e}", f"{job.summary['seconds']['total']:.0f}"]
        rows.append(row + ["-"] * (len(header) - len(row)))
    return table(header, rows)


def _rate(job: Job) -> str:
    """The learning rate that trials gave, and how many."""
    tuned = (job.summary or {}).get("tuned")
    return f"{tuned['lr']:g} ({len(tuned['trials'])})" if tuned else "-"


def _link(job: Job) -> str:
    name, page = job.folder.name, RunFolder(job.folder).page
    return f"[{name}]({name}/{page.name if page.exists() else ''})"


def means_table(jobs: list[Job]) -> str:
    """Scores over the seeds: mean, standard deviation and number, as a table."""
    rows = []
    for label, group in grouped(finished(jobs), "seed").items():
        base, final = ([job.summary[a][b] for job in group] for a, b in (("base", "accuracy"), ("verdict", "accuracy")))
        lossless = sum(job.status == "lossless" for job in group)
        rows.append((label or "all", _spread(base), _spread(final), len(group), lossless))
    return table(("mean over seeds", "base", _score(jobs), "n", "lossless"), rows)


def _score(jobs: list[Job]) -> str:
    """What is told as accuracy; with the images that it is of where some were held out."""
    return _score_of(jobs).removeprefix("test ")


def _score_of(jobs: list[Job]) -> str:
    summaries = [job.summary for job in finished(jobs)]
    images = sorted({tested_on(summary) for summary in summaries}) or ["test"]
    return f"{' or '.join(images)} {task_of(next(iter(summaries), {}))['score'].replace('_', ' ')}"


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {_std(values):.4f}" if len(values) > 1 else "")


def _std(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def grouped(jobs: Iterable[Job], *keys: str) -> dict[str, list[Job]]:
    """The jobs that differ in nothing but `keys`, together."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.without(*keys), []).append(job)
    return groups


def write_csv(path: Path, jobs: list[Job]) -> None:
    """A line a job, with every number of its verdict and its cost."""
    rows = []
    for job in jobs:
        row = {"job": job.folder.name, **job.settings, "status": job.status, "failure": job.failure}
        if summary := job.summary:
            row |= {"base_accuracy": summary["base"]["accuracy"], **summary["verdict"], **summary["cost"]}
            row |= {f"strength_{group}": strength for group, strength in summary["strengths"].items()}
            row |= (
                {"lr": summary["tuned"]["lr"], "trials": len(summary["tuned"]["trials"])} if "tuned" in summary else {}
            )
            row |= {"cut_step": summary["cut"]["step"], "seconds": summary["seconds"]["total"]}
        rows.append(row)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)


def draw(sweep_dir: Path, jobs: list[Job]) -> list[Path]:
    """Accuracy against MACs, accuracy against strength where that was swept, deviation over steps."""
    done = finished(jobs)
    together = [job for job in done if job.summary["way"]["pulls"]]
    pulled = [job for job in together if job.summary["strengths"]]
    pictures: dict[str, tuple] = {"accuracy_macs": (_accuracy_macs, done), "deviation": (_deviation, together)}
    drawn = [_picture(sweep_dir / f"{name}.png", of, shown) for name, (of, shown) in pictures.items() if shown]
    if len({_strength(job) for job in pulled}) > 1:  # the others were pulled along a curve
        drawn.append(_picture(sweep_dir / "accuracy_strength.png", _accuracy_strength, pulled))
    return drawn


def _picture(path: Path, of: Callable, jobs: list[Job]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    of(axes, jobs)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    entries = len(axes.get_legend_handles_labels()[0])
    figure.set_figheight(4.3 + 0.22 * math.ceil(entries / 2))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
    return path


def _accuracy_macs(axes: Any, jobs: list[Job]) -> None:
    _accuracies(axes, jobs, ("seed", "deps"), lambda job: job.summary["cost"]["macs_after"] / 1e6)
    dense = [(macs / 1e6, mean(accuracies)) for (_, macs), accuracies in _bases(jobs).items()]
    for number, place in enumerate(dense):
        label = "base, not cut" if number == 0 else None
        axes.scatter(*place, marker="*", s=110, color="tab:gray", zorder=3, label=label)
    axes.set(xlabel="million multiply-accumulates of what is left", title=f"{_score(jobs).capitalize()} against cost")


def _accuracy_strength(axes: Any, jobs: list[Job]) -> None:
    _accuracies(axes, jobs, ("seed", "centri_strength"), _strength)
    strengths = sorted({_strength(job) for job in jobs})
    positive = next(strength for strength in strengths if strength > 0)
    axes.set_xscale("symlog", linthresh=positive) if strengths[0] == 0 else axes.set_xscale("log")
    if len(strengths) <= 9:
        axes.set_xticks(strengths, [f"{strength:.3g}" for strength in strengths])
        axes.minorticks_off()
    title = f"{_score(jobs).capitalize()} against centripetal strength"
    axes.set(xlabel="centripetal strength ε", title=title)


def _strength(job: Job) -> float:
    """ε of the kernels, of which that of other parameters is a multiple; or of what else there is."""
    strengths = job.summary["strengths"]
    return strengths.get("kernels", max(strengths.values()))


def _accuracies(axes: Any, jobs: list[Job], within: Sequence[str], at: Callable[[Job], float]) -> None:
    """A line for the jobs that differ in nothing but `within`, through means over seeds; each base network as a line.

    Filled points are lossless, in every seed; hollow ones are not.  Lines are moved apart by a few pixels.
    """
    from matplotlib.transforms import ScaledTranslation

    for number, ((label, _), accuracies) in enumerate(_bases(jobs).items()):
        middle, spread = mean(accuracies), _std(accuracies)
        axes.axhline(middle, color="tab:gray", linestyle=("--", ":", "-.")[number % 3], label=label)
        axes.axhspan(middle - spread, middle + spread, color="tab:gray", alpha=0.12, linewidth=0)
    lines = grouped(jobs, *within)
    for number, (label, series) in enumerate(lines.items()):
        inches = (number - (len(lines) - 1) / 2) / max(12, 4 * len(lines))
        aside = axes.transData + ScaledTranslation(inches, 0, axes.figure.dpi_scale_trans)
        color, points = COLORS[number % len(COLORS)], []
        for group in grouped(series, "seed").values():
            accuracies = [job.summary["verdict"]["accuracy"] for job in group]
            lossless = all(job.status == "lossless" for job in group)
            points.append((mean(map(at, group)), mean(accuracies), _std(accuracies), lossless))
        points.sort()
        x, y, spread, lossless = zip(*points, strict=True)
        axes.errorbar(x, y, spread, color=color, capsize=4, linewidth=1.4, label=label or "csgd", transform=aside)
        for sign in (-1, 1):  # the limits of the axes do not follow what is drawn aside
            axes.update_datalim([(at_x, at_y + sign * std) for at_x, at_y, std in zip(x, y, spread, strict=True)])
        faces = [color if one else "white" for one in lossless]
        axes.scatter(x, y, s=42, zorder=3, edgecolors=color, facecolors=faces, transform=aside)
    if any(job.status != "lossless" for job in jobs):
        axes.scatter([], [], s=42, edgecolors="black", facecolors="white", label="not lossless")
    axes.autoscale_view()
    axes.margins(0.08)
    axes.set(ylabel=_score_of(jobs))


def _bases(jobs: list[Job]) -> dict[tuple[str, int], list[float]]:
    """The accuracies of the base networks over their seeds, under what all jobs on such a base have in common, and its
    MACs."""
    sources: dict[str, list[Job]] = {}
    for job in (job for job in jobs if job.summary["way"]["trained"]):
        sources.setdefault(job.summary["base"]["source"], []).append(job)
    accuracies: dict[tuple[str, int], list[float]] = {}
    for first, *others in sources.values():
        common = [f"{k}={v}" for k, v in first.settings.items() if all(job.settings.get(k) == v for job in others)]
        label = ", ".join(["base", *(one for one in common if not one.startswith("seed="))])
        macs = first.summary["cost"]["macs_before"]
        accuracies.setdefault((label, macs), []).append(first.summary["base"]["accuracy"])
    return accuracies


def _deviation(axes: Any, jobs: list[Job]) -> None:
    """What is left of the deviation: the forecast of the first seed as a line, what every seed measured as points."""
    lowest = math.inf
    for number, (label, series) in enumerate(grouped(jobs, "seed", "deps").items()):
        color, name = COLORS[number % len(COLORS)], label or "csgd"
        for job in series:
            first, rows, foremost = 0, _rows(job), job in [group[0] for group in grouped(series, "seed").values()]
            for stage, told in enumerate(job.summary["stages"], 1):
                group, curve = next(iter(told["forecast"]["curves"].items()))
                here = [row for row in rows if row.get("stage") == stage and row.get(f"left/{group}", 0) > 0]
                if foremost:
                    steps, expected = zip(*curve, strict=True)
                    steps = [first + step for step in steps]
                    axes.plot(steps, expected, color=color, linewidth=1.2, alpha=0.7, label=name)
                    name = None
                measured = [row[f"left/{group}"] for row in here]
                axes.scatter([first + row["step"] for row in here], measured, s=14, color=color, zorder=3)
                lowest = min([lowest, *measured])
                first += told["forecast"]["steps"]
    axes.scatter([], [], s=14, color="black", label="measured")
    axes.plot([], [], color="black", linewidth=1.2, alpha=0.7, label="forecast")
    axes.set(xlabel="C-SGD step", ylabel="of its start", title="What is left of the deviation ‖W − ΓW‖", yscale="log")
    if lowest < math.inf:
        axes.set_ylim(bottom=lowest / 10)


def _rows(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text("utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())
