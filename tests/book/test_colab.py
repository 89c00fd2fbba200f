"""A chapter alone, as Colab has it: one notebook in an empty folder, the wheel, its dependencies and Jupyter."""
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import colab
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from run_alone import Run, chapters, run_alone

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
def test_chapter_runs_alone(root, wheel, tmp_path, chapter):
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site,
                    wheel], check=True)
    core = [text for text in metadata.requires("diffusionbook") if "extra ==" not in text]
    there = closure([*core, "ipykernel"]) | {"diffusionbook", "pip"}
    absent = [module for module, owners in metadata.packages_distributions().items()
              if not {canonicalize_name(owner) for owner in owners} & there]
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE.format(absent=absent))
    variables = {name: value for name, value in os.environ.items() if name != "JUPYTER_PATH"}
    variables["PYTHONPATH"] = str(site)
    run = run_alone(root / "book" / f"{chapter}.ipynb", environment=variables, last_cell=LAST_CELL, timeout=600)
    assert not run.error and 0.1e9 < run.memory < 4e9 and run.seconds > 1, run
    seen = json.loads(re.search(r"\{.*\}", run.answer)[0])
    assert seen["file"] == str(site / "diffusionbook" / "__init__.py")
    assert seen["visible"] == []


def test_colab_versions_constrain_what_chapters_need():
    pins = colab.constraints().split()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins) and len(pins) > 500
    names = {pin.partition("==")[0] for pin in pins}
    assert {"torch", "numpy", "diffusers", "transformers", "ipykernel"} <= names
    assert not any(name.startswith(("nvidia-", "cuda-")) for name in names)


def test_colab_table_keeps_the_rows_of_other_chapters(root):
    lines = {"00_start_here": colab.row(Path("00_start_here.ipynb"), Run(90, 1_260_000_000)),
             "01_heat": colab.row(Path("01_heat.ipynb"), Run(3, error="KeyError: a|b"))}
    text = colab.page(lines, "Python 3.13")
    assert "| `00_start_here` | 1.5 | 1.3 | ran to the end |" in text and r"failed: KeyError: a\|b" in text
    assert colab.rows(text).items() >= lines.items()
    assert list(colab.rows(text)) == [path.stem for path in chapters(root)]
