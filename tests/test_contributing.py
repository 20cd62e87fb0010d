"""What a contributor reads and sets up is true: the picture of the house, the versions, the forms."""

import os
import re
from pathlib import Path

import pytest
import yaml
from house import drawn, stairs
from test_architecture import FLOORS

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"


def test_the_house_is_drawn_as_it_is():
    rooms, arrows = drawn((ROOT / "docs" / "house.svg").read_text())
    again = "draw it again (Graphviz): python tests/house.py > docs/house.svg"
    assert rooms == set(FLOORS), again
    assert arrows == stairs(), again


def test_the_stairs_of_the_house_leave_out_what_others_imply():
    assert ("csgd.trim", "csgd.collapse") in stairs()
    assert ("csgd.trim", "csgd.graph") not in stairs(), "trim, collapse, …, graph"


def test_ruff_is_one_version():
    (pinned,) = re.findall(r"^ruff==(.+)$", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert hooks["rev"] == f"v{pinned}"
    assert [hook["id"] for hook in hooks["hooks"]] == ["ruff-check", "ruff-format"], "as .ci/run calls them"


def test_the_workflow_runs_what_anyone_can():
    (job,) = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("name", ["bug", "network_not_cut"])
def test_an_issue_form_asks_for_the_plan(name):
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form["name"]
    assert form["description"]
    plan = next(field for field in form["body"] if field["id"] == "plan")
    assert plan["validations"]["required"]
    assert "plan_only=true" in plan["attributes"]["description"]
    assert {field["type"] for field in form["body"]} <= {"textarea", "input"}


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / name).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
