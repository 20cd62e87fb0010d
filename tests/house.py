"""The house in a picture, from what the modules import: python tests/house.py > docs/house.svg

Needs Graphviz's `dot`.  Rooms stand on their floors, as tests/test_architecture.py has them; an arrow is an import, but
those that lead over other rooms are left out, and those of csgd.errors, which every room may import.
"""

import re
import subprocess

from test_architecture import FLOORS, imports, modules, room

LOOK = """
graph [fontname="sans-serif", fontsize=12, labeljust=r, style="rounded,filled", color="#e8eef4", bgcolor=white]
node [fontname="sans-serif", fontsize=11, shape=box, height=0.3]
node [style="rounded,filled", fillcolor=white, color="#7a8da0"]
edge [color="#7a8da0", arrowsize=0.5]
"""
NAMES = ("pure", "acts on a model", "judges, tells", "composes", "street")


def stairs() -> set[tuple[str, str]]:
    """Which room imports which, without what other imports imply."""
    pairs = {(room(name), room(target)) for name, path in modules() for target in imports(path)}
    direct = {(a, b) for a, b in pairs if a and b and a != b and b != "csgd.errors"}
    return {(a, b) for a, b in direct if b not in _reached(a, direct - {(a, b)})}


def _reached(start: str, direct: set[tuple[str, str]]) -> set[str]:
    reached, fresh = set(), {start}
    while fresh:
        fresh = {b for a, b in direct if a in fresh} - reached
        reached |= fresh
    return reached


def drawing() -> str:
    """The picture as a graph of dot's."""
    floors = [
        f'subgraph cluster_{floor} {{ label="{floor}  {name}"; margin=14; '
        + " ".join(f'"{one}" [label="{one.removeprefix("csgd.")}"];' for one, on in FLOORS.items() if on == floor)
        + " }"
        for floor, name in enumerate(NAMES)
    ]
    arrows = (f'"{a}" -> "{b}";' for a, b in sorted(stairs()))
    return "\n".join(["digraph house {", LOOK, *floors, *arrows, "}"])


def drawn(svg: str) -> tuple[set[str], set[tuple[str, str]]]:
    """Rooms and stairs in the picture."""
    titles = [title.replace("&#45;", "-").replace("&gt;", ">") for title in re.findall("<title>(.*?)</title>", svg)]
    stairs = {tuple(title.split("->")) for title in titles if "->" in title}
    return {title for title in titles if title in FLOORS}, stairs


if __name__ == "__main__":
    print(subprocess.run(["dot", "-Tsvg"], input=drawing(), capture_output=True, text=True, check=True).stdout)
