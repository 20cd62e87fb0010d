"""A view of W&B for the runs of this repository: what is left of the deviation, accuracy, verdicts of a sweep, cost.

python experiments/wandb/dashboard.py ENTITY [PROJECT] [--group GROUP] [--score accuracy]

Prints the view's address; after `pip install '.[sweeps]'` and `wandb login`.  Runs that differ in their seed alone are
drawn as their mean, until the grouping is taken off on the page.
"""

import argparse

import wandb
from wandb_workspaces import expr
from wandb_workspaces import workspaces as ws
from wandb_workspaces.reports import v2 as wr

METHOD = ("model._target_", "clustering.method", "centri_strength")  # a strength of null is a Collapse
VERDICT = ("lossless", "relative_logit_change", "accuracy_before_trim", "accuracy_after_trim", "accuracy")


def dashboard(entity: str, project: str = "csgd", group: str | None = None, score: str = "accuracy") -> ws.Workspace:
    """The view, not yet saved; of one sweep if its `group` is given.  `score` is what the data are judged by."""
    pictures = wr.MediaBrowser(title="The curves of each run, its cut marked", media_keys=["report/curves"])
    return ws.Workspace(
        entity=entity,
        project=project,
        name="Centripetal SGD",
        sections=[
            ws.Section(name="Runs", panels=[*_curves(score), pictures], is_open=True),
            ws.Section(name="Verdicts", panels=_verdicts(score), is_open=True),
        ],
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=[expr.Metric("Group") == group] if group else [],
            groupby=[expr.Config(key) for key in (*METHOD, "deps.fraction")],
            pinned_columns=[*(f"summary:verdict/{key}" for key in VERDICT), "summary:cost/macs_after"],
        ),
    )


def _curves(score: str) -> list[wr.LinePlot]:
    groups = ("filters", "kernels", "vectors")  # the first under a Collapse, the others under the published pull
    left, forecast = ([f"{which}/{group}" for group in groups] for which in ("left", "forecast"))
    panels = {
        "What is left of the deviation, and its forecast": [*left, *forecast],
        f"Test {score}; the cut is where what is left ends": [f"base/test_{score}", f"csgd/test_{score}", *left],
        "Relative deviation of the worst tensor, until the cut": ["csgd/deviation"],
        "Loss": ["base/loss", "csgd/loss"],
        "Seconds a step: fewer after the cut": ["base/seconds_per_step", "csgd/seconds_per_step"],
    }
    return [wr.LinePlot(title=title, x="epoch", y=metrics) for title, metrics in panels.items()]


def _verdicts(score: str) -> list:
    macs, final = wr.SummaryMetric("cost/macs_after"), wr.SummaryMetric("verdict/accuracy")
    width, change = wr.Config("deps.fraction"), wr.SummaryMetric("verdict/relative_logit_change")
    axes = [*map(wr.Config, METHOD), width, change, macs, final]
    return [
        wr.ScatterPlot(title=f"Test {score} against multiply-accumulates, by method and width", x=macs, y=final),
        wr.ScatterPlot(title="Largest change of an output by the cut, against width", x=width, y=change, log_y=True),
        wr.BarPlot(title=f"Test {score} by method", metrics=["verdict/accuracy"]),
        wr.ParallelCoordinatesPlot(
            title="Methods, widths, verdicts", columns=[wr.ParallelCoordinatesPlotColumn(axis) for axis in axes]
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Saves a dashboard of runs and sweeps as a view of a W&B project.")
    parser.add_argument("entity", help="your name at W&B, or your team's")
    parser.add_argument("project", nargs="?", default="csgd")
    parser.add_argument("--group", help="the runs of one sweep alone: its wandb.group")
    parser.add_argument("--score", default="accuracy", help="what the data are scored by, if not by accuracy")
    view = dashboard(**vars(parser.parse_args()))
    try:
        print(view.save().url)
    except wandb.errors.Error as error:  # no key, no such project, no network
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
