"""Put the glossary's words where they are used: beside each link to an entry stands its definition, shown on hover."""
from docutils import nodes
from sphinx import addnodes

GLOSSARY = "book/glossary"
ANCHOR = "#term-"


def definitions(app):
    """Map the anchor of each glossary entry to the first paragraph of its definition."""
    found = {}
    for entry in app.env.get_doctree(GLOSSARY).findall(nodes.definition_list_item):
        paragraph = next(entry.findall(nodes.paragraph))
        for term in entry.findall(nodes.term):
            found |= {anchor: paragraph for anchor in term["ids"]}
    return found


def card(paragraph):
    """A copy of a definition for inside a line: its words and formulas, without links."""
    copy = paragraph.deepcopy()
    for link in list(copy.findall(lambda node: isinstance(node, (nodes.reference, addnodes.pending_xref)))):
        link.replace_self(nodes.Text(link.astext()))
    return nodes.inline("", "", *copy.children, classes=["term-card"])


def add_cards(app, doctree, docname):
    """Wrap every link to a glossary entry together with its card, on pages where something can hover."""
    if docname == GLOSSARY or app.builder.format != "html":
        return
    known = None
    for link in list(doctree.findall(nodes.reference)):
        _, sign, name = link.get("refuri", "").partition(ANCHOR)
        if sign and not isinstance(link.parent, (nodes.title, nodes.caption)):
            known = known or definitions(app)
            link.replace_self(nodes.inline("", "", link.deepcopy(), card(known["term-" + name]),
                                           classes=["term-hover"]))


def setup(app):
    app.connect("doctree-resolved", add_cards)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
