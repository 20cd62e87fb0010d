"""What is told of a run: tables, pictures and a page, from its files alone."""

from csgd.report.page import write_page
from csgd.report.pictures import draw_curves, draw_filters, draw_sizes, draw_widths
from csgd.report.tables import LAYER_HEADER, duration, layer_rows, milliseconds, table, task_of, verdict_table

__all__ = [
    "LAYER_HEADER",
    "draw_curves",
    "draw_filters",
    "draw_sizes",
    "draw_widths",
    "duration",
    "layer_rows",
    "milliseconds",
    "table",
    "task_of",
    "verdict_table",
    "write_page",
]
