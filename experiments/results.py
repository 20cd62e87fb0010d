"""docs/results.md, from the rows that studies and benchmarks have left: python experiments/results.py

The page holds nothing that is not in a committed file; `tests/test_docs.py` compares the two.
"""

import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results.md"
sys.path[:0] = [str(HERE.parent), str(HERE / "bench")]

import study_ways  # noqa: E402
from ratios import sentence  # noqa: E402

from csgd.report import table  # noqa: E402

Row = dict[str, Any]

MAIN_JOB = {
    "": "Collapse beside AdamW, the default",
    "schedule.csgd.optimizer=sgd": "Collapse beside SGD",
    "centri_strength=auto": "as published, ε solved for",
}
VARIED = {
    "kernels": "{way}, k-means on kernels",
    "importance": "deleted, {more}",
    "sgd": "csgd, beside SGD at {lr}",
    "published": "the pull as published, ε solved for, SGD at {lr}",
}
STANDARD = {
    "csgd": "csgd, AdamW, k-means on outputs",
    "merge": "merged at once, on outputs",
    "prune": "deleted, group L2",
}
WAYS_SUMMARY = """What to use when, as the rows below say:

- *Right after the cut* `csgd` is ahead in every network and at every width, and far but for a ConvNeXt at 3/4: at half
  of the widths and with few images it is 2 to 8 points below its base network, where merging in one stroke loses 13 to
  66 and deletion 17 to 67.
- *At the end, with few images*, `csgd` that is cut early ends, at every width of each network, at most 1.6 points below
  the best of what starts from the same trained network, and in four of nine cases above all of it. Cut when half of its
  steps are done, the default, it is level at 3/4, up to 1.3 behind at a half and 2 to 4 at a quarter: half of its steps
  are wide ones, for whose cost a rival takes 2.4 and 7.6 times as many narrow ones
  ([how early to cut](#how-early-to-cut-at-one-cost)). A deletion without norm ends 4 behind at 3/4.
- *From scratch*, for the cost of the base network too, ends 1 to 2 points above the rest without norm and in a narrow
  ConvNeXt, and below it in the ResNet and a wide ConvNeXt.
- *With all images* the base networks had one epoch and all were still learning: who trains the narrow network for
  longest ends highest, from scratch first, `csgd` last, 1 to 12 points behind a deletion or a merge.
- So: `csgd` where the network must be right at every moment, the cut be proven, or little training can follow, and cut
  early where much follows; the same clusters merged at once, or a deletion, where only the end counts; from scratch
  where there are data and time."""
OTHER_WAYS = {
    "scratch": "narrow from scratch, twice the steps",
    "one_shot": "one-shot merging, fine-tuning",
    "staged": "three stages, constant by 50 %",
}
LENET = {
    "deleted": "deleted by L1",
    "neuron merging": "Neuron Merging, repeated",
    "kernels": "`of=pacesetter`, merged",
    "outputs": "`of=outputs`, merged",
}
LENET_PUBLISHED = {"deleted by L1": (88.40, 85.17, 71.26, 66.76), "Neuron Merging": (88.69, 86.92, 82.75, 80.02)}
COMPARED = {
    "kmeans": "identical: k-means on kernels",
    "even": "identical: even clusters",
    "imbalanced": "identical: one large cluster",
    "zeroed": "zeroed out: the smallest by L1",
    "redundant": "redundant, even clusters from the first step",
    "narrow": "narrow from the first step",
}


def page() -> str:
    runs = (ways, cuts, rates, variations, allotments, lenet, papers)
    jobs = (main_job, front, rivals, curves, ramps, one_stroke)
    costs = (step, step_beside, training_step, latency, memory, clusters, spaces, growth, loading)
    return "\n\n".join([HEAD, *(part() for part in (*runs, *jobs, *costs))]) + "\n"


HEAD = """# Results

<!-- Made by `python experiments/results.py` from committed rows; edits here are lost. -->

Everything on this page was measured on a CPU of two cores, and is made from the rows that lie in `experiments/`. Each
table says how often (n), how far apart (least … most, quartiles, or ± a standard error), with which commit and by which
command. Data are scikit-learn's digits unless another is named: 1,437 images to train on and 360 to test, so that one
image is 0.0028 of an accuracy. What is said here holds for small networks on a small dataset."""


