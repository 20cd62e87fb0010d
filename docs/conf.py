"""The documentation: python -m sphinx -W -n --keep-going docs build/docs"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

import docstrings  # noqa: E402
import keys  # noqa: E402

import csgd  # noqa: E402

project = "csgd"
html_title = "csgd"
author = "the authors of csgd"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"top_of_page_buttons": []}
mathjax_path = "mathjax/tex-svg.js"  # MathJax 3.2.2, one file: nothing is fetched from elsewhere

myst_enable_extensions = ["dollarmath", "substitution", "deflist", "colon_fence"]
myst_heading_anchors = 3
myst_substitutions = {"keys": keys.tables(), "options": keys.options()}

nb_execution_mode = "force"  # a cache would keep what older code has printed
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 120
nb_merge_streams = True
nb_render_markdown_format = "myst"  # which knows tables

autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
nitpick_ignore_regex = [("py:.*", r"(?!csgd\.\w+$).*")]  # what is not ours, or not public, has no page

for name in csgd.__all__:  # a public name is csgd.NAME, wherever it is written
    getattr(csgd, name).__module__ = "csgd"


def setup(app) -> None:
    app.connect("autodoc-process-docstring", docstrings.as_rst)
    app.connect("builder-inited", prepare_kernels)


def prepare_kernels(app) -> None:
    """What the cells of the pages find in their environment: the package, one thread, where the site is built."""
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CSGD_REPOSITORY"], os.environ["CSGD_SITE"] = str(HERE.parent), str(app.outdir)
