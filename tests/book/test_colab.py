"""A chapter alone, as Colab has it: one notebook in an empty folder, the wheel, its dependencies and Jupyter."""
import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata

import nbformat
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHAPTERS = ["00_start_here", "04_noise_schedules"]

# Python runs this file when a kernel starts. It leaves importable the standard library, what lies in the
# folder of the installed wheel, and the packages of the environment that are not listed as absent.
SITECUSTOMIZE = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

ABSENT = set({absent!r})

class OnlyInstalled:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if path is None and name.partition(".")[0] in ABSENT:
            return None
        return PathFinder.find_spec(name, path, target)

    find_distributions = PathFinder.find_distributions  # matplotlib finds its backends by entry points

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, OnlyInstalled]
"""
LAST_CELL = """
import importlib.util, json
import diffusionbook
print(json.dumps({"file": diffusionbook.__file__, "visible": [
    name for name in ("diffusers", "transformers", "nbdev", "pytest", "accelerate", "pandas")
    if importlib.util.find_spec(name)]}))
"""


def closure(requirements):
    """Return the names of all distributions that the requirements bring with them."""
    found, waiting = set(), [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            waiting += [Requirement(text) for text in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue  # for another platform or another build of PyTorch
        found.add(name)
    return found


def test_wheel_holds_module_data_and_weights_only(root, wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = root / "diffusionbook"
    expected = {path.relative_to(root).as_posix() for path in source.rglob("*")
                if path.is_file() and "__pycache__" not in path.parts and path.name != "_modidx.py"}
    assert names == expected


def test_wheel_installs_the_command(wheel):
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "diffusionbook = diffusionbook.__main__:main" in archive.read(entry_points).decode()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_runs_alone(root, wheel, tmp_path, monkeypatch, chapter):
    site, folder = tmp_path / "site", tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site,
                    wheel], check=True)
    core = [text for text in metadata.requires("diffusionbook") if "extra ==" not in text]
    there = closure([*core, "ipykernel"]) | {"diffusionbook", "pip"}
    absent = [module for module, owners in metadata.packages_distributions().items()
              if not {canonicalize_name(owner) for owner in owners} & there]
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE.format(absent=absent))
    folder.mkdir()
    shutil.copy(root / "book" / f"{chapter}.ipynb", folder)
    for name in ("PYTHONPATH", "JUPYTER_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(site))

    notebook = nbformat.read(folder / f"{chapter}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(LAST_CELL))
    NotebookClient(notebook, kernel_name="python3", timeout=600,
                   resources={"metadata": {"path": str(folder)}}).execute()
    seen = json.loads(re.search(r"\{.*\}", notebook.cells[-1].outputs[-1]["text"])[0])
    assert seen["file"] == str(site / "diffusionbook" / "__init__.py")
    assert seen["visible"] == []
