"""Give every page that holds a slider, `<div data-slider="…">`, the scripts and the style that make it one."""

SCRIPTS = ("maths.js", "pictures.js", "sliders.js", "figures.js")


def add_files(app, pagename, templatename, context, doctree):
    """Add them to this page only."""
    if "<div data-slider=" in context.get("body", ""):
        app.add_css_file("sliders/sliders.css")
        for name in SCRIPTS:
            app.add_js_file(f"sliders/{name}", loading_method="defer")


def setup(app):
    app.connect("html-page-context", add_files)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
