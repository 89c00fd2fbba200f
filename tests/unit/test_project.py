"""The project as a whole: notebooks and modules agree, settings agree, and nothing has grown too large."""
import ast
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import clean_notebooks
import compute_cards
import numpy as np
import pytest
import repository
import torch
import yaml
from exported_code import modules
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from PIL import Image

from diffusionbook.autoencoders import VAE, VAEConfig
from diffusionbook.prior import DiffusionPrior, PriorConfig
from diffusionbook.text import TextConfig, TextEncoder
from diffusionbook.unet import UNet, UNetConfig

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HAND_WRITTEN = {"__main__.py"}
MB = 1024**2

TEMPLATE = ROOT / "templates" / "chapter.ipynb"

every_notebook = pytest.mark.parametrize("path", [*NOTEBOOKS, TEMPLATE], ids=lambda path: path.name)


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code_cells(path):
    return [cell for cell in cells(path) if cell["cell_type"] == "code"]


def tags(cell):
    return cell["metadata"].get("tags", [])


def printed(cell):
    """All text in the stored outputs of a cell."""
    parts = []
    for output in cell["outputs"]:
        parts += ["".join(output.get("text", "")), "".join(output.get("traceback", []))]
        parts += ["".join(text) for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(parts)


# --- notebooks and modules ---------------------------------------------------------------------
def test_modules_are_what_the_notebooks_give(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "book", tmp_path / "book")
    (tmp_path / "diffusionbook").mkdir()
    shutil.copy(ROOT / "diffusionbook" / "__init__.py", tmp_path / "diffusionbook")  # holds the version
    environment = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
    subprocess.run([Path(sys.executable).with_name("nbdev-export")], cwd=tmp_path, env=environment, check=True)

    def written(folder):
        paths = (folder / "diffusionbook").glob("*.py")
        return {p.name: p.read_text() for p in paths if p.name not in HAND_WRITTEN | {"_modidx.py"}}

    ours, fresh = written(ROOT), written(tmp_path)
    assert ours.keys() == fresh.keys(), "modules without a notebook, or notebooks without a module"
    stale = [name for name in ours if ours[name] != fresh[name]]
    assert not stale, f"{stale} differ from their notebooks; run `make export` and commit the result"


def test_every_notebook_exports_to_one_module():
    assert sorted(path for paths in modules(ROOT / "book").values() for path in paths) == NOTEBOOKS


def test_every_public_name_is_documented():
    """Where it is defined, what it is, and for tensors the shapes or ranges; and what raises says so."""
    poor = []
    for path in sorted((ROOT / "diffusionbook").glob("[a-z]*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            text, name = ast.get_docstring(node) or "", f"{path.stem}.{node.name}"
            if not re.search(r"Defined in\s+(chapter \d\d|appendix [A-Z]|the appendix)", text):
                poor.append(f"{name} doesn't say `Defined in chapter NN`")
            if len(text.partition("\n")[0]) < 20:
                poor.append(f"{name}: its first line says too little")
            if isinstance(node, ast.ClassDef):
                continue
            types = [ast.unparse(part.annotation) for part in node.args.args + node.args.kwonlyargs if part.annotation]
            told = re.sub(r"\([A-Z][^()]*\d{4}[^()]*\)", "", text)  # a citation is no shape
            if {"Tensor", "torch.Tensor"} & set(types) and not re.search(r"[(\[]|shape|[Ll]ike |Takes and", told):
                poor.append(f"{name} takes tensors and doesn't say their shape or range")
            if any(isinstance(part, ast.Raise) for part in ast.walk(node)) and not re.search("[Rr]aises?", text):
                poor.append(f"{name} doesn't say what it raises")
    assert not poor, "\n".join(poor)


@pytest.mark.parametrize("arguments", [["."], ["--isolated", "--select", "F821,E9", "diffusionbook"]],
                         ids=["style", "undefined names"])
def test_ruff_finds_nothing(arguments):
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", *arguments], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- each notebook -----------------------------------------------------------------------------
@every_notebook
def test_notebook_begins_as_a_chapter(path):
    first, second = cells(path)[:2]
    assert re.match(r"# .+\n+> .+", "".join(first["source"])), "the first cell needs `# Title` and a `> …` line"
    setup = "".join(second["source"])
    assert second["cell_type"] == "code"
    assert 'find_spec("diffusionbook") is None' in setup
    assert f'%pip install -q "diffusionbook @ git+{repository.setting()}"' in setup
    assert "pick_device()" in setup
    assert {"hide-input", "nbval-ignore-output"} <= set(tags(second))


@every_notebook
def test_notebook_ran_from_top_to_bottom(path):
    code = code_cells(path)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), (
        f"run it: make outputs CHAPTER=book/{path.name}")
    for cell in code:
        errors = [output for output in cell["outputs"] if output["output_type"] == "error"]
        assert not errors or "raises-exception" in tags(cell), errors


@every_notebook
def test_notebook_is_tidy_and_small(path):
    text = path.read_text(encoding="utf-8")
    assert clean_notebooks.clean(text) == text, f"run: .venv/bin/python tools/clean_notebooks.py book/{path.name}"
    assert len(text.encode()) <= MB


@every_notebook
@pytest.mark.parametrize("residue", [
    pytest.param(r"(?<![\w.])/(?:home|root|tmp|usr|opt|work|Users|content)/\S+|[A-Z]:\\\\", id="path"),
    pytest.param(r"\b20\d\d-\d\d-\d\d\b|\b\d\d:\d\d:\d\d\b", id="date or time"),
    pytest.param(r"\d%\||\d(it/s|s/it)\b", id="progress bar"),
    pytest.param(r"\w*Warning: ", id="warning"),
])
def test_stored_outputs_hold_no(path, residue):
    for cell in code_cells(path):
        found = re.search(residue, printed(cell))
        assert not found, f"{found[0]!r} in the output of:\n{''.join(cell['source'])}"


@every_notebook
def test_exercise_stubs_fail_and_solutions_pass(path):
    code = code_cells(path)
    stubs, checks, solutions = ([cell for cell in code if tag in tags(cell)]
                                for tag in ("exercise", "check", "solution"))
    assert len(stubs) == len(checks) == len(solutions)
    for cell in checks:
        assert "✗" in printed(cell) and "✓" not in printed(cell), "".join(cell["source"])
    for cell in solutions:
        assert "✓" in printed(cell) and "✗" not in printed(cell), "".join(cell["source"])


# --- compute cards -----------------------------------------------------------------------------
@every_notebook
def test_compute_card_has_the_form_that_the_tool_writes(path):
    parts = compute_cards.card(path)
    assert compute_cards.CARD.fullmatch(compute_cards.write(**parts)).groupdict() == parts


def test_compute_card_is_rewritten_and_what_the_author_says_stays(tmp_path):
    path = tmp_path / "chapter.ipynb"
    shutil.copy(TEMPLATE, path)
    gpu = f", {compute_cards.minutes(31)} on an NVIDIA H100,"
    compute_cards.update(path, gpu=gpu)
    compute_cards.update(path, cpu=compute_cards.minutes(61), cores="two CPU cores", memory=" and 1.2 GB of memory")
    card = ("**Compute card:** at most 1.5 minutes on two CPU cores, 1 minute on an NVIDIA H100, and 1.2 GB of memory, "
            "everything included.")
    said = cells(path)[3]["source"]
    assert card in "".join(said) and "**Needs:**" in "".join(said)
    before, after = TEMPLATE.read_text(), path.read_text()
    assert sum(a != b for a, b in zip(before.splitlines(), after.splitlines(), strict=True)) == 1
    path.write_text(after.replace("Compute card", "Costs"))
    with pytest.raises(ValueError, match="must hold one compute card, found 0"):
        compute_cards.card(path)


@pytest.mark.parametrize(("seconds", "words"), [(3, "half a minute"), (30, "half a minute"), (31, "1 minute"),
                                                (61, "1.5 minutes"), (120, "2 minutes")])
def test_minutes_are_rounded_up(seconds, words):
    assert compute_cards.minutes(seconds) == words


@pytest.mark.parametrize("before", ["colab", "old", "twice"])
def test_clean_notebooks_tidies(before):
    code = {"cell_type": "code", "execution_count": 7, "id": "same", "source": "1",
            "metadata": {"tags": ["a"], "colab": {"x": 1}, "execution": {"iopub": "2026-11-23"}},
            "outputs": [{"output_type": "execute_result", "execution_count": 7, "data": {"text/plain": "1"},
                         "metadata": {"needs_background": "light"}}]}
    notebook = {"cells": [code, code], "metadata": {"colab": {}, "accelerator": "GPU"}, "nbformat": 4,
                "nbformat_minor": 5}
    if before == "old":
        notebook["nbformat_minor"] = 0
        notebook["cells"] = [{k: v for k, v in code.items() if k != "id"}] * 2
    text = clean_notebooks.clean(json.dumps(notebook))
    if before == "twice":
        assert clean_notebooks.clean(text) == text
    tidy = json.loads(text)
    assert tidy["nbformat_minor"] == 5 and set(tidy["metadata"]) == {"accelerator", "kernelspec"}
    assert len({cell["id"] for cell in tidy["cells"]}) == 2
    assert [cell["execution_count"] for cell in tidy["cells"]] == [1, 2]
    assert [cell["outputs"][0]["execution_count"] for cell in tidy["cells"]] == [1, 2]
    assert all(cell["metadata"] == {"tags": ["a"]} for cell in tidy["cells"])
    assert all(cell["outputs"][0]["metadata"] == {} for cell in tidy["cells"])


def test_clean_notebooks_joins_what_was_printed_in_pieces():
    pieces = [{"output_type": "stream", "name": name, "text": [text]}
              for name, text in [("stdout", "a\n"), ("stdout", "b\n"), ("stderr", "c"), ("stdout", "d")]]
    code = {"cell_type": "code", "execution_count": 1, "id": "a", "source": "1", "metadata": {}, "outputs": pieces}
    text = clean_notebooks.clean(json.dumps({"cells": [code], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    outputs = json.loads(text)["cells"][0]["outputs"]
    assert ["".join(output["text"]) for output in outputs] == ["a\nb\n", "c", "d"]


def test_clean_notebooks_stores_large_figures_with_a_palette():
    noise = np.random.default_rng(0).integers(0, 255, (2, 200, 200, 3), dtype=np.uint8)
    flat = np.full((200, 200, 3), 200, np.uint8)
    figures = []
    for pictures in ([noise[0]], [flat], list(noise)):
        file, frames = io.BytesIO(), [Image.fromarray(picture) for picture in pictures]
        frames[0].save(file, "PNG", save_all=len(frames) > 1, append_images=frames[1:])
        figures.append(base64.b64encode(file.getvalue()).decode())
    large, small, film = map(clean_notebooks.light, figures)
    assert (small, film) == (figures[1], figures[2]) and len(large) < len(figures[0]) / 2
    assert clean_notebooks.light(large) == large
    stored = Image.open(io.BytesIO(base64.b64decode(large)))
    assert stored.mode == "P"
    assert np.abs(np.asarray(stored.convert("RGB")).astype(int) - noise[0]).mean() < 20  # the worst case, pure noise


# --- one setting for the repository ------------------------------------------------------------
def followers(root):
    return sorted({path for pattern in repository.FOLLOWERS for path in root.glob(pattern)})


def test_every_link_follows_the_repository_setting():
    here = repository.owner_and_name(repository.setting())
    name = here.partition("/")[2]
    for path in followers(ROOT):
        text = path.read_text(encoding="utf-8")
        ours = re.findall(rf"github\.com/([\w.-]+/{re.escape(name)})(?![\w-])", text)
        ours += re.findall(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)", text)
        wrong = set(ours) - {here, f"you/{name}", "you/fork"}  # the example in CONTRIBUTING.md
        assert not wrong, f"{path.name} names {wrong}, the setting says {here}"
        for chapter in re.findall(r"colab\.research\.google\.com/github/[\w.-]+/[\w.-]+/blob/main/([\w./-]+)", text):
            assert (ROOT / chapter).is_file(), f"{path.name} links to {chapter}, which does not exist"
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert config["repository"]["url"] == PROJECT["urls"]["Repository"] == repository.setting()


def test_a_fork_points_the_whole_book_at_itself(tmp_path):
    shutil.copytree(ROOT / "book", tmp_path / "book")
    for path in followers(ROOT):
        if path.parent == ROOT:
            shutil.copy(path, tmp_path)
    old = repository.owner_and_name(repository.setting(tmp_path))
    changed = {str(path) for path in repository.follow("https://github.com/someone/else.git", tmp_path)}
    assert {"pyproject.toml", "_config.yml", "README.md", "CITATION.cff"} <= changed
    assert {f"book/{path.name}" for path in NOTEBOOKS} <= changed
    assert repository.setting(tmp_path) == "https://github.com/someone/else"
    for path in followers(tmp_path):
        assert f"/{old}" not in path.read_text(encoding="utf-8"), path
    assert not repository.follow("https://github.com/someone/else", tmp_path)


@pytest.mark.parametrize("url", ["", "github.com/you/fork", "https://gitlab.com/you/fork", "https://github.com/you"])
def test_a_repository_that_is_not_on_github_is_refused(url):
    with pytest.raises(ValueError, match="like https://github.com/you/fork"):
        repository.follow(url)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_front_pages_link_to_files_that_exist(name):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), f"{name} links to {target}"


def test_readme_lists_the_chapters_of_the_book():
    toc = re.findall(r"file: (book/\w+)", (ROOT / "_toc.yml").read_text())
    chapters = [name for name in toc if (ROOT / f"{name}.ipynb").exists()]
    assert re.findall(r"/blob/main/(book/\w+)\.ipynb", (ROOT / "README.md").read_text()) == chapters


def test_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = re.search(r'__version__ = "(.+)"', (ROOT / "diffusionbook" / "__init__.py").read_text())[1]
    assert citation["version"] == version
    assert citation["repository-code"] == repository.setting()


# --- dependencies ------------------------------------------------------------------------------
CORE = [Requirement(text) for text in PROJECT["dependencies"]]
ALL = CORE + [Requirement(text) for extra in PROJECT["optional-dependencies"].values() for text in extra]
COLAB_PYTHON = {"python_version": "3.13", "python_full_version": "3.13.0", "sys_platform": "linux",
                "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix",
                "implementation_name": "cpython", "platform_python_implementation": "CPython", "extra": ""}


def pinned(path):
    """Read `name==version` lines."""
    lines = re.findall(r"^([\w.-]+)==(\S+)", path.read_text(), re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in lines}


def test_constraints_pin_every_dependency():
    pins = pinned(ROOT / "constraints.txt")
    for requirement in ALL:
        version = pins.get(canonicalize_name(requirement.name))
        assert version, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} but {version} is pinned"


def test_dependencies_are_lower_bounds():
    assert all(spec.operator == ">=" for requirement in CORE for spec in requirement.specifier)


def test_installing_into_colab_changes_no_package():
    """What Colab has satisfies us; what it lacks needs nothing that Colab has in another version."""
    colab = pinned(ROOT / "tests" / "data" / "colab-pip-freeze.gpu.txt")
    assert len(colab) > 500
    waiting, new = list(CORE), {}
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate(COLAB_PYTHON):
            continue
        if name in colab:
            assert requirement.specifier.contains(colab[name], prereleases=True), (
                f"{requirement} would change Colab's {name} {colab[name]}")
        elif name not in new:
            distribution = metadata.distribution(name)
            assert requirement.specifier.contains(distribution.version, prereleases=True)
            new[name] = distribution.version
            waiting += [Requirement(text) for text in distribution.requires or []]
    assert set(new) == {"ftfy"}, "Colab has everything but ftfy; is a new dependency worth a download?"


def test_environment_yml_follows_pyproject():
    conda_names = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    listed = [item for item in environment["dependencies"] if isinstance(item, str)]
    expected = {conda_names.get(r.name, r.name) + str(r.specifier) for r in CORE}
    assert set(listed) == expected | {"python>=3.11,<3.14", "pip"}
    extras = ",".join(sorted(PROJECT["optional-dependencies"]))
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert sorted(re.findall(r"\w+", pip[0].partition("[")[2])) == extras.split(",")
    assert PROJECT["requires-python"] == ">=3.11"


# --- sizes -------------------------------------------------------------------------------------
def test_data_and_weights_fit():
    """recipes/budget.toml names every file or folder that ships, and none has outgrown it."""
    budget = tomllib.loads((ROOT / "recipes" / "budget.toml").read_text())
    sizes = {}
    for kind in ("data", "weights"):
        folder = ROOT / "diffusionbook" / kind
        for path in filter(Path.is_file, folder.rglob("*")):
            assert path.stat().st_size <= 50 * MB, path
            name = path.relative_to(folder).as_posix()
            item = next((item for item in budget[kind] if name == item or name.startswith(item + "/")), None)
            if path.suffix in (".parquet", ".safetensors"):
                assert item, f"{kind}/{name} is not in recipes/budget.toml"
            sizes[kind, item or name] = sizes.get((kind, item or name), 0) + path.stat().st_size
    for (kind, item), size in sizes.items():
        assert size <= budget[kind].get(item, 100_000), f"{kind}/{item} has {size:,} bytes"
    assert sum(sizes.values()) <= budget["total"]
    assert sum(budget["data"].values()) + sum(budget["weights"].values()) <= budget["total"]


def test_old_or_new_python_is_refused_in_one_sentence(tmp_path):
    script = (ROOT / "tools" / "check_python.py").read_text()
    for version in ("3, 10, 9", "3, 14, 0"):
        fake = f"import sys; sys.version_info = ({version}); sys.version = '{version}'\n{script}"
        done = subprocess.run([sys.executable, "-c", fake], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1 and "needs Python 3.11, 3.12 or 3.13" in done.stderr
    fake = f"import sys; sys.modules['ensurepip'] = None\n{script}"
    done = subprocess.run([sys.executable, "-c", fake], capture_output=True, text=True)
    assert done.returncode == 1 and "apt install python3-venv" in done.stderr


def test_the_page_of_the_whole_machine_counts_right():
    text = (ROOT / "book" / "machine.md").read_text()
    with torch.device("meta"):
        networks = [
            TextEncoder(TextConfig.preset("sd15")), TextEncoder(replace(TextConfig.preset("sd15"), projection=768)),
            TextEncoder(TextConfig.preset("emoji")), VAE(VAEConfig.preset("sd")), VAE(VAEConfig.preset("emoji")),
            DiffusionPrior(PriorConfig.preset("karlo")), DiffusionPrior(PriorConfig.preset("emoji")),
            *(UNet(UNetConfig.preset(name)) for name in ("sd15", "emoji-latent", "dalle2-decoder", "dalle2-upsampler",
                                                         "emoji-decoder", "emoji-upsampler")),
        ]
    said = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) parameters", text)]
    assert sorted(said) == sorted(network.count_parameters() for network in networks)
