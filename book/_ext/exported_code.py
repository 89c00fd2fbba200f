"""Show which cells of a chapter become part of the module, and list that module on the API page.

nbdev marks cells with comments such as `#| export`, and a linter is told by others what to let pass. Readers need not
see those: this extension takes them off the page and puts a quiet line under the code instead, "exported to
diffusionbook.schedules", linked to the API reference. The API reference itself is written here from the
same notebooks, so that it can never forget a module.
"""
import ast
import json
import re
from functools import cache
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref

PACKAGE = "diffusionbook"
API_PAGE = "book/api"
DIRECTIVE = re.compile(r"^#\|.*\n?", re.MULTILINE)
FOR_THE_LINTER = re.compile(r"  # noqa: \w+$", re.MULTILINE)
NAMES_MODULE = re.compile(r"^#\| (?:default_exp|export) (\w+)", re.MULTILINE)


@cache
def modules(book):
    """Map each exported module's name to its notebooks, in the order of the chapters.

    A chapter with `#| default_exp name` begins a module; a later one adds cells to it with `#| export name`.
    """
    found = {}
    for path in sorted(Path(book).glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        for name in dict.fromkeys(NAMES_MODULE.findall(code)):
            found.setdefault(name, []).append(path)
    return found


def public_names(code):
    """Return the functions and classes that the exported `code` defines for users."""
    try:
        body = ast.parse(code).body
    except SyntaxError:
        return []
    names = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [name for name in names if not name.startswith("_")]


def sign(app, module, code):
    """Return the line under an exported cell: where its code goes, linked to the API reference."""
    name = next(iter(public_names(code)), None)
    if name:
        link = pending_xref(refdomain="py", reftype="obj", reftarget=f"{PACKAGE}.{module}.{name}",
                            refexplicit=True, refwarn=True, refdoc=app.env.docname)
    else:
        link = pending_xref(refdomain="std", reftype="ref", reftarget=f"api-{module}",
                            refexplicit=True, refwarn=True, refdoc=app.env.docname)
    link += nodes.inline("", f"{PACKAGE}.{module}")
    return nodes.paragraph("", "exported to ", link, classes=["exported-to"])


def mark_exported_cells(app, doctree):
    """Take nbdev's lines off every code cell; sign the exported ones; drop those left empty."""
    module = None
    for cell in list(doctree.findall(nodes.container)):
        if cell.get("nb_element") != "cell_code":
            continue
        for literal in list(cell.findall(nodes.literal_block)):
            source = literal.parent
            if source.get("nb_element") != "cell_code_source":
                continue
            directives = " ".join(DIRECTIVE.findall(literal.astext()))
            code = FOR_THE_LINTER.sub("", DIRECTIVE.sub("", literal.astext())).strip("\n")
            if default := re.search(r"default_exp (\w+)", directives):
                module = default[1]
            if not code:
                source.parent.remove(source)
                break
            literal[:] = [nodes.Text(code)]
            literal.rawsource = code
            export = re.search(r"#\| export *(\w*)", directives)
            if export and (target := export[1] or module):
                source["classes"].append("exported")
                source += sign(app, target, code)
                label_what_is_built(app, cell, target, code)
        if not cell.children:
            cell.parent.remove(cell)


def label(name):
    """Return the label of a name; Sphinx makes labels lower-case, and `Film` is not `film`."""
    return re.sub("([A-Z])", r"^\1", name).lower()


def label_what_is_built(app, cell, module, code):
    """Give each name that the cell exports a label at the cell, for the links from the API page."""
    labels = app.env.get_domain("std").anonlabels
    for name in public_names(code):
        anchor = f"built-{module}-{name}"
        cell["ids"].append(anchor)
        labels[label(f"{PACKAGE}.{module}.{name}")] = app.env.docname, anchor


def link_to_chapter(app, name, text):
    """Turn "Defined in chapter 05" (or "in the appendix on …") in the docstring of `name` into a link to its cell."""
    pages = {f"book/{path.stem}" for path in modules(Path(app.srcdir) / "book").get(name.split(".")[1], [])}
    if not pages <= app.env.found_docs:
        return text  # a chapter that isn't part of the book yet
    return re.sub(r"Defined in\s+(chapter \w+|the appendix on \w+)", rf":ref:`Defined in \1 <{label(name)}>`", text)


def write_api_page(app, docname, source):
    """Put one section for each exported module where the API page says `<!-- modules -->`."""
    if docname != API_PAGE:
        return
    sections = []
    for name, notebooks in modules(Path(app.srcdir) / "book").items():
        pages = [f"book/{notebook.stem}" for notebook in notebooks]
        links = " and ".join(f"{{doc}}`/{page}`" for page in pages if page in app.env.found_docs)
        chapter = f", built in {links}" if links else ""
        sections.append(
            f"(api-{name})=\n## {name}\n\n`{PACKAGE}.{name}`{chapter}.\n\n"
            f"```{{eval-rst}}\n.. automodule:: {PACKAGE}.{name}\n   :members:\n   :undoc-members:\n```\n")
    source[0] = source[0].replace("<!-- modules -->", "\n".join(sections))


def read_docstrings_as_plain_text(app, what, name, obj, options, lines):
    """Let docstrings be plain English: `x * y` in backticks is code, and a bare * or | is just that sign."""
    def plain(match):
        text = match[0]
        if text.startswith(("``", ":")) or re.fullmatch(r"`[\w.]+`", text):
            return text  # code or mathematics already, or a name to link
        return f"`{text}`" if text.startswith("`") else "\\" + text
    text = re.sub(r"``.+?``|(:\w+:)?`[^`]+`|(?<!\\)[*|]", plain, "\n".join(lines), flags=re.DOTALL)
    text = re.sub(r"(`[\w.]+`)(?=\w)", r"\1\\ ", text)  # `UNet`s: a link, then a letter
    lines[:] = (link_to_chapter(app, name, text) if name.count(".") == 2 else text).split("\n")


def setup(app):
    app.connect("autodoc-process-docstring", read_docstrings_as_plain_text, priority=400)  # before napoleon
    app.connect("doctree-read", mark_exported_cells)
    app.connect("source-read", write_api_page)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
