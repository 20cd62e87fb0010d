"""The pages: they build without a warning, their cells run, links lead somewhere, and what is generated is current."""

import importlib
import os
import pydoc
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from omegaconf import OmegaConf

import csgd

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FETCHED = {"script", "img", "iframe", "link", "source", "video", "audio"}  # by the browser, without a click


class Page(HTMLParser):
    """What a page offers and asks for: anchors, links, what is fetched, and the code of its cells."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.anchors, self.links, self.fetched, self.cells = path, set(), [], [], []
        self._depth = 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors.update(filter(None, (given.get("id"), given.get("name"))))
        self.links += [given[key] for key in ("href", "src") if given.get(key) is not None]
        self.fetched += [given[key] for key in ("href", "src") if tag in FETCHED and given.get(key)]
        if tag == "div" and (self._depth or "cell_input" in (given.get("class") or "").split()):
            self._depth += 1
            self.cells += [""] if self._depth == 1 else []

    def handle_endtag(self, tag):
        self._depth -= tag == "div" and self._depth > 0

    def handle_data(self, data):
        if self._depth:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Page]:
    """The pages by their path, built from nothing: a warning, a dead reference or a cell that raises fails here."""
    for package in ("sphinx", "furo", "myst_nb"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    html = tmp_path_factory.mktemp("site") / "html"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-n", "--keep-going", "docs", str(html)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return {path: Page(path) for path in sorted(html.rglob("*.html"))}


def own(site: dict[Path, Page]) -> list[Page]:
    """All but the report of a run, which is shown as it is."""
    return [page for path, page in site.items() if path.parent.name != "example"]


def test_links_and_anchors_lead_somewhere(site):
    dead, followed = [], 0
    for page in own(site):
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            followed += 1
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            fragment = unquote(parts.fragment)
            if not target.exists() or (fragment and target in site and fragment not in site[target].anchors):
                dead.append(f"{page.path.name}: {link}")
    assert dead == []
    assert followed > 500


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 110
    links = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in target]
    assert len(links) > 15
    assert [target for target in links if not (ROOT / target).exists()] == []


def test_nothing_is_fetched_from_elsewhere(site):
    assert [f"{page.path.name}: {one}" for page in site.values() for one in page.fetched if urlsplit(one).netloc] == []
    (walk,) = [page for path, page in site.items() if path.stem == "walk"]
    assert any("mathjax/tex-svg.js" in one for one in walk.fetched)


def test_every_public_name_is_documented_and_runs_in_an_example(site):
    inventory = next(iter(site)).parent / "objects.inv"
    *_, packed = inventory.read_bytes().split(b"\n", 4)
    documented = {line.split()[0] for line in zlib.decompress(packed).decode().splitlines() if " py:" in line}
    assert [name for name in csgd.__all__ if f"csgd.{name}" not in documented] == []
    (api,) = [page for path, page in site.items() if path.stem == "api"]
    code = "\n".join(api.cells)
    assert [name for name in csgd.__all__ if not re.search(rf"\bcsgd\.{name}\b", code)] == []


def test_every_page_is_built_and_cells_have_run(site):
    pages = {path.stem for path in site}
    assert pages >= {path.stem for path in DOCS.rglob("*.md")}
    assert sum(bool(page.cells) for page in site.values()) >= 7


def test_the_page_of_results_is_what_the_committed_rows_make(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    results = importlib.import_module("results")
    try:
        assert results.PAGE.read_text() == results.page(), "python experiments/results.py makes it anew"
    finally:
        sys.modules.pop("results")


def test_the_page_of_coverage_is_what_the_committed_rows_make(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "coverage"))
    made = importlib.import_module("table")
    try:
        assert made.PAGE.read_text() == made.page(), "python experiments/coverage/table.py makes it anew"
    finally:
        sys.modules.pop("table")


def test_every_key_of_the_configuration_has_a_default_a_range_and_a_meaning(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    keys = importlib.import_module("keys")
    try:
        rows = [row.split(" | ") for row in keys.tables().splitlines() if row.startswith("| `")]
        cfg = OmegaConf.to_container(keys.defaults())
    finally:
        sys.modules.pop("keys")
    told = {row[0].strip("| `"): row[1:] for row in rows}
    assert told.keys() == set(leaves({key: value for key, value in cfg.items() if key not in ("model", "dataset")}))
    assert [key for key, cells in told.items() if not all(cell.strip("| ") for cell in cells)] == []
    assert told["schedule.batch_size"][1] == "2 or more"
    assert told["tolerance.logits"][0] == "`0.0001`"


def leaves(values: dict, prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_facts_that_comments_cite_are_in_the_method():
    cited = {
        number
        for path in (*(ROOT / "csgd").rglob("*.py"), *(ROOT / "docs").rglob("*.md"))
        for numbers in re.findall(r"\b[Ff]acts? (F\d+(?:(?:, | and | to )F\d+)*)|\((F\d+)\)", path.read_text())
        for number in re.findall(r"F\d+", " ".join(numbers))
    }
    stated = set(re.findall(r"^\*\*(F\d+)\.", (DOCS / "method.md").read_text(), re.MULTILINE))
    assert len(cited) > 8
    assert cited <= stated


def test_help_begins_with_the_way_of_the_data():
    first = pydoc.plain(pydoc.render_doc(csgd)).splitlines()[:20]
    called = [name for line in first for name in re.findall(r"csgd\.(\w+)\(", line)]
    assert called == [
        "find_spaces", "target_widths", "cluster", "prove", "Collapse", "trim", "load_trimmed",
    ]  # fmt: skip
    assert set(called) <= set(csgd.__all__)
