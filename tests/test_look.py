"""What a run shows: its pictures, its page, its dashboard, its lines, and the plan of a run that is not made."""

import base64
import json
import os
import pty
import re
import shutil
import subprocess
import threading
from datetime import date
from html import escape, unescape
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from shutil import which

import commandline
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models

from csgd import cluster, find_spaces, report, target_widths, trim
from csgd.checkpoint import load_weights, save_weights
from csgd.clusters import tensor_of
from csgd.models import resnet56, vgg16
from csgd.pipeline.album import Album, keep_outputs
from csgd.pipeline.by_layer import deviations, latencies, of_modules, params_by_space, relations
from csgd.pipeline.film import Film
from csgd.pipeline.foresee import Cost, RunPlan, StagePlan
from csgd.pipeline.progress import Part, Progress
from csgd.pipeline.watch import work_left
from csgd.report import collapse
from csgd.report.curves import film_of
from csgd.report.spaces import GAP, placed
from csgd.verify import count_macs, count_params, macs_by_module

KEPT = ("filters", "film", "outputs")  # .safetensors
SMOKE = ["experiment=smoke", "dataset.image_size=16", "hydra.run.dir=out", "base.cache=base"]
CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")
PICTURES = ("curves", "filters", "outputs", "sizes", "spaces", "widths")


def run(folder, *arguments, status=0):
    return commandline.run(folder, *SMOKE, *arguments, status=status, COLUMNS="170").stdout


def shown_on_terminal(folder, *arguments) -> tuple[str, str]:
    """The standard output of a run, and what it writes to a standard error that is a terminal."""
    ours, theirs = pty.openpty()
    pieces = []

    def read():
        while True:
            try:
                pieces.append(os.read(ours, 65536))
            except OSError:  # the other end is closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    out = folder / "stdout.txt"
    process = commandline.start(folder, *SMOKE, *arguments, out=out, err=Path(os.ttyname(theirs)), COLUMNS="170")
    process.join()
    os.close(theirs)
    reader.join()
    os.close(ours)
    assert process.exitcode == 0, out.read_text()[-3000:]
    return out.read_text(), b"".join(pieces).decode()


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """A run with its terminal: folder, standard output, bars."""
    folder = tmp_path_factory.mktemp("looked")
    stdout, bars = shown_on_terminal(folder)
    return folder, stdout, bars


def read_json(path: Path):
    return json.loads(path.read_text())


def picture(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]


def test_every_picture_is_there_on_white_paper_with_something_on_it(looked):
    folder, stdout, _ = looked
    assert sorted(path.stem for path in (folder / "out" / "report").glob("*.png")) == sorted(PICTURES)
    for name in PICTURES:
        pixels = picture(folder / "out" / "report" / f"{name}.png")
        assert (pixels[0, 0] == 1).all(), name
        assert pixels.mean() > 0.7, f"{name} is dark"
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50, f"{name} is empty"
    assert "could not be drawn" not in stdout
    drawn = float(re.search(r"report: drawn in ([\d.]+) s", stdout).group(1))
    assert drawn < max(10, read_json(folder / "out" / "summary.json")["seconds"]["total"]), "or the machine is slow"


def test_pictures_are_drawn_from_the_files_alone(looked, tmp_path):
    out = looked[0] / "out"
    for name in ("metrics.jsonl", "summary.json", "clusters.json", *(f"{of}.safetensors" for of in KEPT)):
        shutil.copy(out / name, tmp_path)
    for name in ("collapse", *PICTURES):
        draw = getattr(report, f"draw_{name}")
        path = draw(tmp_path)
        assert path.read_bytes() == (out / "report" / path.name).read_bytes()


def test_a_run_of_which_no_filters_are_kept_has_no_picture_of_them(tmp_path):
    for draw in (report.draw_filters, report.draw_collapse, report.draw_outputs):
        assert draw(tmp_path) is None