def ways() -> str:
    rows, known = study_ways.compared(), list(study_ways.TOLD)
    body, after = [], []
    for (network, images, width), members in grouped(rows, at("network", "images", "width")).items():
        of = grouped(members, lambda row: row["way"])
        place = study_ways.NAMES[network], f"{int(images):,}", width.replace("_", "/")
        (macs,) = {round(100 * row["macs"]) for row in members}
        base = spread([100 * row["base"] for row in of["csgd"]], ".1f")
        ends = [percent(of.get(way, []), "end") for way in known]
        body.append((*place, f"{macs} %", base, *ends, "/".join(str(len(of.get(way, []))) for way in known)))
        after.append((*place, base, *(percent(of.get(way, []), "after_cut") for way in known[:-1])))
    (torch,), commits = common(rows, "torch"), " and ".join(sorted({f"`{row['commit'][:7]}`" for row in rows}))
    trials = [row for row in lines(HERE / "study_ways.jsonl") if row["study"] == "trial"]
    tuned = []
    for (network, images), members in grouped(trials, at("network", "images")).items():
        of = grouped(members, lambda row: row["way"])
        told = [", ".join(f"{100 * row['end']:.1f}" for row in of.get(way, [])) for way in study_ways.WAYS]
        tuned.append((study_ways.NAMES[network], f"{int(images):,}", *told))
    about = f"""Fashion-MNIST, test accuracy in per cent at the last epoch: mean (least … most) of n seeds. All have
the same base networks, channel spaces and widths, and the training cost of the C-SGD run in multiply-accumulates, what
choosing takes included; from scratch also the base network's, with weights drawn as the commit of its row drew them:
with 512 images those of the wide network, spread by the root of its inputs over those left, with 60,000 by the rule of
each layer. `csgd` cuts when half of its steps are done; *cut early*
at 15 % of a run that is as much longer as its narrow steps are cheaper. `csgd` and `merge` cluster by outputs, the
deletion is of the channels of least group L2. Commits {commits}, torch {torch}, one thread; every row of
`experiments/study_ways.jsonl` holds its command, `python experiments/study_ways.py run`, and `early`, make them."""
    rates = ", ".join(f"{rate:g}" for rate in study_ways.RATES)
    picture = "![accuracy after the cut and at the end against the width](../experiments/study_ways.png)"
    header, ways = ("network", "images", "widths"), list(study_ways.TOLD.values())
    return section(
        "Four ways at one cost",
        WAYS_SUMMARY,
        picture,
        about,
        "At the end:",
        table((*header, "MACs", "base", *ways, "n"), body),
        "Right after the cut, before any training behind it:",
        table((*header, "base", *ways[:-1]), after),
        f"Trials: the score on images held out, with the rates {rates}; seed 0, half of the widths.",
        table(("network", "images", *(study_ways.TOLD[way] for way in study_ways.WAYS)), tuned),
    )


def rates() -> str:
    rows = [row for row in lines(HERE / "study_ways.jsonl") if row["study"] == "rates"]
    body = []
    for (network, way), members in grouped(rows, at("network", "way")).items():
        of = grouped(members, lambda row: row["lr"])
        means = [statistics.fmean(100 * row["end"] for row in of[lr]) for lr in sorted(of)]
        told = [percent(of.get(lr, []), "end") for lr in study_ways.MORE_RATES]
        body.append((study_ways.NAMES[network], study_ways.TOLD[way], *told, f"{max(means) - min(means):.1f}"))
    header = ("network", "way", *(f"{rate:g}" for rate in study_ways.MORE_RATES), "apart")
    seeds = sorted({row["seed"] for row in rows})
    about = f"""512 images, half of the widths, at the end, by learning rate (AdamW); n = {len(seeds)} seeds. *apart* is
the best mean less the worst: what one has to tune, for csgd as much as for the others. Made by `python
experiments/study_ways.py more --images 512`."""
    return section("How much hangs on the learning rate", about, table(header, body))


