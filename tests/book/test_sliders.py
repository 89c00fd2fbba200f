"""The figures with controls: they show the numbers of the Python code, and everyone can use them."""
import json
import re

import numpy as np
import pytest
import slider_pictures
import torch

from diffusionbook.denoising import Denoiser
from diffusionbook.filtering import conductance, diffuse
from diffusionbook.samplers import SAMPLERS, timesteps
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.scores import GaussianMixture

HOME = {"edges": "02_edges", "schedule": "04_noise_schedules", "samplers": "09_sampling", "guidance": "15_glide"}


@pytest.fixture(scope="module")
def open_figure(book, browser):
    """Open the page that holds a figure, as a file, and return its element; without options, one page for all tests."""
    problems, opened = [], {}

    def open_figure(name, **options):
        if options or name not in opened:
            page = browser.new_page(**options)
            page.set_default_timeout(120_000)
            page.route(re.compile("mathjax"), lambda route: route.fulfill(body=""))  # large, and not looked at here
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.goto((book.html / "book" / f"{HOME[name]}.html").as_uri(), wait_until="domcontentloaded")
            figure = page.locator(f"[data-slider={name}]")
            if options:
                return figure
            opened[name] = figure
        return opened[name]

    yield open_figure
    assert not problems


def turn(figure, **controls):
    """Give controls the positions named and wait until the figure is drawn again."""
    figure.evaluate("""async (figure, controls) => {
        for (const [name, value] of Object.entries(controls)) {
            const input = document.getElementById(`${figure.dataset.slider}-${name}`);
            if (input.type === "checkbox") input.checked = value; else input.value = value;
            input.dispatchEvent(new Event("input"));
        }
        await new Promise(requestAnimationFrame);
    }""", controls)


def says(figure):
    return figure.locator(".slider-says").text_content()


def pixels(figure, number):
    """What a canvas of the figure shows: (height, width, 3), from 0 to 255."""
    rows = figure.locator("canvas").nth(number).evaluate("""(canvas) => [canvas.height, canvas.width,
        ...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]""")
    return np.array(rows[2:], dtype=float).reshape(rows[0], rows[1], 4)[..., :3]


