"""The page "Paint": in a browser it paints what Python paints."""
import json
import re

import numpy as np
import pytest

from diffusionbook.samplers import starting_noise, timesteps
from diffusionbook.stable_diffusion import StableDiffusion

CAPTION, SEED, STEPS, GUIDANCE = "woman astronaut, dark skin tone, 3d style", 5, 3, 2.5


@pytest.fixture
def page(browser, served):
    page = browser.new_page()
    page.set_default_timeout(600_000)
    problems = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"{served}/book/paint.html")
    yield page
    assert not problems
    page.close()


@pytest.fixture(scope="module")
def painter():
    return StableDiffusion.from_pretrained("emoji")


def in_page(page, code, *arguments):
    return page.evaluate(f"async (given) => {{ const m = await import('../_static/paint/painter.js'); {code} }}",
                         list(arguments))


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1])
def test_one_seed_one_noise(page, seed):
    noise = in_page(page, "return [...m.standardNormal(given[0], 256)]", seed)
    assert np.allclose(noise, starting_noise((1, 4, 8, 8), seed=seed).flatten(), atol=2e-6)


def test_the_same_times(page, painter):
    for steps in (1, 3, 7, 16, 50, 333):
        assert in_page(page, "return m.timesteps(1000, given[0])", steps) == timesteps(painter.schedule, steps)[:-1]


def test_the_same_words(page, painter):
    captions = ["red heart", CAPTION, " Piñata:  MIX & match ", "“quotes”, it's 12 o’clock", "👍🏽 日本", "", "x" * 99]
    rows = in_page(page, """
        const facts = await (await fetch("../_static/paint/models/painter.json")).json();
        return given.map((caption) => new m.Tokenizer(facts).encode(caption))""", *captions)
    for caption, row in zip(captions, rows, strict=True):
        assert row == painter.tokenizer([caption])[0].tolist(), caption


def test_the_page_paints_what_python_paints(page, painter):
    page.fill("[name=caption]", CAPTION)
    page.fill("[name=seed]", str(SEED))
    for name, value in (("steps", STEPS), ("guidance", GUIDANCE)):
        page.locator(f"[name={name}]").evaluate("(slider, value) => { slider.value = value }", value)
    page.click(".paint-go")
    page.wait_for_selector("#painter[data-state=done], #painter[data-state=failed]")
    assert "Painted in" in page.text_content(".paint-says")
    assert page.locator(".paint-film canvas").count() == STEPS
    shown = page.evaluate("""() => [...document.querySelector(".paint-canvas").getContext("2d")
                              .getImageData(0, 0, 64, 64).data]""")
    (picture,) = painter(CAPTION, seed=SEED, steps=STEPS, guidance=GUIDANCE, progress=False)
    shown = np.array(shown).reshape(64, 64, 4)
    assert np.abs(shown[..., :3] - np.asarray(picture, dtype=float)).max() <= 4
    assert (shown[..., 3] == 255).all()


def test_a_graphics_processor_paints_the_same(launch, served, painter):
    browser = launch("--enable-unsafe-webgpu", "--enable-features=Vulkan", "--use-webgpu-adapter=swiftshader")
    page = browser.new_page()
    page.set_default_timeout(600_000)
    page.goto(f"{served}/book/paint.html")
    if not page.evaluate("async () => Boolean(await navigator.gpu?.requestAdapter())"):
        pytest.skip("this Chromium comes without SwiftShader, which plays a graphics processor")
    shown = in_page(page, """
        const painter = await m.Painter.load(new URL("../_static/paint", location.href).href, { gpu: true });
        for await (const { guess } of painter.paint(given[0], { seed: given[1], steps: 1, guidance: given[2] })) {
          return [...await painter.decode(guess)];
        }""", CAPTION, SEED, GUIDANCE)
    browser.close()
    picture = painter(CAPTION, seed=SEED, steps=1, guidance=GUIDANCE, output="tensor", progress=False)
    assert np.abs(np.clip(shown, -1, 1) - picture.flatten().numpy()).max() <= 2 / 255  # range [-1, 1]: 1 of 255 steps


def test_the_meter_says_what_clip_says(page, painter, book):
    loaded = []
    page.on("request", lambda request: loaded.append(request.url.rpartition("/")[2]))
    page.fill("[name=caption]", CAPTION)
    page.locator("[name=steps]").evaluate("(slider) => { slider.value = 1 }")
    page.click(".paint-go")
    page.wait_for_selector("#painter[data-state=done]")
    assert "clip.onnx" not in loaded
    assert " MB once" in page.text_content(".paint-judge")
    page.click(".paint-judge")
    page.wait_for_selector("#painter[data-state=judged]")
    words = page.text_content(".paint-fit-says")
    picture = painter(CAPTION, seed=0, steps=1, output="tensor", progress=False)
    expected = book.clip.score(picture, painter.tokenizer([CAPTION])).item()
    assert abs(float(re.search(r"-?[0-9]+[.][0-9]+", words)[0]) - expected) < 1.5e-3  # it shows three decimals
    meter = json.loads((book.html / "_static/paint/models/painter.json").read_text(encoding="utf8"))["meter"]
    for share, name in zip(re.findall("([0-9]+) %", words), ("others", "own"), strict=True):
        assert abs(int(share) - np.mean(np.array(meter[name]) < expected) * 100) <= 2


def test_the_scale_is_measured_on_real_pictures(book):
    meter = json.loads((book.html / "_static/paint/models/painter.json").read_text(encoding="utf8"))["meter"]
    for name in ("own", "others"):
        assert len(meter[name]) == 101 and meter[name] == sorted(meter[name])
    assert meter["size"] == (book.html / "_static/paint/models/clip.onnx").stat().st_size < 12e6


def test_an_empty_caption_is_asked_for_again(page):
    page.fill("[name=caption]", "   ")
    page.click(".paint-go")
    assert "Say what to paint" in page.text_content(".paint-says")


def test_opened_as_a_file_the_page_says_how_to_serve_it(book, browser):
    page = browser.new_page()
    page.goto((book.html / "book" / "paint.html").as_uri())
    assert "python -m http.server" in page.text_content(".paint-says")
    assert page.is_disabled(".paint-go")
    page.close()


def test_what_the_reader_has_to_load_is_small(book):
    folder = book.html / "_static" / "paint"
    first = [path for path in folder.rglob("*") if path.is_file() and path.name != "clip.onnx"]
    assert sum(path.stat().st_size for path in first) < 60e6