def test_the_animation_shows_the_filters_on_their_way_the_cut_and_what_follows(looked):
    out = looked[0] / "out"
    film, summary = load_weights(out / "film.safetensors"), read_json(out / "summary.json")
    steps = film["1/steps"].tolist()
    assert steps == [*range(0, 65, 2), 65]
    assert film["1/left/filters"][[0, -1]].tolist() == [1, 0]
    places, clusters = film["1/places"], read_json(out / "clusters.json")["conv1"]
    together = next(members for members in clusters if len(members) > 1)
    apart = [float((places[k, together] - places[k, together].mean(0)).norm()) for k in (0, -1)]
    assert apart[0] > 0.01
    assert apart[1] < 1e-5
    path = out / "report" / "collapse.gif"
    assert path.stat().st_size < 2e6
    with Image.open(path) as animation:
        frames = []
        for number in range(animation.n_frames):
            animation.seek(number)
            frames.append(np.asarray(animation.convert("RGB")))
            assert animation.info["duration"] >= 90
    assert (frames[0][0, 0] == 255).all(), "white paper"
    assert len(frames) > len(steps), "the narrow network goes on"
    different = [(one != other).any() for one, other in zip(frames, frames[1:], strict=False)]
    assert all(different), "every frame says its step"
    told = "the filters of a cluster are equal"
    assert told in {collapse._told(frame) for frame in collapse._frames(film_of(out), 65, 130)}
    assert summary["cut"]["step"] == 65