def variations() -> str:
    everything = lines(HERE / "study_ways.jsonl")
    usual = [row for row in everything if row["study"] == "ways" and (row["images"], row["width"]) == ("512", "1_2")]
    rows = [row for row in everything if row["study"] in VARIED and "failure" not in row]
    body = []
    for network, members in grouped(usual, lambda row: row["network"]).items():
        if not any(row["network"] == network for row in rows):
            continue
        for way in ("csgd", "merge", "prune"):
            of = [row for row in members if row["way"] == way]
            body.append(
                (study_ways.NAMES[network], STANDARD[way], percent(of, "after_cut"), percent(of, "end"), len(of))
            )
        varied = [row for row in rows if row["network"] == network]
        for (study, way, lr, more), of in grouped(varied, at("study", "way", "lr", "more")).items():
            told = VARIED[study].format(way=study_ways.TOLD[way], lr=f"{lr:g}", more=more.split()[-1])
            body.append((study_ways.NAMES[network], told, percent(of, "after_cut"), percent(of, "end"), len(of)))
    about = """512 images, half of the widths; the rates are the tuned ones of each way, of SGD each that was tried.
Mean (least … most), by the same command as above."""
    return section("One thing varied", about, table(("network", "", "after the cut", "at the end", "n"), body))


def cuts() -> str:
    rows = [row for row in lines(HERE / "study_ways.jsonl") if row["images"] == "512"]
    rows = [row for row in rows if row["study"] == "early" or (row["study"], row["way"]) == ("ways", "csgd")]
    body = []
    for (network, width), members in grouped(rows, at("network", "width")).items():
        of = grouped(members, lambda row: row["more"].partition("collapse_by=")[2] or "0.5")
        told = [percent(of.get(by, []), key) for key in ("after_cut", "end") for by in ("0.5", "0.15", "0.05")]
        counts = "/".join(str(len(of.get(by, []))) for by in ("0.5", "0.15", "0.05"))
        body.append((study_ways.NAMES[network], width.replace("_", "/"), *told, counts))
    about = """512 images, `collapse_by=0.5` (the default), 0.15 and 0.05, each as long as the cost of the first allows:
at a quarter of the widths 20, about 50 and about 90 epochs. The learning rate is that tuned for the first. Mean (least
… most) of n seeds. Made by `python experiments/study_ways.py early --images 512`."""
    header = [f"{when}, {by}" for when in ("after the cut", "at the end") for by in ("0.5", "0.15", "0.05")]
    return section("How early to cut, at one cost", about, table(("network", "widths", *header, "n"), body))


def allotments() -> str:
    rows = [row for row in lines(HERE / "study_ways.jsonl") if row["study"] == "allot"]
    body = []
    for (network, width, way), members in grouped(rows, at("network", "width", "way")).items():
        of = grouped(members, lambda row: row["more"].removeprefix("deps.allot="))
        told = [percent(of.get(how, []), key) for how in ("uniform", "sensitivity") for key in ("after_cut", "end")]
        counts = "/".join(str(len(of.get(how, []))) for how in ("uniform", "sensitivity"))
        body.append((study_ways.NAMES[network], width.removeprefix("macs="), study_ways.TOLD[way], *told, counts))
    about = """512 images, a budget of multiply-accumulates (`deps.macs`), met by one fraction of all widths (`uniform`,
the default) or by what each layer can spare (`deps.allot=sensitivity`); test accuracy in per cent, mean (least … most)
of n seeds. Neither is ahead in all three networks, so the simpler one is the default. Made by `python
experiments/study_ways.py allot --images 512`."""
    how = ("uniform: after the cut", "at the end", "sensitivity: after the cut", "at the end")
    header = ("network", "MACs", "way", *how)
    return section("A budget, shared in two ways", about, table((*header, "n"), body))


def percent(rows: Sequence[Row], key: str) -> str:
    return spread([100 * row[key] for row in rows], ".1f") if rows else ""


def at(*keys: str) -> Callable[[Row], tuple]:
    return lambda row: tuple(row[key] for key in keys)


