"""The site: ``make docs``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import notebooks  # noqa: E402

import pyro_invman  # noqa: E402

project, author, copyright = "pyro_invman", "the pyro_invman authors", "2026, the pyro_invman authors"
version = release = pyro_invman.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
html_theme, html_title, html_math_renderer = "furo", "pyro_invman", "mathml"
templates_path: list[str] = []

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # `make tutorials` executes; here results are shown where there are some
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures carry them
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shapes", "Attributes"]
napoleon_use_rtype = napoleon_use_param = napoleon_use_ivar = False

# README.md and benchmarks/README.md are written for the repository: links to files that are no pages become plain text
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?://|#)([^)]*)\)")
_PAGES = {"benchmarks/README.md": "measured.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def _page(source: str, target: str, title: str = "") -> None:
    text = (ROOT / source).read_text()
    text = _LINK.sub(lambda m: f"[{m[1]}]({_PAGES[m[2]]})" if m[2] in _PAGES else m[1], text)
    text = re.sub(r"\]\((?:\.\./)?docs/([\w.-]+\.png)\)", r"](\1)", text)
    path = HERE / target
    if not path.exists() or path.read_text() != title + text:
        path.write_text(title + text)


_page("README.md", "readme.md")
_page("benchmarks/README.md", "measured.md")
_page("CHANGELOG.md", "changelog.md")
_page("CONTRIBUTING.md", "contributing.md")
notebooks.convert_others()


def _plain_stars(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Shapes like (*batch_shape, n) are no emphasis."""
    for n, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[n] = re.sub(r"(?<!`)\*(?=(\w+[_ ])?shape\b)", r"\\*", line)


# a function's name stands apart from a letter that it is applied to, as in TeX
_APPLIED = re.compile(r"(<mi>(?:log|ln|det)</mi>)(?=<m(?:i|over|sub|sup|subsup)>)")

_WIDE = "overflow: auto hidden; margin: 0.6em 0; padding: 0.2em 0"  # on a narrow screen it scrolls by itself


def _set(display: str) -> tuple[Any, Any]:
    """Formulas as MathML, which browsers set by themselves: pages open from disk, without scripts or a network."""

    def visit(self: Any, node: nodes.Element) -> None:
        tex = node.astext()
        made = convert(tex.replace(r"\arg", r"\text{arg}\,"), display=display)
        made = _APPLIED.sub(r'\1<mspace width="0.17em"/>', made)
        if "\\" in made:
            logging.getLogger(__name__).warning("a formula that cannot be set: %s", tex, location=node)
        self.body.append(made if display == "inline" else f'<div class="math" style="{_WIDE}">{made}</div>\n')
        raise nodes.SkipNode

    return visit, None


def setup(app: Any) -> None:
    """What Sphinx calls."""
    app.add_html_math_renderer("mathml", inline_renderers=_set("inline"), block_renderers=_set("block"))
    app.connect("autodoc-process-docstring", _plain_stars, priority=100)