def test_a_resumed_run_goes_on_with_its_film(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    spaces = find_spaces(model, torch.randn(2, 3, 8, 8))
    clusters = cluster(model, spaces, {"0": 4})
    album = Album.of(tmp_path / "filters.safetensors", 0, model, spaces, clusters)
    album.keep(model, "start")

    def film(step):
        return Film.of(tmp_path / "film.safetensors", 0, album, 72, step, {"filters": 1.0})

    first = film(0)
    for step in (2, 4, 6):
        assert first.is_due(step)
        first.take(model, step, {"filters": 1 - step / 72})
    assert not first.is_due(7)
    assert first.is_due(72)
    second = film(5)  # the checkpoint was of step 5
    second.take(model, 6, {"filters": 0.5})
    kept = load_weights(tmp_path / "film.safetensors")
    assert kept["1/steps"].tolist() == [0, 2, 4, 6]
    assert kept["1/left/filters"].tolist()[-1] == 0.5
    torch.testing.assert_close(kept["1/places"][0], kept["1/places"][2], msg="the plane is the same")
    film(0).take(model, 2, {"filters": 0.9})
    assert load_weights(tmp_path / "film.safetensors")["1/steps"].tolist() == [0, 2], "a new run in an old folder"


def test_of_the_outputs_those_of_the_image_are_kept_that_changed_most(tmp_path):
    before = torch.randn(2000, 10)
    after = before.clone()
    after[1234, 3] += 7
    keep_outputs(tmp_path / "outputs.safetensors", 0, [before], [after])
    kept = load_weights(tmp_path / "outputs.safetensors")
    assert kept["1/change"].shape == (2000,)
    assert kept["1/change"].argmax() == 1234
    assert kept["1/before"].numel() <= 4000
    assert (kept["1/after"] - kept["1/before"]).max() == pytest.approx(7)


def boxes_of(model, example):
    spaces = find_spaces(model, example, trial=False)
    widths = target_widths(spaces, 5 / 8)
    layers = {
        s.name: {"name": s.name, "before": s.size, "after": widths.get(s.name, s.size), **related}
        for s, related in zip(spaces, relations(spaces), strict=True)
    }
    return layers, *placed(layers)


@pytest.mark.parametrize(
    "net, size",
    [
        (lambda: vgg16(10, 32), 32),
        (lambda: resnet56(10), 32),
        (lambda: models.mobilenet_v3_large(num_classes=10), 64),
        (lambda: models.googlenet(num_classes=10, init_weights=False), 64),
    ],
)
def test_the_picture_of_the_spaces_has_room_for_each(net, size):
    layers, boxes, arrows = boxes_of(net(), torch.randn(2, 3, size, size))
    assert boxes.keys() == layers.keys()
    for one, other in combinations(boxes.values(), 2):
        apart = one.right <= other.left or other.right <= one.left or one.bottom <= other.top or other.bottom <= one.top
        assert apart, (one, other)
    assert max(box.right for box in boxes.values()) < 16, "inches"
    joined = {name for arrow in arrows for name in arrow[:2]}
    assert joined == layers.keys()
    for source, target, both in arrows:
        assert target in layers[source]["read_by"]
        assert both == (source in layers[target]["read_by"])


def test_a_residual_stream_stands_beside_what_is_within_its_blocks():
    layers, boxes, arrows = boxes_of(resnet56(10), torch.randn(2, 3, 32, 32))
    assert layers["conv1"]["together"] == [f"layer1.{k}.conv2" for k in range(9)]
    assert layers["layer1.3.conv1"]["read_by"] == ["conv1"]
    inner = [boxes[f"layer1.{k}.conv1"] for k in range(9)]
    assert {box.left for box in inner} == {boxes["conv1"].right + GAP}
    assert (inner[0].top, inner[-1].bottom) == (boxes["conv1"].top, pytest.approx(boxes["conv1"].bottom))
    assert ("conv1", "layer1.3.conv1", True) in arrows
    assert ("conv1", "layer2.0.conv1", False) in arrows
    assert ("conv1", "layer2.0.conv2", False) not in arrows, "by the downsampling, which follows from another way"


def test_what_layers_cost_adds_up_also_where_they_share_tensors():
    """A dense network: one batch norm has channels of several spaces."""
    torch.manual_seed(0)

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1, bias=False)
            self.norm, self.three = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 1)
            self.head = nn.Linear(5, 2)

        def forward(self, x):
            x = self.one(x)
            x = self.three(self.norm(torch.cat([x, self.two(x)], 1)))
            return self.head(x.mean((2, 3)))

    model, example = Dense(), torch.randn(2, 3, 4, 4)
    spaces = find_spaces(model, example)
    clusters = cluster(model, spaces, {"one": 3, "two": 2, "three": 5})
    params = params_by_space(model, spaces, {})
    assert params == {"one": 27 * 6 + 6 + 2 * 6, "two": 54 * 4 + 2 * 4, "three": 50 + 5, "head": 12}
    assert sum(params.values()) == count_params(model)
    macs = of_modules(model, spaces, {}, macs_by_module(model, example))
    assert macs == {"one": 16 * 162, "two": 16 * 216, "three": 16 * 50, "head": 10}
    assert sum(macs.values()) == count_macs(model, example)
    milliseconds = of_modules(model, spaces, {}, {"norm": 1.0, "one": 2.0})
    assert milliseconds == pytest.approx({"one": 2.6, "two": 0.4, "three": 0, "head": 0})
    apart = deviations(model, spaces, clusters)
    assert apart.keys() == clusters.keys()
    assert apart["one"] == pytest.approx(max(apart.values()), rel=0.5)
    assert apart["three"] == 0, "it keeps its width"
    trim(model, spaces, clusters, tolerance=None)
    widths = {"one": 3, "two": 2, "three": 5, "head": 2}
    assert params_by_space(model, spaces, widths)["two"] == 27 * 2 + 2 * 2
    assert of_modules(model, spaces, widths, {"norm": 1.0})["one"] == pytest.approx(3 / 5)


def test_latencies_are_of_modules_with_parameters_and_leave_no_hook():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 4, 3)))
    taken = latencies({"dense": model}, torch.randn(2, 3, 16, 16))["dense"]
    assert taken.keys() == {"", "0", "2.0"}
    assert min(taken.values()) > 0
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_the_filters_of_the_first_layer_collapse_and_are_cut(looked):
    out = looked[0] / "out"
    kept = load_weights(out / "filters.safetensors")
    assert kept.keys() == {f"1/conv1/{when}" for when in ("cluster", "start", "collapse", "cut")}
    start, collapse, cut = (kept[f"1/conv1/{when}"] for when in ("start", "collapse", "cut"))
    assert (start.shape, collapse.shape, cut.shape) == ((16, 3, 3, 3), (16, 3, 3, 3), (10, 3, 3, 3))
    clusters = read_json(out / "clusters.json")["conv1"]
    for c, members in enumerate(clusters):
        assert kept["1/conv1/cluster"][members].tolist() == [c] * len(members)
        torch.testing.assert_close(collapse[members], cut[c].expand(len(members), -1, -1, -1), atol=1e-5, rtol=0)
    together = next(members for members in clusters if len(members) > 1)
    assert (start[together] - start[together[0]]).abs().max() > 0.01


