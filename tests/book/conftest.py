"""Build once what the tests of the book look at: its pages, and the wheel."""
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import export_page
import pytest
import torch
from playwright.sync_api import sync_playwright

from diffusionbook.clip import CLIP, CLIPConfig
from diffusionbook.stable_diffusion import StableDiffusion

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


def random_clip():
    """A CLIP of the miniature's shape that has learned nothing, for where the trained one doesn't ship."""
    torch.manual_seed(0)
    return CLIP(CLIPConfig.preset("emoji")).eval()


@pytest.fixture(scope="session")
def book(root, tmp_path_factory):
    """The built book: `html` (its folder), `log` and `status` of the build, and the `clip` of its page "Paint"."""
    out = tmp_path_factory.mktemp("book")
    command = [Path(sys.executable).with_name("jupyter-book"), "build", root, "--path-output", out,
               "-W", "-n", "--keep-going"]
    done = subprocess.run(command, cwd=out, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    clip = export_page.shipped_clip() or random_clip()
    export_page.export(StableDiffusion.from_pretrained("emoji"), out / "_build/html/_static/paint/models", clip)
    return SimpleNamespace(html=out / "_build" / "html", log=done.stdout, status=done.returncode, clip=clip)


@pytest.fixture(scope="session")
def wheel(root, tmp_path_factory):
    """The package's wheel, built from a copy so that nothing is left in the project."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    leave_out = shutil.ignore_patterns("__pycache__", "_modidx.py")
    shutil.copytree(root / "diffusionbook", source / "diffusionbook", ignore=leave_out)
    for name in ("pyproject.toml", "README.md", "LICENSE", "LICENSE-text"):
        shutil.copy(root / name, source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index",
                    "-w", folder, source], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium: the system's, or the one that `playwright install chromium` fetched."""
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, BROWSERS)), None) or playwright.chromium.executable_path
        if not os.path.exists(path):
            message = "no browser found; install one with: sudo apt install chromium"
            (pytest.fail if os.environ.get("DIFFUSIONBOOK_NEEDS_BROWSER") else pytest.skip)(message)
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()