def main_job() -> str:
    rows = lines(HERE / "main_job.jsonl")
    body = []
    for overrides, members in grouped(rows, lambda row: row["overrides"]).items():
        (cut, of), (base,) = common(members, "cut_step", "steps"), common(members, "base_steps")
        accuracies = [spread([row[key] for row in members], ".4f") for key in ("base", "after_cut", "end")]
        worst = max(row["relative_logit_change"] for row in members)
        lossless = f"{sum(row['lossless'] for row in members)} of {len(members)}"
        body.append((MAIN_JOB[overrides], *accuracies, f"{worst:.1e}", lossless, f"{cut} of {of}", base))
    header = ("pull", "base", "at the cut", "at the end", "logit change", "lossless", "cut at step", "base steps")
    commit, torch, threads = common(rows, "commit", "torch", "threads")
    overrides = ", ".join(f"`{one}`" for one in MAIN_JOB if one)
    about = f"""`python run.py model=vgg16 deps=5_8 seed=0` … `4`, with {overrides} or nothing more. Mean (least …
most) of n = {len(members)} seeds; the change is that of the worst image and seed, over the spread of that
image's outputs. What the end gains over the base it gains by being trained on. Commit `{commit[:7]}`, torch {torch},
{threads} thread."""
    picture = "![accuracy, loss, deviation beside its forecast, and the cost of a step](../experiments/main_job.png)"
    return section("The main job", table(header, body), about, picture)


def front() -> str:
    rows = lines(HERE / "front.jsonl")
    of = grouped(rows, lambda row: row["way"])
    end = {way: spread([row["accuracies"][-1][1] for row in members], ".4f") for way, members in of.items()}
    body = [("the base network of both", "", "", end["base"], len(of["base"]))]
    for way, told in (("csgd", "csgd"), ("deletion", "filters of least norm deleted")):
        around = [spread([row["cut"][key] for row in of[way]], ".4f") for key in ("before", "after")]
        body.append((told, *around, end[way], len(of[way])))
    command, commit, torch, threads = common(rows, "command", "commit", "torch", "threads")
    about = f"""Mean (least … most) over seeds. Both have the same base networks, widths, epochs, optimizer, rates and
batches; the deletion is at the first step, csgd's cut in the middle. Commit `{commit[:7]}`, torch {torch}, {threads}
thread: `{command}`."""
    picture = "![filters that become one, and both accuracies from step to step](../experiments/front.png)"
    header = ("way", "before the cut", "after the cut", "at the end", "n")
    return section("The main job beside a deletion", table(header, body), about, picture)


def rivals() -> str:
    facts = bench("pruned_model")
    body = []
    for (network, way), members in grouped(facts["rows"], lambda row: (row["network"], row["way"])).items():
        forms = (("seconds", ".0f"), ("after_cut", ".4f"), ("at_end", ".4f"))
        told = [spread([row[key] for row in members], form) for key, form in forms]
        body.append((network, way, *told, f"{members[0]['macs_share']:.1%}", len(members)))
    about = f"""Mean (least … most) over seeds; all layers to 5/8, ten epochs of the same schedule from the same base
network. On the digits fine-tuning ends as high, for less. What C-SGD gives is a cut that changes nothing, and is
proven. {made(facts)}"""
    header = ("network", "way", "seconds", "after the cut", "at the end", "of the MACs", "n")
    return section("A whole pruned model", table(header, body), about)


ABOUT_STUDIES = """Accuracy in per cent: mean over VGG-16 (an eighth as wide, without batch norm) and ResNet-20, each to
5/8 and to 1/4, and five seeds; ± is a standard error over all of these. 270 steps of batch 32 each, one thread; seconds
were taken on a machine with other work."""


def curves() -> str:
    def told(row: Row) -> str:
        key = row["key"]
        plain = ", plain after the cut" if key["after_trim"] == "plain" else ""
        return f"{key['optimizer']}, {key['curve']} by {key['collapse_by']:.0%}{plain}"

    about = f"""{ABOUT_STUDIES} Made by `python experiments/study_curve.py run`; by network and width in
`experiments/study_curve.md`. Half of the run and a cosine are the defaults: the end is as high as later, and half of
the steps are narrow."""
    rows = lines(HERE / "study_curve.jsonl")
    return section("When should the filters be equal?", study(rows, told), about)


