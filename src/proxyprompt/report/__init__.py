"""Reports: a plain summary dictionary goes in, text comes out.

Nothing here calls a model or reads a result file. :func:`render_html` gives one self-contained page without
script, :func:`render_markdown` a text for a pull request, :func:`print_terminal` a short form for the
command line. The summary is described in :mod:`proxyprompt.report._schema`. :func:`render_queries_html` and
:func:`render_queries_markdown` show what ``verify_queries`` found.
"""

from __future__ import annotations

from .html import render_html
from .markdown import render_markdown
from .queries import render_queries_html, render_queries_markdown
from .terminal import print_terminal

__all__ = [
    "print_terminal",
    "render_html",
    "render_markdown",
    "render_queries_html",
    "render_queries_markdown",
]
