"""What is told of a run: tables, pictures and a page, from its files alone."""

from csgd.report.collapse import draw_collapse
from csgd.report.curves import draw_curves
from csgd.report.page import write_page
from csgd.report.pictures import draw_filters, draw_outputs, draw_sensitivity, draw_sizes, draw_widths
from csgd.report.spaces import draw_spaces
from csgd.report.tables import (
    LAYER_HEADER,
    baseline_note,
    duration,
    layer_rows,
    milliseconds,
    table,
    task_of,
    tested_on,
    verdict_table,
)

__all__ = [
    "LAYER_HEADER",
    "baseline_note",
    "draw_collapse",
    "draw_curves",
    "draw_filters",
    "draw_outputs",
    "draw_sensitivity",
    "draw_sizes",
    "draw_spaces",
    "draw_widths",
    "duration",
    "layer_rows",
    "milliseconds",
    "table",
    "task_of",
    "tested_on",
    "verdict_table",
    "write_page",
]