def ramps() -> str:
    def told(row: Row) -> str:
        key = row["key"]
        return OTHER_WAYS.get(key["method"]) or f"as published, {key['ramp']} by {key['collapse_by']:.0%}"

    usual = {"of": "pacesetter", "after_trim": "same_run", "wide_lr": 1.0}
    rows = [row for row in lines(HERE / "study_collapse.jsonl") if usual.items() <= row["key"].items() and "end" in row]
    about = f"""{ABOUT_STUDIES} Made by `python experiments/study_collapse.py run`; all settings, by network and width,
in `experiments/study_collapse.md`. Most networks recover from an early collapse. The hard one, VGG-16 at 1/4 with two
channels in its first layers, survives a late one only, and pulls the means down."""
    alt = "accuracy at the cut against the time of the collapse, accuracy at the end against seconds"
    picture = f"![{alt}](../experiments/study_collapse.png)"
    return section("The pull as published, and other ways", study(rows, told), about, picture)


def one_stroke() -> str:
    rows = lines(HERE / "study_one_shot.jsonl")
    looks = [look for row in rows for look in row["after"]]
    fractions = sorted({look["fraction"] for look in looks}, reverse=True)
    body = []
    for of, members in grouped(looks, lambda look: look["of"]).items():
        at = grouped(members, lambda look: look["fraction"])
        body.append((f"`of={of}`", *(spread([look["accuracy"] for look in at[one]], ".3f") for one in fractions)))
    (commit,) = common(rows, "commit")
    bases = spread([row["base"] for row in rows], ".3f")
    about = f"""Accuracy right after filters were merged in one stroke, with no training behind it; mean (least …
most) of n = {len(rows)} seeds. ResNet-20 on Fashion-MNIST, 14×14, three epochs: {bases} before. Commit `{commit[:7]}`:
`python experiments/study_one_shot.py run`."""
    header = ("clustered by", *(f"{fraction:g} of the widths" for fraction in fractions))
    return section("What to cluster by, in one stroke", table(header, body), about)


def lenet() -> str:
    rows = lines(HERE / "study_lenet.jsonl")
    looks = [look for row in rows for look in row["after"]]
    removed = sorted({look["removed"] for look in looks})
    body = []
    for way, members in grouped(looks, lambda look: look["way"]).items():
        at = grouped(members, lambda look: look["removed"])
        body.append((LENET[way], *(spread([100 * look["accuracy"] for look in at[one]], ".2f") for one in removed)))
    body += [(f"published: {way}", *(f"{value:.2f}" for value in told)) for way, told in LENET_PUBLISHED.items()]
    (commit,) = common(rows, "commit")
    n, bases = len(rows), spread([100 * row["base"] for row in rows], ".2f")
    about = f"""Test accuracy in per cent, right after the cut and with no training behind it; mean (least … most) of
n = {n} seeds, {bases} before. Both hidden layers lose the same share. Published (Kim et al., NeurIPS 2020): one
network of 89.80 %, the best of its epochs on the test set. Ours are of the last of 20 epochs, so their way was repeated
on them: each neuron that goes by the L1 norm is added, scaled, to the most similar one that stays, if their cosine is
0.45 or more. Merged clusters of kernels are level with it at 50 %, ahead of it from 60 % on, and hang less on the
network. Clusters of outputs, the better measure in a ResNet-20, are behind those of kernels here, and below what is
published at 80 %. Commit `{commit}`: `python experiments/study_lenet.py run`."""
    header = ("LeNet-300-100 on Fashion-MNIST, neurons removed", *(f"{one:.0%}" for one in removed))
    return section("LeNet-300-100, beside Neuron Merging", table(header, body), about)


