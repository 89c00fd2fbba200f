"""What readers take with them: a chapter to Kaggle, beside Colab and Binder, and all notebooks as one zip file."""
import zipfile
from pathlib import Path

KAGGLE = "https://kaggle.com/kernels/welcome?src="
ZIP = "_static/diffusionbook-notebooks.zip"


def kaggle_link(colab_link):
    """Return the address that opens in Kaggle what `colab_link` opens in Colab."""
    return KAGGLE + "https://github.com/" + colab_link.partition("/github/")[2]


def add_kaggle_button(app, pagename, templatename, context, doctree):
    """Put a button beside the one for Colab, which follows the repository setting in _config.yml."""
    for group in context.get("header_buttons", []):
        for button in [button for button in group.get("buttons", []) if button["text"] == "Colab"]:
            group["buttons"].append({"type": "link", "text": "Kaggle", "tooltip": "Launch on Kaggle",
                                     "icon": "fab fa-kaggle", "url": kaggle_link(button["url"])})


def zip_notebooks(app, exception):
    """Write all notebooks of the book, with their stored outputs, into one file that any build makes alike."""
    if exception or app.builder.format != "html":
        return
    with zipfile.ZipFile(Path(app.outdir) / ZIP, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(Path(app.env.doc2path(name)) for name in app.env.found_docs):
            if path.suffix == ".ipynb":
                archive.writestr(zipfile.ZipInfo(f"diffusionbook/{path.name}"), path.read_bytes(),
                                 zipfile.ZIP_DEFLATED)


def setup(app):
    app.connect("html-page-context", add_kaggle_button, priority=900)  # after the theme's own buttons
    app.connect("build-finished", zip_notebooks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
