"""The built book: no warning, no dead link, and pages that look right in a browser."""
import ast
import gzip
import json
import re
import zipfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import repository
import yaml
from bs4 import BeautifulSoup
from exported_code import modules, public_names

MB = 1024**2
# What axe-core (tests/book/axe.min.js.gz, MPL-2.0) calls a serious or critical barrier for people who use other senses.
AXE = """async () => (await axe.run(document, {resultTypes: ["violations"], preload: false})).violations
    .filter(v => ["serious", "critical"].includes(v.impact))
    .map(v => `${v.help}: ${v.nodes.slice(0, 3).map(n => n.html.slice(0, 200)).join(" ")}`)"""

@pytest.fixture(scope="module")
def pages(book):
    """Every page of the built book, parsed, by its path."""
    return {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
            for path in sorted(book.html.rglob("*.html")) if "_static" not in path.relative_to(book.html).parts}


@pytest.fixture(scope="module")
def chapters(root):
    """The chapters of the book, as `_toc.yml` lists them: names like "book/00_start_here"."""
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    return [toc["root"]] + [entry["file"] for part in toc["parts"] for entry in part["chapters"]]


def notebooks(root, chapters):
    return [name for name in chapters if (root / f"{name}.ipynb").is_file()]


# --- what the files say ------------------------------------------------------------------------
def test_book_builds_without_a_warning(book):
    warnings = [line for line in book.log.splitlines() if "WARNING" in line or "ERROR" in line]
    assert not warnings, "\n".join(warnings)
    assert book.status == 0, book.log[-3000:]


def test_every_link_anchor_and_image_resolves(book, pages):
    anchors = {path: {tag[key] for key in ("id", "name") for tag in page.find_all(attrs={key: True})}
               for path, page in pages.items()}
    dead = []
    for path, page in pages.items():
        for tag, key in (("a", "href"), ("img", "src"), ("link", "href"), ("script", "src"), ("source", "src")):
            for element in page.find_all(tag, attrs={key: True}):
                url = urlsplit(element[key])
                if url.scheme or url.netloc or element[key] in ("#", ""):
                    continue
                target = (path.parent / unquote(url.path)).resolve() if url.path else path
                fragment = unquote(url.fragment)
                if not target.exists() or (target in anchors and fragment and fragment not in anchors[target]):
                    dead.append(f"{path.relative_to(book.html)}: {element[key]}")
    assert not dead, "\n".join(dead)


def test_pages_need_nothing_from_the_network(book, pages):
    for path, page in pages.items():
        for tag, key in (("img", "src"), ("script", "src"), ("link", "href")):
            for element in page.find_all(tag, attrs={key: re.compile("^(https?:)?//")}):
                assert "canonical" in element.get("rel", []), f"{path.relative_to(book.html)}: {element[key]}"


def test_citations_and_references_resolve(root, book, pages, chapters):
    for name in chapters:
        text = pages[book.html / f"{name}.html"].find("article").get_text()
        for unresolved in ("[?]", "???", "{cite}", "{numref}", "{term}", "{eq}", "{doc}", "{ref}", ":::"):
            assert unresolved not in text, f"{unresolved} on {name}"
        unfinished = re.search(r"@[A-Z]+@|\bTODO\b|\bTBD\b|\bTBC\b", text)
        assert not unfinished, f"{unfinished[0]} on {name}"


def test_api_page_lists_every_public_name(root, book, pages):
    listed = {tag["id"] for tag in pages[book.html / "book" / "api.html"].find_all("dt", id=True)}
    assert modules(root / "book")
    for module in modules(root / "book"):
        tree = ast.parse((root / "diffusionbook" / f"{module}.py").read_text())
        public = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                  and not node.name.startswith("_")]
        for node in public:
            assert ast.get_docstring(node), f"diffusionbook.{module}.{node.name} has no docstring"
            assert f"diffusionbook.{module}.{node.name}" in listed