def test_rows_say_what_a_step_costs(looked):
    out = looked[0] / "out"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = {}
    for row in rows:
        phase = row["phase"]
        taken = row["step"] - steps.get(phase, 0)
        assert row[f"{phase}/seconds_per_step"] * taken == pytest.approx(row[f"{phase}/seconds"])
        steps[phase] = row["step"]
    costs = read_json(out / "summary.json")["seconds_per_step"]
    wide = [row for row in rows if "left/filters" in row]
    expected = sum(row["csgd/seconds"] for row in wide) / wide[-1]["step"]
    assert costs["wide"] == pytest.approx(expected)
    assert costs["trimmed"] == pytest.approx(rows[-1]["csgd/seconds_per_step"])
    assert f"{1000 * costs['wide']:.0f} before the cut" in looked[1]


class Page(HTMLParser):
    """What a browser finds in a page: text, images, and whether every element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.attributes = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_everything_and_needs_no_network(looked):
    out = looked[0] / "out"
    html = (out / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert "://" not in html
    images = [value for key, value in page.attributes if key == "src"]
    assert all(image.startswith(("data:image/png;base64,", "data:image/gif;base64,")) for image in images)
    shown = {base64.b64decode(image.split(",")[1]) for image in images}
    assert shown == {path.read_bytes() for path in (out / "report").iterdir()}
    text = " ".join(page.text)
    for told in (
        "resnet20 on digits",
        "LOSSLESS",
        "after 1 epoch",
        "after 130 more steps, 50% of them",
        "what training alone gains was not measured",
        "The base network had 1 epoch of training, and C-SGD trained it for 130 steps more.",
        "at most 1e-04 is lossless",
        "at most 1e-05 is collapsed",
        "python run.py experiment=smoke dataset.image_size=16",
        "digits: 1,437 images to train on and 360 to test, each 3×16×16",
        "10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
        "mean 0.305, 0.305, 0.305, std 0.319, 0.319, 0.319",
        date.today().strftime("%B %Y"),
        "layer1.0.conv2, layer1.1.conv2, layer1.2.conv2",
        "1.88 M → 760 k",
        "7.47 k → 3.05 k",
        "10.2 M → 4.01 M",
        " → 0",
        "60.7% less than 10,203,776",
        "layer3.2.conv1",
        "network output",
    ):
        assert told in text, told
    for line in ('_target_: "csgd.models.resnet20"', "collapse_by: null", 'method: "kmeans"'):
        assert line in text, line


def test_the_page_escapes_what_it_is_given(looked, tmp_path):
    out = looked[0] / "out"
    summary = read_json(out / "summary.json")
    summary["config"]["model"]["name"] = "<script>alert(1)</script>"
    summary["layers"][0]["pinned"] = ["a < b & c"]
    summary["verdict"] |= {"lossless": False, "collapsed": False}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    summary["latency"] = None
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    shutil.copy(out / "clusters.json", tmp_path)
    html = report.write_page(tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    assert "<script" not in html
    assert "a &lt; b &amp; c" in html
    assert "NOT LOSSLESS: the filters had not collapsed" in " ".join(page.text)
    assert "<img" not in html, "pictures that are not there are left out"


# A window of Chromium is never narrower than 500 pixels, a frame in one is; what is in it tells the page round it.
FRAME = """<iframe width="{width}" height="800" srcdoc="{page}"></iframe>"""
BEFORE = "<script>const errors = []; addEventListener('error', e => errors.push(e.message), true)</script>"
AFTER = """<script>addEventListener('load', () => {
  const root = document.documentElement, wider = box => box.scrollWidth > box.clientWidth
  parent.document.title += JSON.stringify({
    width: innerWidth, overflow: root.scrollWidth - root.clientWidth, errors,
    images: [...document.images].map(image => image.complete && image.naturalWidth > 0),
    requests: performance.getEntriesByType('resource').map(e => e.name).filter(name => !name.startsWith('data:')),
    scrolling: [...document.querySelectorAll('.wide')].filter(wider).length,
    cut: [...document.querySelectorAll('.facts td')].filter(wider).length,
  }) + ','
})</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, as in apt-get install chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_in_a_browser_wide_and_narrow_light_and_dark(looked, tmp_path, dark):
    path, watched, shot = looked[0] / "out" / "report.html", tmp_path / "watched.html", tmp_path / "shot.png"
    page = escape(path.read_text(encoding="utf-8").replace("<head>", f"<head>{BEFORE}") + AFTER)
    frames = [FRAME.format(width=width, page=page) for width in (1280, 390)]
    watched.write_text(f"<!doctype html><title></title>{''.join(frames)}", encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
        "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--window-size=1400,2500", f"--blink-settings=preferredColorScheme={int(not dark)}",
    ]  # fmt: skip
    told = subprocess.run([*command, "--dump-dom", watched.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in told.stderr, told.stderr[-2000:]
    seen = json.loads(f"[{unescape(re.search('<title>(.*?),</title>', told.stdout).group(1))}]")
    narrow, wide = sorted(seen, key=lambda of: of["width"])
    assert (narrow["width"], wide["width"]) == (390, 1280)
    for seen in (narrow, wide):
        assert seen["overflow"] == 0, "what is wide scrolls in a box of its own"
        assert seen["images"] == [True] * (len(PICTURES) + 1)
        assert (seen["requests"], seen["errors"], seen["cut"]) == ([], [], 0)
    assert narrow["scrolling"] > 0
    assert wide["scrolling"] == 0
    subprocess.run([*command, f"--screenshot={shot}", path.as_uri()], capture_output=True, timeout=120, check=True)
    brightness = picture(shot).mean()
    assert brightness < 0.4 if dark else brightness > 0.7, "charts are dark in the dark"


def test_the_dashboard_tells_the_story_in_order(looked):
    folder = looked[0]
    (offline,) = (folder / "out" / "wandb").glob("offline-run-*")
    media = {path.parent.name: path for path in offline.rglob("media/*/report/*")}
    images = sorted(path.name.split("_")[0] for path in offline.rglob("media/images/report/*.png"))
    assert images == sorted(PICTURES), media
    (path,) = offline.rglob("media/table/report/*.json")
    logged = read_json(path)
    assert logged["columns"] == list(report.LAYER_HEADER)
    assert ["layer1.0.conv1", 16, 10] in [row[:3] for row in logged["data"]]
    content = next(offline.glob("run-*.wandb")).read_bytes()
    keys = set(re.findall(rb"(?:base|csgd|forecast|left|report)/[a-z_]+", content))
    sections = [key.split(b"/")[0] for key in sorted(keys)]
    assert list(dict.fromkeys(sections)) == [b"base", b"csgd", b"forecast", b"left", b"report"]
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    known = {"base", "csgd", "forecast", "left"}
    assert {key.split("/")[0] for row in rows for key in row} - {"phase", "step", "stage", "epoch"} == known


def test_lines_and_bars_give_the_time_to_the_end_and_show_the_cut(looked):
    _, stdout, bars = looked
    left = re.findall(r"epoch \d+: .* s \(([\d.]+) ms a step\), (\d+) s to go", stdout)
    assert len(left) == 3
    seconds = [int(to_go) for _, to_go in left]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] == 0
    assert re.search(r"base, step 0 of 60: +0%", bars)
    shares = [int(share) for share in re.findall(r"of \d+[^|]*: +(\d+)%\|", bars)]
    assert shares == sorted(shares), "one bar for the whole run"
    assert re.search(r"C-SGD, step \d+ of 130: .*<\d\d:\d\d", bars)
    assert re.search(r"C-SGD, step \d+ of 130, cut at 65", bars)
    assert "epoch" not in bars


def test_a_quiet_run_says_its_verdict_and_its_log_everything(looked, tmp_path):
    stdout, bars = shown_on_terminal(
        tmp_path, f"base.cache={looked[0] / 'base'}", "quiet=true", "wandb=disabled", "deps=3_4"
    )
    assert bars == ""
    lines = [line for line in stdout.splitlines() if line.startswith("[")]
    assert [line.split(" - ")[1] for line in lines] == ["LOSSLESS"]
    assert "multiply-accumulates" in stdout
    log = (tmp_path / "out" / "run.log").read_text()
    assert "csgd epoch 2: loss" in log
    assert "LOSSLESS" in log


def test_pictures_that_fail_are_reported_and_lose_nothing(looked, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report").write_text("in the way")
    cached = f"base.cache={looked[0] / 'base'}"
    (tmp_path / "out" / "filters.safetensors").mkdir()
    stdout = run(tmp_path, cached, "quiet=true", "wandb=disabled", "centri_strength=0.5", status=1)
    warnings = [line for line in stdout.splitlines() if "[WARNING]" in line]
    pictures = ("report/curves.png", "report/widths.png", "report/sizes.png", "report/outputs.png")
    for name in (*pictures, "the filters for their picture", "the steps of the animation"):
        assert any(f"{name} could not be drawn: " in line for line in warnings), name
    assert any("the filters will not collapse" in line for line in warnings)
    assert "[INFO] - NOT LOSSLESS" in stdout
    assert (tmp_path / "out" / "summary.json").exists()
    Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))


