"""Docstrings of csgd, which are plain text, as reStructuredText: called by Sphinx for each."""

import re

import csgd

ENTRY = re.compile(r"(?P<names>[\w.,* ]*\w)  +(?P<text>\S.*)")  # name  what it is


def as_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Replaces the lines of a docstring in place."""
    paragraphs = "\n".join(lines).strip("\n").split("\n\n")
    lines[:] = "\n\n".join(map(_paragraph, paragraphs)).splitlines()


def _paragraph(text: str) -> str:
    """Indented lines are code; lines that begin with a name and two spaces, and what hangs under them, a list."""
    rows = text.splitlines()
    if all(row.startswith("    ") for row in rows):
        return "::\n\n" + text
    if ENTRY.fullmatch(rows[0]) and all(row.startswith(" ") or ENTRY.fullmatch(row) for row in rows):
        return "\n".join(map(_entry, re.split(r"\n(?=\S)", text)))
    return _escaped(text)


def _entry(text: str) -> str:
    first, *rest = text.splitlines()
    found = ENTRY.fullmatch(first)
    return f"``{found['names']}``\n    {_escaped(' '.join([found['text'], *map(str.strip, rest)]))}\n"


def _escaped(text: str) -> str:
    """Prose: what stands between backticks is code, and a link where it is a public name."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\\*|_])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f":py:obj:`{part} <csgd.{part}>`" if part in csgd.__all__ else f"``{part}``" for part in parts[1::2]]
    return "".join(parts)
