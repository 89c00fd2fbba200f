"""Build once what the tests of the book look at: its pages, and the wheel."""
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import colab
import export_page
import pytest
from playwright.sync_api import sync_playwright

from diffusionbook.clip import CLIP
from diffusionbook.stable_diffusion import StableDiffusion

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="session")
def book(root, tmp_path_factory):
    """The built book: `html` (its folder), `log` and `status` of the build, and the `clip` of its page "Paint"."""
    out = tmp_path_factory.mktemp("book")
    command = [Path(sys.executable).with_name("jupyter-book"), "build", root, "--path-output", out,
               "-W", "-n", "--keep-going"]
    done = subprocess.run(command, cwd=out, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    clip = CLIP.from_pretrained("emoji")
    export_page.export(StableDiffusion.from_pretrained("emoji"), clip, out / "_build/html/_static/paint/models")
    return SimpleNamespace(html=out / "_build" / "html", log=done.stdout, status=done.returncode, clip=clip)


class Quiet(SimpleHTTPRequestHandler):
    """Serves the files of a folder and doesn't print each request."""

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="session")
def served(book):
    """The address of a small server of the built book, two folders deep, as on GitHub Pages."""
    handler = partial(Quiet, directory=book.html.parents[1])
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/_build/html"
        server.shutdown()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The package's wheel."""
    return colab.build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def launch():
    """A function that starts headless Chromium: the system's, or the one that `playwright install chromium` fetched."""
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, BROWSERS)), None) or playwright.chromium.executable_path
        if not os.path.exists(path):
            message = "no browser found; install one with: sudo apt install chromium"
            (pytest.fail if os.environ.get("DIFFUSIONBOOK_NEEDS_BROWSER") else pytest.skip)(message)
        yield lambda *flags: playwright.chromium.launch(executable_path=path, args=[*QUIET, *flags])


@pytest.fixture(scope="session")
def browser(launch):
    """Headless Chromium without a graphics processor."""
    browser = launch("--disable-gpu")
    yield browser
    browser.close()