def test_api_page_links_to_the_cell_that_builds_each_name(root, book, pages, chapters):
    linked = {link["href"] for link in pages[book.html / "book" / "api.html"].select("dl.py dd a.reference.internal")}
    for name in notebooks(root, chapters):
        for cell in pages[book.html / f"{name}.html"].select("div.cell_input.exported"):
            code = cell.select_one("pre").get_text()
            module = cell.select_one("p.exported-to").get_text().rpartition(".")[2]
            for public in public_names(code):
                anchor = f"{Path(name).name}.html#built-{module}-{public}"
                assert anchor in linked, f"the API page has no link to {anchor}"


def test_exported_cells_carry_a_sign_and_no_directive(root, book, pages, chapters):
    for name in notebooks(root, chapters):
        page = pages[book.html / f"{name}.html"]
        cells = json.loads((root / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        exported = [cell for cell in cells if "".join(cell["source"]).startswith("#| export")]
        signs = page.select("div.cell_input.exported > p.exported-to")
        assert exported and len(signs) == len(exported)
        default = re.search(r"#\| default_exp (\w+)", "".join("".join(cell["source"]) for cell in cells))
        for cell, sign in zip(exported, signs, strict=True):
            module = re.match(r"#\| export *(\w*)", "".join(cell["source"]))[1] or default[1]
            assert sign.get_text() == f"exported to diffusionbook.{module}"
            target = next(iter(public_names("".join(cell["source"]))), None)
            anchor = f"diffusionbook.{module}.{target}" if target else f"api-{module.replace('_', '-')}"
            assert sign.a["href"] == f"api.html#{anchor}"
        assert not any("#|" in code.get_text() for code in page.select("div.cell_input"))


def test_public_names():
    assert public_names("import torch") == public_names("not python") == []
    assert public_names("def _a(): ...\nclass B: ...\ndef c(): ...") == ["B", "c"]


def test_glossary_words_carry_their_definition(book, pages, chapters):
    entries = {dt["id"]: dt.find_next("dd").p.get_text() for dt in
               pages[book.html / "book" / "glossary.html"].select("dl.glossary dt")}
    seen = set()
    for name in chapters:
        for link in pages[book.html / f"{name}.html"].select("article a[href*='glossary.html#term-']"):
            word = link["href"].partition("#")[2]
            assert link.parent["class"] == ["term-hover"], f"{name}: {word} has no card"
            assert " ".join(link.find_next_sibling("span").get_text().split()) == " ".join(entries[word].split())
            seen.add(word)
    assert len(seen) > 20


def test_every_chapter_opens_in_colab_binder_and_kaggle(root, book, pages, chapters):
    here = repository.owner_and_name(repository.setting())
    for name in notebooks(root, chapters):
        links = {a["href"] for a in pages[book.html / f"{name}.html"].select(".dropdown-launch-buttons a")}
        assert links == {f"https://colab.research.google.com/github/{here}/blob/main/{name}.ipynb",
                         f"https://mybinder.org/v2/gh/{here}/main?urlpath=lab/tree/{name}.ipynb",
                         f"https://kaggle.com/kernels/welcome?src=https://github.com/{here}/blob/main/{name}.ipynb"}


def test_no_page_gives_a_name_twice(pages):
    for path, page in pages.items():
        names = [element["id"] for element in page.find_all(id=True)]
        twice = {name for name in names if names.count(name) > 1}
        assert not twice, f"{path.name}: two elements have the id {twice}, so styles and links find the wrong one"


def test_every_picture_has_words(root, book, pages, chapters):
    for name in chapters:
        for image in pages[book.html / f"{name}.html"].find("article").find_all("img"):
            alt = image.get("alt", "")
            assert alt and "_images/" not in alt, f"{name}: {image['src']} has no alternative text"


# --- what a browser shows ----------------------------------------------------------------------
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_pages_look_right(root, book, browser, chapters, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    problems = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(f"asks for {request.url}")
            if not request.url.startswith(("file:", "data:", "blob:")) else None)
    for name in [*chapters, "genindex", "search"]:
        page.goto((book.html / f"{name}.html").as_uri())
        page.evaluate("window.MathJax && MathJax.startup.promise.then(() => null)")
        seen = page.evaluate("""() => ({
            overflow: document.documentElement.scrollWidth - window.innerWidth,
            broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src),
            formulas: document.querySelectorAll(".math").length,
            drawn: document.querySelectorAll("mjx-container").length,
            wrong: [...document.querySelectorAll("mjx-merror, [data-mjx-error]")].map(e => e.textContent),
            cut: [...document.querySelectorAll("span.math mjx-container")]
                .filter(e => !e.closest(".pst-scrollable-table-container"))  // a wide table scrolls in its own box
                .filter(e => e.getBoundingClientRect().right > window.innerWidth)
                .map(e => e.closest("p, li, td, dd").textContent.trim()),
            ground: getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number),
            figures: [...document.querySelectorAll(".cell_output img, figure img")]
                .map(i => getComputedStyle(i).backgroundColor),
        })""")
        assert not problems, f"{name}: {problems}"
        assert seen["overflow"] <= 0, f"{name} is {seen['overflow']} pixels too wide for {width}"
        assert not seen["broken"], f"{name}: {seen['broken']}"
        assert not seen["wrong"], f"{name}: {seen['wrong']}"
        assert seen["drawn"] >= seen["formulas"], f"{name}: {seen['formulas']} formulas, {seen['drawn']} drawn"
        assert not seen["cut"], f"{name}: a formula in a line is too wide for {width} pixels: {seen['cut']}"
        assert (max(seen["ground"]) < 64) if scheme == "dark" else (min(seen["ground"]) > 192)
        if scheme == "dark":
            assert set(seen["figures"]) <= {"rgb(255, 255, 255)"}, f"{name}: a figure without its white card"
        if width > 1000:
            page.evaluate(gzip.decompress((root / "tests/book/axe.min.js.gz").read_bytes()).decode() + "; null")
            barriers = page.evaluate(AXE)
            assert not barriers, f"{name}: {barriers}"
    page.close()


def test_a_page_is_light(book, browser, root, chapters):
    """The page and its pictures in 3 MB; the same with all scripts, styles and fonts, packed as a server sends them."""
    page = browser.new_page()
    page.set_default_timeout(120_000)
    loaded = set()
    page.on("request", lambda request: loaded.add(urlsplit(request.url)))
    for name in notebooks(root, chapters):
        loaded.clear()
        page.goto((book.html / f"{name}.html").as_uri())
        page.evaluate("window.MathJax && MathJax.startup.promise.then(() => null)")
        files = {Path(unquote(url.path)) for url in loaded if url.scheme == "file"}
        own = sum(path.stat().st_size for path in files if path.suffix in (".html", ".png", ".webp", ".gif", ".jpg"))
        assert own <= 3 * MB, f"{name} and its pictures have {own:,} bytes"
        sent = sum(len(gzip.compress(path.read_bytes(), 6)) for path in files)
        assert sent <= 3 * MB, f"{name} sends {sent:,} bytes"
    page.close()


def test_book_works_below_any_address(served, browser):
    page = browser.new_page()
    page.set_default_timeout(120_000)
    missing = []
    page.on("response", lambda response: missing.append(response.url) if response.status >= 400 else None)
    for name in ("index", "book/04_noise_schedules", "book/machine", "search"):
        page.goto(f"{served}/{name}.html", wait_until="networkidle")
    page.close()
    assert not missing, missing


def test_all_notebooks_in_one_file(root, book, pages, chapters):
    (link,) = pages[book.html / "book" / "intro.html"].select("article a[href$='.zip']")
    with zipfile.ZipFile(book.html / "book" / link["href"]) as archive:
        assert sorted(archive.namelist()) == sorted(f"diffusionbook/{Path(name).name}.ipynb"
                                                    for name in notebooks(root, chapters))
        for name in archive.namelist():
            assert archive.read(name) == (root / "book" / Path(name).name).read_bytes()