def test_the_plan_is_what_the_run_will_be(looked, tmp_path):
    folder, _, _ = looked
    stdout = run(tmp_path, f"base.cache={folder / 'base'}", "plan_only=true")
    plan, summary = read_json(tmp_path / "out" / "plan.json"), read_json(folder / "out" / "summary.json")
    clusters = read_json(folder / "out" / "clusters.json")
    assert plan["layers"] == summary["layers"]
    assert plan["widths"] == [summary["widths"]]
    assert [cost["macs"] for cost in plan["cost"]] == [summary["cost"][f"macs_{when}"] for when in ("before", "after")]
    assert [cost["params"] for cost in plan["cost"]] == [
        summary["cost"][f"params_{when}"] for when in ("before", "after")
    ]
    assert plan["clusters"] == {name: [len(part) for part in parts] for name, parts in clusters.items()}
    assert plan["forecast"]["collapse_step"] == summary["cut"]["foreseen_step"]
    spent = summary["seconds"]["csgd"]
    assert spent / 10 < plan["estimate"]["seconds"] < spent * 10, "the base network is in the cache"
    weights = 4 * summary["cost"]["params_before"]
    activations = 8 * 4 * 19 * 16 * 16 * 16  # images × float32 × conv outputs, the largest of them
    assert 3 * weights < plan["estimate"]["bytes"] < 3 * weights + 10 * activations
    for told in (
        "network output",
        "equal, to the bit, at step 65",
        "4,011,920 (−60.7%)",
        "of memory",
        "nothing was trained",
    ):
        assert told in stdout, told


