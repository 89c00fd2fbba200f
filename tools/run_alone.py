"""Run a notebook alone: in a kernel and an empty folder of its own, from top to bottom."""
import re
import shutil
import sys
import time
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

MEMORY = ("import resource, sys\n"
          "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024))")


@dataclass(frozen=True)
class Run:
    """What a run gave: its time, the kernel's peak memory (bytes), what the last cell printed, what went wrong."""
    seconds: float
    memory: int = 0
    answer: str = ""
    error: str = ""


def run_alone(path, *, python=sys.executable, environment=None, last_cell="", timeout=1800):
    """Run the notebook at `path` with the interpreter `python` and return a `Run`; nothing of it stays on disk.

    `environment` replaces this process's variables; `last_cell` is one more cell of code, whose printed text is the
    answer; a cell may take `timeout` seconds.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in (last_cell, MEMORY)]
    manager = AsyncKernelManager(kernel_name="python3")
    manager.kernel_spec.argv[0] = str(python)
    options = {} if environment is None else {"env": environment}
    with TemporaryDirectory() as folder:
        shutil.copy(path, folder)
        client = NotebookClient(notebook, km=manager, timeout=timeout, resources={"metadata": {"path": folder}})
        began = time.perf_counter()
        try:
            client.execute(**options)
        except CellExecutionError as problem:
            return Run(time.perf_counter() - began, error=f"{problem.ename}: {problem.evalue}".splitlines()[0])
        seconds = time.perf_counter() - began
    answer, memory = ("".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells[-2:])
    return Run(seconds, int(memory), answer)


def chapters(root):
    """Return the paths of the book's notebooks, in the order of its table of contents."""
    names = re.findall(r"file: (book/\w+)", (root / "_toc.yml").read_text())
    return [path for path in (root / f"{name}.ipynb" for name in names) if path.exists()]
