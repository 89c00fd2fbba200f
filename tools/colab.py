"""Run chapters as Colab runs them, and keep what came out in benchmarks/colab.md.

    make colab                                     (every chapter)
    python tools/colab.py book/01_heat.ipynb ...   (some; the rows of the others stay)

Each notebook runs alone in an empty folder, on the CPU, in an environment that has nothing but this package's wheel and
the packages that the chapters import, in the versions that Colab publishes (tests/data/colab-pip-freeze.gpu.txt). The
environment is made in .colab/ once; delete that folder to make it anew. PyTorch comes from its CPU index where that can
be reached, else from PyPI.
"""
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from tempfile import TemporaryDirectory

from run_alone import chapters, run_alone

ROOT = Path(__file__).resolve().parents[1]
COLAB = ROOT / ".colab"
PYTHON = COLAB / "bin" / "python"
TABLE = ROOT / "benchmarks" / "colab.md"
BESIDE = ["ipykernel", "diffusers", "transformers"]  # Colab has them: a kernel, and what chapters compare with
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
HEAD = """# Every chapter in Colab's versions

Written by `make colab`: each notebook alone in an empty folder, CPU cores: {cores}, with the package's wheel and the
versions that Colab publishes. Last run with {versions}. The minutes are those of the machine
that ran it, whatever else it was doing.

| chapter | minutes | memory, GB | result |
|---|--:|--:|---|
"""


def build_wheel(folder):
    """Build the package's wheel in `folder`, from a copy so that nothing is left in the project; return its path."""
    source = Path(folder) / "source"
    leave_out = shutil.ignore_patterns("__pycache__", "_modidx.py")
    shutil.copytree(ROOT / "diffusionbook", source / "diffusionbook", ignore=leave_out)
    for name in ("pyproject.toml", "README.md", "LICENSE", "LICENSE-text"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index",
                    "-w", folder, source], check=True)
    (path,) = Path(folder).glob("*.whl")
    return path


def constraints():
    """Return Colab's versions as pip constraints, without what belongs to PyTorch's build for a GPU.

    And without tifffile, whose version there needs a newer Python than the oldest that this book runs on.
    """
    lines = re.findall(r"^([\w.-]+==[^\s+]+)", (ROOT / "tests/data/colab-pip-freeze.gpu.txt").read_text(), re.MULTILINE)
    return "\n".join(line for line in lines if not re.match(r"nvidia-|cuda-|triton|tifffile", line)) + "\n"


def make_environment():
    """Make .colab/ where it is missing, and put the present package into it."""
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    with TemporaryDirectory() as folder:
        wheel = build_wheel(folder)
        if not (COLAB / "complete").exists():
            venv.create(COLAB, with_pip=True, clear=True)
            versions = Path(folder) / "constraints.txt"
            versions.write_text(constraints())
            torch = next(line for line in constraints().split() if line.startswith("torch=="))
            small = subprocess.run([*pip, "--retries", "0", "--index-url", CPU_WHEELS, torch], capture_output=True)
            if small.returncode:  # that index can't be reached, so take PyPI's larger build
                subprocess.run([*pip, torch], check=True)
            subprocess.run([*pip, "-c", versions, wheel, *BESIDE], check=True)
            (COLAB / "complete").touch()
        subprocess.run([*pip, "--no-deps", "--no-index", "--force-reinstall", wheel], check=True)


def rows(text):
    """Read the table's rows: chapter → the whole line."""
    return {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}


def row(path, run):
    """Write one row of the table."""
    result = f"failed: {run.error}".replace("|", "\\|") if run.error else "ran to the end"
    memory = f"{run.memory / 1e9:.1f}" if run.memory else ""
    return f"| `{path.stem}` | {run.seconds / 60:.1f} | {memory} | {result} |"


def page(lines, versions):
    """Write the whole page: the book's order, chapters that never ran at its end."""
    order = [path.stem for path in chapters(ROOT)]
    table = [lines.get(name, f"| `{name}` | | | not run yet |") for name in order]
    return HEAD.format(cores=len(os.sched_getaffinity(0)), versions=versions) + "\n".join(table) + "\n"


def main():
    paths = [Path(name) for name in sys.argv[1:]] or chapters(ROOT)
    make_environment()
    tell = "import platform, torch; print('Python', platform.python_version() + ', PyTorch', torch.__version__)"
    versions = subprocess.run([PYTHON, "-c", tell], capture_output=True, text=True, check=True).stdout.strip()
    variables = {name: value for name, value in os.environ.items()
                 if name not in ("PYTHONPATH", "JUPYTER_PATH", "VIRTUAL_ENV")} | {"CUDA_VISIBLE_DEVICES": ""}
    failed = []
    for path in paths:
        run = run_alone(path, python=PYTHON, environment=variables)
        lines = rows(TABLE.read_text() if TABLE.exists() else "") | {path.stem: row(path, run)}
        TABLE.write_text(page(lines, versions))
        print(lines[path.stem], flush=True)
        failed += [path.stem] * bool(run.error)
    if failed:
        sys.exit(f"These chapters failed as Colab would run them: {', '.join(failed)}")


if __name__ == "__main__":
    main()