# --- all figures ---------------------------------------------------------------------------------
def test_every_figure_stands_in_its_chapter_and_says_so_elsewhere(root):
    found = {}
    for path in sorted((root / "book").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for name, words in re.findall(r'^<div data-slider="(\w+)">(.+)</div>$', "".join(cell["source"]), re.M):
                found[name] = path.stem
                assert "In the rendered book" in words
                assert ":::{admonition} Predict first" in "".join(cell["source"])
    assert found == HOME


def test_the_pictures_are_those_of_the_tool(root):
    assert (root / "book/_static/sliders/pictures.js").read_text(encoding="utf8") == slider_pictures.script()


def test_only_pages_with_a_figure_load_the_scripts(book):
    for name in (*HOME.values(), "05_denoising", "paint"):
        loads = "sliders/sliders.js" in (book.html / "book" / f"{name}.html").read_text(encoding="utf8")
        assert loads == (name in HOME.values()), name


@pytest.mark.parametrize("name", HOME)
def test_a_keyboard_and_a_screen_reader_will_do(open_figure, name):
    figure = open_figure(name)
    assert figure.get_attribute("role") == "group" and figure.get_attribute("aria-label")
    for drawing in figure.locator("canvas, svg").all():
        assert drawing.get_attribute("role") == "img" and drawing.get_attribute("aria-label")
    for control in figure.locator("input, select").all():
        assert figure.locator(f"label[for={control.get_attribute('id')}]").text_content()
    for slider in figure.locator("input[type=range]").all():
        output = figure.locator(f"output[for={slider.get_attribute('id')}]")
        before = output.text_content()
        slider.press("ArrowLeft" if slider.input_value() == slider.get_attribute("max") else "ArrowRight")
        figure.evaluate("() => new Promise(requestAnimationFrame)")
        assert output.text_content() == slider.get_attribute("aria-valuetext") != before


@pytest.mark.parametrize("name", HOME)
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_nothing_jumps(open_figure, name, width):
    height = "(figure) => figure.getBoundingClientRect().height"
    before = open_figure(name, viewport={"width": width, "height": 900}, java_script_enabled=False)
    kept_free = before.bounding_box()["height"]
    before.page.close()
    figure = open_figure(name, viewport={"width": width, "height": 900})
    for end in ("min", "max"):
        ends = {slider.get_attribute("id").split("-")[1]: slider.get_attribute(end)
                for slider in figure.locator("input[type=range]").all()}
        turn(figure, **ends)
        assert figure.evaluate(height) == kept_free, end
    assert figure.evaluate("(figure) => figure.scrollWidth <= figure.clientWidth")
    figure.page.close()


# --- chapter 04 ----------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["linear", "scaled_linear", "sigmoid_ramp", "cosine", "sigmoid"])
@pytest.mark.parametrize(("steps", "last"), [(1000, 0.02), (10, 0.2)])
def test_the_schedules_are_pythons(open_figure, recipe, steps, last):
    figure = open_figure("schedule")
    options = {} if recipe in ("cosine", "sigmoid") else {"beta_max": last}
    expected = getattr(NoiseSchedule, recipe)(steps, **options).alpha_bar
    found = figure.evaluate("(figure, given) => sliderMaths.alphaBar(...given)", [recipe, steps, last])
    assert np.allclose(found, expected, rtol=1e-9, atol=0)


def test_the_picture_dissolves(open_figure):
    figure, cat = open_figure("schedule"), slider_pictures.pictures()["cat"]
    turn(figure, recipe="linear", last=-1.7, steps=1000)
    assert "step 0.004 %" in says(figure)
    likeness = [np.corrcoef(pixels(figure, i).ravel(), cat.ravel())[0, 1] for i in range(6)]
    assert likeness[0] > 0.99 and abs(likeness[5]) < 0.05 and likeness == sorted(likeness, reverse=True)
    turn(figure, steps=100)
    assert "36 %" in says(figure)
    assert np.corrcoef(pixels(figure, 5).ravel(), cat.ravel())[0, 1] > 0.3
    for last, steps, left in ((-0.7, 1000, "step less than 0.0001 %"), (-3, 10, "step 99 %")):
        turn(figure, last=last, steps=steps)
        assert left in says(figure)
    turn(figure, recipe="cosine")
    assert figure.locator("#schedule-last").is_disabled()


# --- chapter 02 ----------------------------------------------------------------------------------
@pytest.mark.parametrize("law", ["quadratic", "exponential", "charbonnier", "tukey", "weickert", "heat"])
def test_the_filter_is_pythons(open_figure, law):
    figure, bytes_ = open_figure("edges"), slider_pictures.pictures()
    noisy, clean = bytes_["noisyCoins"] / 255, bytes_["coins"] / 255
    for position, time in ((-1.5, 0.5), (-0.6, 7.25)):
        turn(figure, law=law, contrast=position, time=time)
        expected = diffuse(noisy, time, contrast=10**position, scheme="explicit",
                           conductance=torch.ones_like if law == "heat" else law)
        assert np.abs(pixels(figure, 1)[..., 0] - 255 * expected.clip(0, 1)).max() < 0.51
        assert f"{-10 * np.log10(np.mean((expected - clean) ** 2)):.1f} dB;" in says(figure)


def test_white_is_where_heat_flows(open_figure):
    figure = open_figure("edges")
    turn(figure, law="quadratic", contrast=-1, time=4)
    u = diffuse(slider_pictures.pictures()["noisyCoins"] / 255, 4, contrast=0.1, scheme="explicit")
    inside = np.zeros_like(u)
    for axis in (0, 1):
        share = conductance("quadratic")(torch.from_numpy(np.diff(u, axis=axis) / 0.1).square()).numpy()
        inside += sum(np.pad(share, [pad if i == axis else (0, 0) for i in (0, 1)]) for pad in ((0, 1), (1, 0)))
    borders = np.pad(np.full((94, 126), 4), 1, constant_values=3)
    borders[::95, ::127] = 2
    assert np.abs(pixels(figure, 2)[..., 0] - 255 * inside / borders).max() < 0.51


# --- chapters 09 and 15 --------------------------------------------------------------------------
BELLS = [[1.4, 0.1, 0.01], [-0.6, 1.2, 0.08], [0.3, -0.9, 0.02]]
POINTS = [[-0.5, 1.0], [2.0, -0.3], [0.1, 0.2], [-1.7, -1.4]]


def perfect(bells, schedule):
    bells = torch.tensor(bells, dtype=torch.float64)
    world = GaussianMixture(bells[:, :2], bells[:, 2])
    return Denoiser(lambda x, t: world.x0(x, *schedule.levels(t)), schedule, "x0")


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "ddpm"])
@pytest.mark.parametrize("steps", [1, 3, 16])
def test_the_samplers_are_pythons(open_figure, sampler, steps):
    schedule, options = NoiseSchedule.cosine(), {"noise": torch.ones_like} if sampler == "ddpm" else {}
    states = SAMPLERS[sampler](perfect(BELLS, schedule), torch.tensor(POINTS, dtype=torch.float64),
                               timesteps(schedule, steps), **options)
    found = open_figure("samplers").evaluate("""(figure, [sampler, steps, bells, points]) => {
        const m = sliderMaths, stops = m.levels(m.alphaBar("cosine", 1000), steps);
        const noise = (count) => new Float64Array(count).fill(1);
        const states = m.SAMPLERS[sampler](m.denoiser(bells), Float64Array.from(points.flat()), stops, noise);
        return Array.from(states, (x) => [...x]);
    }""", [sampler, steps, BELLS, POINTS])
    assert np.allclose(found, [x.flatten() for x, _ in states], atol=1e-6)