def papers() -> str:
    rows = lines(HERE / "study_paper.jsonl")
    fractions = sorted({row["fraction"] for row in rows}, reverse=True)
    at = grouped(rows, lambda row: row["fraction"])
    body = [
        (told, *(spread([row["after"][way] for row in at[one]], ".3f") for one in fractions))
        for way, told in COMPARED.items()
    ]
    n, bases = len(at[fractions[0]]), spread([row["base"] for row in at[fractions[0]]], ".3f")
    (commit,) = common(rows, "commit")
    about = f"""What Ding et al. 2019 compare, small: a network of four convs (16, 16, 32, 32 filters) without batch
norm on the digits at 8×8, AdamW at one rate for all; mean (least … most) of n = {n} seeds. Accuracy at the end, where
the cut is exact and no training follows. The first four go on for ten epochs from a base network of ten ({bases});
identical filters and zero are reached along the same curve, by three quarters of the steps. The last two train for
twenty, and the redundant one costs more, as it is wide. It goes as they say: k-means first, one large cluster last,
zero lost where little is left. But nothing is trained to its end here, and half of the widths tells few of the ways
apart. Commit `{commit}`: `python experiments/study_paper.py run`."""
    header = ("", *(f"{fraction:g} of the widths" for fraction in fractions))
    return section("Identical or zeroed out, redundant or narrow", table(header, body), about)


def study(rows: Iterable[Row], told: Callable[[Row], str]) -> str:
    """A line a setting, the best one at the end first."""
    body = []
    for setting, members in grouped(rows, told).items():
        cuts = [100 * row["cut"] for row in members if row.get("cut") is not None]
        ends = [100 * row["end"] for row in members]
        end, error = statistics.fmean(ends), statistics.stdev(ends) / len(ends) ** 0.5
        seconds = statistics.fmean(row["seconds"] for row in members)
        cut = f"{statistics.fmean(cuts):.1f}" if cuts else ""
        body.append((end, (setting, cut, f"{end:.1f} ± {error:.1f}", f"{seconds:.1f}", len(members))))
    body.sort(key=lambda pair: -pair[0])
    return table(("", "at the cut", "at the end", "s", "n"), [row for _, row in body])


def step() -> str:
    facts = bench("optimizer_step")
    body = [(*place(row), row["contender"], *ms_and_n(row, f"{row['to_sgd']:.2f}")) for row in facts["rows"]]
    about = f"""Median (quartiles) over {facts["rows"][0]["processes"]} processes. *dense* is the published form with
c × c matrices. {made(facts)}"""
    return section("What a step costs", sentence(), table(("network", "threads", "", "ms", "to SGD", "n"), body), about)


def step_beside() -> str:
    facts = bench("collapse_step")
    body = [
        (row["network"], row["what"], row["threads"], row["optimizer"], *ms_and_n(row, f"{row['to_own']:.2f}"))
        for row in facts["rows"]
        if row["collapse"] == "with"
    ]
    header = ("network", "what", "threads", "optimizer", "ms", "to its own", "n")
    about = f"*step*: the optimizer's part alone; *whole*: a training step. {made(facts)}"
    return section("A step with a Collapse", table(header, body), about)


def training_step() -> str:
    facts = bench("training_step")
    body = [
        (*place(row), row["contender"], f"{row['optimizer_to_sgd']:.2f}", *ms_and_n(row, f"{row['to_sgd']:.3f}"))
        for row in facts["rows"]
    ]
    header = ("network", "threads", "optimizer", "its part, to SGD's", "ms", "to SGD", "n")
    return section("A whole training step", table(header, body), made(facts))


def latency() -> str:
    facts = bench("latency")
    body = [
        (row["network"], row["batch"], row["threads"], row["contender"], f"{row['macs_ratio']:.2f}",
         *ms_and_n(row, f"{row['faster']:.2f}"))
        for row in facts["rows"]
    ]  # fmt: skip
    header = ("network", "batch", "threads", "widths", "fewer MACs", "ms", "faster", "n")
    return section("Latency of the narrow network", table(header, body), made(facts))