def test_a_plan_trains_nothing_and_leaves_a_plan(tmp_path):
    stdout = run(tmp_path, "plan_only=true", "deps.stages=[0.75,0.5]", "centri_strength=0.5")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".hydra", ".lock", "plan.json", "run.log"}
    assert not (tmp_path / "base").exists()
    plan = read_json(tmp_path / "out" / "plan.json")
    assert plan["clusters"] == {}, "k-means needs the weights"
    assert "clusters: found from the weights of the base network, which are not at hand" in stdout
    assert plan["forecast"]["collapses"] is False
    assert "would do" in plan["forecast"]["advice"] + stdout
    assert len(plan["cost"]) == 3
    assert plan["cost"][0]["macs"] > plan["cost"][1]["macs"] > plan["cost"][2]["macs"]


def test_a_plan_clusters_the_weights_of_a_file(tmp_path):
    from csgd.models import resnet20

    torch.manual_seed(7)
    model = resnet20(10)
    save_weights(tmp_path / "base.safetensors", model.state_dict())
    run(tmp_path, "plan_only=true", "base.weights=base.safetensors")
    plan = read_json(tmp_path / "out" / "plan.json")
    expected = cluster(model, find_spaces(model, torch.randn(2, 3, 16, 16), trial=False), plan["widths"][0])
    assert plan["clusters"] == {name: [len(part) for part in parts] for name, parts in expected.items()}