def test_guidance_is_pythons(open_figure):
    schedule, x = NoiseSchedule.cosine(), torch.tensor(POINTS, dtype=torch.float64)
    asked, plain = (perfect(bells, schedule)(x, 500) for bells in (BELLS[:1], BELLS))
    found = open_figure("guidance").evaluate("""(figure, [bells, points]) => {
        const m = sliderMaths, level = { t: 500, ...m.levels(m.alphaBar("cosine", 1000), 1000)[499] };
        const guided = m.guided(m.denoiser(bells.slice(0, 1)), m.denoiser(bells), ({ t }) => (t === 500 ? 3 : 0));
        const { x0, eps } = guided(Float64Array.from(points.flat()), level);
        return [[...x0], [...eps]];
    }""", [BELLS, POINTS])
    for mine, part in zip(found, ("x0", "eps"), strict=True):
        expected = getattr(plain, part) + 3 * (getattr(asked, part) - getattr(plain, part))
        assert np.allclose(mine, expected.flatten(), atol=1e-6)


def test_more_steps_come_nearer_and_cost_more(open_figure):
    figure, seen = open_figure("samplers"), []
    for sampler, steps in (("heun", 4), ("heun", 32)):
        turn(figure, sampler=sampler, steps=steps)
        seen.append([float(number) for number in re.findall(r"[0-9]+(?:[.][0-9]+)?", says(figure))])
    assert [questions for questions, _ in seen] == [6, 62]  # the first and the last step ask once
    assert seen[1][1] < seen[0][1] / 4
    turn(figure, sampler="ddpm")
    assert "no distance" in says(figure)


def test_scale_empties_the_loose_heap(open_figure):
    figure, shares = open_figure("guidance"), {}
    for scale, late in ((1, False), (4, False), (4, True)):
        turn(figure, scale=scale, late=late)
        shares[scale, late] = int(re.search(r"(\d+) % of the points", says(figure))[1])
    assert 35 < shares[1, False] < 65
    assert shares[4, False] < 5 < shares[4, True] < shares[1, False]


def test_play_moves_the_points_unless_less_motion_is_wanted(open_figure):
    figure = open_figure("samplers", reduced_motion="no-preference")
    figure.locator(".slider-play").click()
    figure.page.wait_for_function("document.getElementById('samplers-way').value < 0.9")
    figure.page.wait_for_function("document.getElementById('samplers-way').value === '1'")
    figure.page.close()
    assert open_figure("samplers", reduced_motion="reduce").locator(".slider-play").is_hidden()
