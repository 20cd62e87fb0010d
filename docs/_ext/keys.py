"""Every key of the configuration, from conf/ alone: defaults as they compose, meanings as comments there say them, and
allowed values in the words in which others are refused."""

import ast
import json
import re
from dataclasses import fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from conf import schema

CONF = Path(schema.__file__).parent
NEEDS = {"milestones": {"decay": "step"}}  # what must hold beside a key so that its own range is asked for


def tables() -> str:
    """All keys as Markdown, a table for each block of the schema."""
    cfg = defaults()
    rows: dict[str, list[str]] = {}
    for key, kind, meaning in keys():
        cells = f"`{key}`", f"`{shown(OmegaConf.to_container(cfg), key)}`", allowed(cfg, key, kind), meaning
        row = " | ".join(cell.replace("|", "\\|") for cell in cells)
        rows.setdefault(key.rpartition(".")[0] or "The run", []).append(f"| {row} |")
    header = "| key | default | allowed | means |\n|---|---|---|---|\n"
    return "\n\n".join(f"### {block}\n\n{header}" + "\n".join(found) for block, found in rows.items())


def defaults() -> DictConfig:
    """The configuration that a run without overrides has."""
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config")


def keys(block: type = schema.Config, prefix: str = ""):
    """(key, type, meaning) of every key of the schema; KeyError where no comment says what one means."""
    means = meanings(block)
    for field in fields(block):
        kind = get_type_hints(block)[field.name]
        if is_dataclass(kind):
            continue
        if kind != dict[str, Any]:  # a group whose keys are those of what it calls
            yield f"{prefix}{field.name}", kind, means[field.name]
    for field in fields(block):
        if is_dataclass(kind := get_type_hints(block)[field.name]):
            yield from keys(kind, f"{prefix}{field.name}.")


def meanings(block: type) -> dict[str, str]:
    """The comments behind the fields of a block, in the schema and in config.yaml."""
    source = (CONF / "schema.py").read_text()
    lines = source.splitlines()
    (found,) = [
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == block.__name__
    ]
    means = {
        node.target.id: lines[node.end_lineno - 1].partition("  # ")[2]
        for node in found.body
        if isinstance(node, ast.AnnAssign)
    }
    means = {name: told for name, told in means.items() if told}
    if block is not schema.Config:
        return means
    return dict(re.findall(r"^(\w+):.*?  # (.*)$", (CONF / "config.yaml").read_text(), re.MULTILINE)) | means


def allowed(cfg, key: str, kind: Any) -> str:
    """The values that a key takes: words, or what is said where another one is refused."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    null = " `null`" if type(None) in kinds else ""
    (kind,) = [one for one in kinds if one is not type(None)]
    if kind is bool:
        return "`true` `false`"
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return " ".join(f"`{member}`" for member in kind) + null
    if kind in (str, list[str], list[int]):
        words = {str: "text", list[str]: "a list of text", list[int]: "a list of whole numbers"}
        return words[kind] + (" or `null`" if null else "")
    block, _, name = key.rpartition(".")
    wrong = OmegaConf.merge(cfg)
    for beside, value in NEEDS.get(name, {}).items():
        OmegaConf.update(wrong, f"{block}.{beside}", value)
    OmegaConf.update(wrong, key, [-1.0] if get_origin(kind) is list else -1)
    try:
        OmegaConf.to_object(wrong)
    except schema.ConfigError as error:
        return re.fullmatch(r".*? must be (.*), got .*", str(error))[1]
    raise AssertionError(f"{key} takes -1, so its range is not known")


def shown(values: Any, key: str) -> str:
    """The default of a key as yaml writes it; what is to be looked up in the environment as it is written there."""
    for part in key.split("."):
        values = values[part]
    return values if isinstance(values, str) else json.dumps(values)


def options() -> str:
    """The options of every group, what they set and what their comments say."""
    rows = ["| option | sets |", "|---|---|"]
    for path in sorted(CONF.glob("*/*.yaml")):
        lines = path.read_text().splitlines()
        told = " ".join(line[2:] for line in lines if line.startswith("# ") and "@package" not in line)
        sets = " · ".join(f"`{line.strip()}`" for line in lines if line.strip() and not line.startswith("#"))
        rows.append(f"| `{path.parent.name}={path.stem}` | {told} {sets} |".replace("  ", " "))
    return "\n".join(rows)