def test_what_is_left_weighs_steps_by_their_cost():
    costs = [Cost(1000, 0), Cost(400, 0), Cost(100, 0)]
    plan = RunPlan(costs, StagePlan({}, None, due=5), base_steps=10, csgd_steps=10)
    first, second = 5 + 5 * 0.4, 5 * 0.4 + 5 * 0.1
    assert plan.work(trains_base=True) == pytest.approx(10 + first + second)
    assert plan.work(trains_base=False) == pytest.approx(first + second)

    def left(part, stage, step):
        return work_left(plan, Progress(None, part, stage, step))

    assert left(Part.BASE, 0, 0) == plan.work(trains_base=True)
    assert left(Part.BASE, 0, 8) == pytest.approx(2 + first + second)
    assert left(Part.BETWEEN, 1, 0) == pytest.approx(second)
    assert left(Part.WIDE, 0, 3) == pytest.approx(2 + 5 * 0.4 + second)
    assert left(Part.WIDE, 1, 7) == pytest.approx(3 * 0.1), "it is due"
    assert left(Part.NARROW, 0, 2) == pytest.approx(8 * 0.4 + second), "it was cut early"
    assert left(Part.NARROW, 1, 10) == left(Part.BETWEEN, 2, 0) == 0


@pytest.mark.parametrize(
    "seconds, told", [(7.4, "7 s"), (140, "2 min"), (12_000, "3 h 20 min"), (180_000, "2 days 2 h")]
)
def test_durations(seconds, told):
    assert report.duration(seconds) == told


def test_the_album_follows_channels_through_groups(tmp_path):
    """The first layer to be cut is of one pixel, the next has two groups: its filters are the first group's."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(), nn.Conv2d(12, 4, 3), nn.Flatten()
    )  # fmt: skip
    example = torch.randn(2, 3, 8, 8)
    spaces = find_spaces(model, example)
    clusters = {"0": [[0, 2], [1], [3]], "2": [[0, 1], [2], [3, 4, 5]]}
    clusters = {s.name: clusters[s.name] for s in spaces if s.name in clusters and s.trimmable}
    assert [s.size for s in spaces if s.name in clusters] == [4, 6]
    album = Album.of(tmp_path / "filters.safetensors", 0, model, spaces, clusters)
    for when in ("start", "collapse"):
        album.keep(model, when)
    trim(model, spaces, clusters, tolerance=None)
    album.keep(model, "cut")
    kept = load_weights(tmp_path / "filters.safetensors")
    (space,) = (s for s in find_spaces(model, example) if s.name == "2")
    ref = space.producers[0]
    assert torch.equal(kept["1/2/cut"], tensor_of(model, ref).detach()[ref.index[:, 0]])
    assert kept["1/2/cut"].shape[0] == 3
    assert kept["1/2/start"].shape[0] == 6
    assert picture(report.draw_filters(tmp_path)).std() > 0.1


def test_an_album_of_a_network_without_pictures_is_none(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))
    spaces = find_spaces(model, torch.randn(2, 3, 2, 2))
    clusters = cluster(model, spaces, {"1": 4})
    assert Album.of(tmp_path / "filters.safetensors", 0, model, spaces, clusters) is None