def memory() -> str:
    facts = bench("memory")
    body = [
        (row["network"], row["batch"], row["way"], *(f"{row[key] / 1e6:.0f}" for key in ("weights", "peak")))
        for row in facts["rows"]
    ]
    about = f"Bytes that torch allocates, counted and not sampled: one measurement each. {made(facts)}"
    return section("Memory of a training step", table(("network", "batch", "", "weights, MB", "peak, MB"), body), about)


def clusters() -> str:
    facts = bench("clusters")
    body = [
        (*place(row), row["contender"], quartiles(row["seconds"], 1, ".2f"), f"{row['faster']:.1f}",
         f"{row['inertia']:.4f}", row["seconds"]["n"])
        for row in facts["rows"]
    ]  # fmt: skip
    about = f"""*plain* is a loop over scikit-learn's k-means with one start a layer, csgd takes the best of three.
*inertia* is relative to the plain loop's, of the worst layer. {made(facts)}"""
    return section("Clusters", table(("network", "threads", "", "s", "faster", "inertia", "n"), body), about)


def spaces() -> str:
    facts = bench("analysis")
    body = [
        (row["network"], row["size"], row["contender"], quartiles(row["seconds"], 1, ".2f"),
         f"{row['to_spaces']:.1f}", row["seconds"]["n"])
        for row in facts["rows"]
    ]  # fmt: skip
    about = f"""*with trial* is what `find_spaces` does by default; *before* is an older commit. Torch-Pruning's
dependency graph proves nothing. {made(facts)}"""
    header = ("network", "size", "", "s", "to the spaces alone", "n")
    return section("Finding the spaces", table(header, body), about)


def growth() -> str:
    facts = bench("growth")
    body = [
        (row["family"], row["size"], f"{row['parameters']:,}", quartiles(row["spaces"], 1, ".2f"),
         quartiles(row["clusters"], 1, ".2f"), quartiles(row["step"], 1000, ".3g"), row["step"]["n"])
        for row in facts["rows"]
    ]  # fmt: skip
    alt = "seconds and bytes of analysis, clusters and step against the number of parameters"
    picture = f"![{alt}](../experiments/bench/results/growth.png)"
    header = ("family", "size", "parameters", "spaces, s", "clusters, s", "step, ms", "n")
    return section("What grows with the network", table(header, body), picture, made(facts))


def loading() -> str:
    facts = bench("loader")
    body = [(row["data"], *place(row), *(f"{row[key]:,.0f}" for key in ("loader", "step"))) for row in facts["rows"]]
    header = ("data", "network", "threads", "images a second loaded", "images a second trained")
    return section("Loading images", table(header, body), f"One measurement each. {made(facts)}")


def section(title: str, *parts: str) -> str:
    return "\n\n".join([f"## {title}", *parts])


def bench(name: str) -> Row:
    return json.loads((HERE / "bench" / "results" / f"{name}.json").read_text())


def lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def grouped(rows: Iterable[Row], by: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[by(row)].append(row)
    return dict(groups)


def common(rows: Sequence[Row], *keys: str) -> tuple:
    """What all rows have in common under some keys; ValueError where they differ."""
    (values,) = {tuple(row[key] for key in keys) for row in rows}
    return values


def spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.fmean(values):{form}} ({min(values):{form}} … {max(values):{form}})"


def quartiles(seconds: Row, scale: int, form: str) -> str:
    median, low, high = (f"{scale * seconds[key]:{form}}" for key in ("median", "low", "high"))
    return f"{median} ({low} … {high})"


def ms_and_n(row: Row, ratio: str) -> tuple[str, str, int]:
    """Milliseconds, their ratio to another's, and how often they were taken."""
    return quartiles(row["seconds"], 1000, ".3g"), ratio, row["seconds"]["n"]


def place(row: Row) -> tuple[str, int]:
    return row["network"], row["threads"]


def made(facts: Row) -> str:
    """Where the numbers of a benchmark come from."""
    command = re.sub(r" --output \S+", "", facts["command"])
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "torchvision", "scikit-learn"))
    return f"Commit `{facts['commit'][:7]}`, {versions}, {facts['cores']} cores: `{command}`."


if __name__ == "__main__":
    PAGE.write_text(page())
