"""Imports go down the floors of the house, never up; heavy things are imported where they are used."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = {
    "csgd.errors": 0,
    "csgd.balanced": 0,
    "csgd.blocks": 0,
    "csgd.build": 0,
    "csgd.centripetal": 0,
    "csgd.graph": 0,
    "csgd.clusters": 0,
    "csgd.outputs": 0,
    "csgd.stacks": 0,
    "csgd.hooks": 0,
    "csgd.widths": 0,
    "csgd.schedule": 0,
    "csgd.ranks": 0,
    "csgd.data": 0,
    "csgd.folders": 0,
    "csgd.seeds": 0,
    "csgd.models": 0,
    "csgd.optim": 1,
    "csgd.carry_over": 1,
    "csgd.collapse": 1,
    "csgd.trim": 1,
    "csgd.weight_norm": 1,
    "csgd.budget": 1,
    "csgd.drop": 1,
    "csgd.sensitivity": 1,
    "csgd.proof": 1,
    "csgd.trial": 1,
    "csgd.plan": 1,
    "csgd.train": 1,
    "csgd.checkpoint": 1,
    "csgd.folder": 1,
    "csgd.pruned": 1,
    "csgd.reload": 1,
    "csgd.verify": 2,
    "csgd.report": 2,
    "csgd.card": 2,
    "csgd.export": 2,
    "csgd.tracking": 2,
    "csgd.sweep": 2,
    "csgd.pipeline": 3,
    "evaluate": 4,
    "run": 4,
}
ONLY_IN = {
    "wandb": {"csgd.tracking"},
    "matplotlib": {"csgd.report", "csgd.sweep"},
    "yaml": {"csgd.sweep"},
    "jinja2": {"csgd.report", "csgd.card"},
    "onnxruntime": {"csgd.export"},
    "hydra": {"evaluate", "run"},
    "omegaconf": {"evaluate", "run"},
    "sklearn": {"csgd.clusters", "csgd.data"},
}


def modules():
    for path in [*(ROOT / "csgd").rglob("*.py"), ROOT / "run.py", ROOT / "evaluate.py"]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield name, path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name):
    return next((known for known in FLOORS if name == known or name.startswith(known + ".")), None)


def test_every_module_has_a_floor():
    assert [name for name, _ in modules() if room(name) is None and name != "csgd"] == []
    assert set(FLOORS) == {room(name) for name, _ in modules() if name != "csgd"}


def test_no_stair_goes_up():
    up = [
        f"{name} imports {target}"
        for name, path in modules()
        if name != "csgd"
        for target in imports(path)
        if room(target) and FLOORS[room(target)] > FLOORS[room(name)]
    ]
    assert up == []


def test_functions_of_the_pipeline_are_small_and_see_no_configuration():
    for path in sorted((ROOT / "csgd" / "pipeline").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            where, names = f"{path.name}: {node.name}", [arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)]
            assert len(names) - (names[:1] in (["self"], ["cls"])) <= 6, where
            assert node.end_lineno - node.lineno < 50, where
            assert "cfg" not in names, where


def test_libraries_stay_in_their_rooms():
    strays = [
        f"{name} imports {target}"
        for name, path in modules()
        for target in imports(path)
        if target.split(".")[0] in ONLY_IN and room(name) not in ONLY_IN[target.split(".")[0]]
    ]
    assert strays == []


def test_the_package_imports_without_hydra_or_wandb():
    code = (
        "import sys, csgd; print(sorted({'hydra', 'omegaconf', 'wandb', 'matplotlib', 'sklearn'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_configuration_is_read_without_torch():
    code = "import sys, run; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_files_of_text_are_utf_8_whatever_the_machine_writes():
    """Pages, cards and tables hold letters that the code page of a Western Windows has not."""
    bare = []
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                text = node.func.attr in ("read_text", "write_text") or (
                    node.func.attr == "open"
                    and any(isinstance(one, ast.Constant) and one.value in ("w", "a", "r") for one in node.args)
                )
                given = [*node.args, *(key.value for key in node.keywords)]
                if text and not any(isinstance(one, ast.Constant) and one.value == "utf-8" for one in given):
                    bare.append(f"{path.name}:{node.lineno}")
    assert bare == []
