"""Tidy notebooks, so that a difference between two versions shows only what somebody changed.

    python tools/clean_notebooks.py book/04_noise_schedules.ipynb ...   (all of book/ when none is named)
    python tools/clean_notebooks.py --check                             (change nothing; exit 1 if untidy)

Keeps the cell metadata `tags`, `mystnb` and `nbdev` and the notebook metadata `kernelspec`, `nbdev` and
`accelerator`; drops the metadata of outputs; joins what was printed in pieces; numbers the cells that ran
1..n; gives every cell an id; stores large figures with at most 256 colours.
"""
import argparse
import base64
import io
import json
import sys
from pathlib import Path

import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CELL_KEYS = {"tags", "mystnb", "nbdev"}
NOTEBOOK_KEYS = {"kernelspec", "nbdev", "accelerator"}
LARGE = 60_000  # bytes of a figure from which on it is stored with a palette
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}


def keep(metadata, keys):
    """Return the entries of `metadata` named in `keys`, without empty ones."""
    return nbformat.from_dict({key: metadata[key] for key in sorted(keys & metadata.keys()) if metadata[key]})


def joined(outputs):
    """Return the outputs, with neighbouring pieces of one stream as one: where a stream breaks is chance."""
    result = []
    for output in outputs:
        output = nbformat.from_dict(output)
        if output.output_type == "stream":
            output.text = "".join(output.text)
            if result and result[-1].output_type == "stream" and result[-1].name == output.name:
                result[-1].text += output.text
                continue
        result.append(output)
    return result


def light(figure):
    """Return a PNG figure in base64 with 256 colours at most, or as it is if it is small, a film or has a palette."""
    if len(figure) * 3 / 4 <= LARGE:
        return figure
    picture = Image.open(io.BytesIO(base64.b64decode(figure)))
    if picture.mode == "P" or getattr(picture, "n_frames", 1) > 1:
        return figure
    stored = io.BytesIO()
    colours = picture.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=3)
    colours.save(stored, "PNG", optimize=True)
    return base64.b64encode(stored.getvalue()).decode()


def clean(text):
    """Return the text of a tidy notebook, given the text of any notebook."""
    notebook = nbformat.from_dict(json.loads(text))
    notebook.nbformat_minor = 5
    notebook.metadata = keep(notebook.metadata | {"kernelspec": KERNELSPEC}, NOTEBOOK_KEYS)
    seen, count = set(), 0
    for number, cell in enumerate(notebook.cells):
        if not cell.get("id") or cell.id in seen:  # Colab saves notebooks without ids
            cell.id = f"cell-{number}"
        seen.add(cell.id)
        cell.metadata = keep(cell.metadata, CELL_KEYS)
        if cell.cell_type != "code":
            continue
        if cell.execution_count is not None:
            cell.execution_count = count = count + 1
        cell.outputs = joined(cell.outputs)
        for output in cell.outputs:
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
            if "execution_count" in output:
                output.execution_count = cell.execution_count
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = light("".join(output.data["image/png"]))
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of book/")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a notebook is untidy")
    arguments = parser.parse_args()
    untidy = []
    for path in arguments.notebooks or sorted((ROOT / "book").glob("*.ipynb")):
        before = path.read_text(encoding="utf-8")
        after = clean(before)
        if before != after:
            untidy.append(path)
            if not arguments.check:
                path.write_text(after, encoding="utf-8")
    if arguments.check and untidy:
        names = " ".join(str(path) for path in untidy)
        sys.exit(f"Not tidy: {names}; run: python tools/clean_notebooks.py {names}")


if __name__ == "__main__":
    main()
