"""Mend names and roles that the theme, MyST-NB and docutils give, so that screen readers say what the eye sees.

A button whose text reads "Show code cell source" must not be called "Toggle hidden content": somebody who speaks to the
computer says what is written there. axe-core checks it in tests/book/test_pages.py.
"""
import re
from pathlib import Path

MENDS = {
    r'<summary aria-label="Toggle hidden content">': "<summary>",
    r'(search-button-field [^>]*) aria-label="Search"': r"\1",  # its text says "Search Ctrl+K"
    r'(<i class="theme-switch [^>]*?) +title="[^"]*"': r"\1",  # the button itself is called "Color mode"
    r'<div role="list" class="citation-list">': '<div class="citation-list">',  # its children are no list items
    r'(<div class="citation" id="\w+") role="doc-biblioentry"': r"\1",
}


def mend(text):
    """Return the text of a page with better names."""
    for wrong, right in MENDS.items():
        text = re.sub(wrong, right, text)
    return text


def mend_pages(app, exception):
    """Go through all pages when they are written."""
    if exception or app.builder.format != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        before = path.read_text(encoding="utf-8")
        if (after := mend(before)) != before:
            path.write_text(after, encoding="utf-8")


def setup(app):
    app.connect("build-finished", mend_pages)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
