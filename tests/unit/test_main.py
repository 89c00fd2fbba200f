"""The command line: pictures where they were asked for, one clear sentence where that can't be."""

import io
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusionbook.__main__ import SYSTEMS, _painter, main
from diffusionbook.data import image_grid


@pytest.fixture
def model(tiny, tmp_path):
    folder = tmp_path / "model"
    tiny.save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys):
    """Run the command line here; gives the exit code and what was printed to stdout and stderr."""
    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's own way to say no
            code = stop.code
        return code, *capsys.readouterr()
    return run


def refused(result, *words):
    code, out, err = result
    assert code == 2 and out == "", result
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("diffusionbook") and all(word in last for word in words), err


def test_a_caption_becomes_a_file(run, model, tiny, tmp_path):
    code, out, err = run("generate", "red heart", "--seed", 3, "--steps", 4, "--guidance", 2, "--sampler", "ddim",
                         "--model", model, "--out", tmp_path / "heart.png")
    assert code == 0 and out == f"{tmp_path / 'heart.png'}\n"
    expected, = tiny("red heart", seed=3, steps=4, guidance=2.0, sampler="ddim", progress=False)
    with Image.open(tmp_path / "heart.png") as picture:
        assert abs(np.asarray(picture).astype(int) - np.asarray(expected)).max() <= 2
        assert picture.text["caption"] == "red heart" and picture.text["seed"] == "3"  # how it was made
    assert "/4" in err  # the progress bar


@pytest.mark.parametrize("model", SYSTEMS)
def test_each_system_has_a_name(monkeypatch, model):
    module, name = SYSTEMS[model]
    pipeline = getattr(import_module(f"diffusionbook.{module}"), name)
    asked = []
    monkeypatch.setattr(pipeline, "from_pretrained", asked.append)
    _painter(model)
    assert asked == ["emoji"]


def test_an_interrupt_is_one_line(run, monkeypatch, tmp_path):
    def interrupted(model):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusionbook.__main__._painter", interrupted)
    assert run("generate", "pizza", "--out", tmp_path / "x.png") == (130, "", "diffusionbook: interrupted\n")
    assert not (tmp_path / "x.png").exists()


def test_what_a_system_cannot_do_is_named(run, monkeypatch, tmp_path):
    class Writer:
        def to(self, device):
            return self

        def __call__(self, prompt, *, n=1, seed=0, guidance=1.0):
            raise AssertionError("nothing should be painted")

    monkeypatch.setattr("diffusionbook.__main__._painter", lambda model: Writer())
    refused(run("generate", "pizza", "--steps", 5, "--model", "dalle", "--out", tmp_path / "x.png"), "dalle", "--steps")


def test_a_folder_says_which_system_it_holds(tmp_path):
    from diffusionbook.__main__ import _system

    for name, made, system in (
        ("unclip", {"model_index.json": '{"_class_name": "UnCLIPPipeline"}'}, "dalle2"),
        ("karlo", {"prior-ckpt-1.pt": ""}, "dalle2"),
        ("ours", {"glide.json": "{}"}, "glide"),
        ("theirs", {"base.pt": ""}, "glide"),
        ("codes", {"dalle/config.json": "{}"}, "dalle"),
        ("diffusers", {"model_index.json": '{"_class_name": "StableDiffusionPipeline"}', "dalle/x": ""}, "emoji"),
    ):
        for file, text in made.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
        assert _system(tmp_path / name) == system, name


@pytest.mark.parametrize("count, size", [(4, (130, 130)), (16, (262, 262)), (3, (130, 130)), (1, (64, 64))])
def test_a_grid(run, model, tiny, tmp_path, count, size):
    code, *_ = run("generate", "pizza", "--grid", count, "--steps", 2, "--model", model, "--out", tmp_path / "grid.png")
    assert code == 0
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == size
        pictures = tiny("pizza", n=count, steps=2, progress=False)
        expected = image_grid(pictures, columns=max(1, round(count**0.5)))
        assert abs(np.asarray(sheet).astype(int) - np.asarray(expected)).max() <= 2


def test_other_kinds_of_picture(run, model, tmp_path):
    for name, kind in (("heart.webp", "WEBP"), ("heart.JPG", "JPEG")):
        assert run("generate", "red heart", "--steps", 1, "--model", model, "--out", tmp_path / name)[0] == 0
        with Image.open(tmp_path / name) as picture:
            assert picture.format == kind


def test_an_existing_picture_is_replaced(run, model, tmp_path):
    path = tmp_path / "heart.png"
    path.write_text("old")
    assert run("generate", "red heart", "--steps", 1, "--model", model, "--out", path)[0] == 0
    with Image.open(path) as picture:
        assert picture.size == (64, 64)


def test_refusals_leave_an_existing_picture_alone(run, model, tmp_path):
    path = tmp_path / "heart.png"
    path.write_text("old")
    refused(run("generate", "red heart", "--steps", 0, "--model", model, "--out", path), "steps")
    assert path.read_text() == "old"
    refused(run("generate", "red heart", "--model", "emojy", "--out", tmp_path / "new.png"), "emojy")
    assert not (tmp_path / "new.png").exists()


def test_a_full_disk_leaves_an_existing_picture_alone(run, model, tmp_path, monkeypatch):
    path = tmp_path / "heart.png"
    path.write_text("old")

    whole = Image.Image.save

    def save(picture, path, **options):
        if isinstance(path, io.BytesIO):  # a first look at whether such a file can be written
            return whole(picture, path, **options)
        Path(path).write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    refused(run("generate", "red heart", "--steps", 1, "--model", model, "--out", path), "no space left")
    assert path.read_text() == "old" and sorted(tmp_path.iterdir()) == [path, model]


@pytest.mark.parametrize("caption", ["", "  ", "\n"])
def test_an_empty_caption(run, model, tmp_path, caption):
    refused(run("generate", caption, "--model", model, "--out", tmp_path / "x.png"), "caption", "empty")


def test_an_unknown_model(run, tmp_path):
    refused(run("generate", "red heart", "--model", "emojy", "--out", tmp_path / "x.png"), "no model named 'emojy'")


def test_an_incomplete_model(run, model, tmp_path):
    (model / "vae").rename(tmp_path / "vae")
    refused(run("generate", "red heart", "--model", model, "--out", tmp_path / "x.png"), "it lacks vae")


@pytest.mark.parametrize("name, words", [
    ("nowhere/x.png", ["can't write to", "nowhere", "--out"]),
    ("x.txt", ["x.txt", "x.png"]),
    ("picture", ["picture.png"]),
    ("x.psd", ["x.psd", "x.png"]),  # Pillow reads it but can't write it
])
def test_paths_that_cannot_be_written(run, model, tmp_path, name, words):
    refused(run("generate", "red heart", "--steps", 1, "--model", model, "--out", tmp_path / name), *words)


def test_a_folder_is_not_a_picture(run, model, tmp_path):
    (tmp_path / "x.png").mkdir()
    refused(run("generate", "red heart", "--model", model, "--out", tmp_path / "x.png"), "can't write to", "folder")


def test_a_folder_without_permission(run, model, tmp_path, monkeypatch):
    def forbid(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", forbid)  # root may write everywhere
    refused(run("generate", "red heart", "--model", model, "--out", tmp_path / "x.png"), "can't write to", "denied")


@pytest.mark.parametrize("options, word", [
    (["--steps", 0], "steps"),
    (["--steps", 1001], "steps"),
    (["--steps", "many"], "--steps"),
    (["--grid", 0], "1"),
    (["--grid", -2], "1"),
    (["--sampler", "oiler"], "ddim"),
    (["--guidance", "nan"], "finite"),
    (["--guidance", "1e38"], "NaN"),
    (["--seed", "one"], "--seed"),
    (["--seed", 2**70], "seed"),
])
def test_impossible_options(run, model, tmp_path, options, word):
    refused(run("generate", "red heart", "--model", model, "--out", tmp_path / "x.png", *options), word)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("arguments", [[], ["paint"], ["generate"], ["generate", "a", "b"]])
def test_other_commands(run, arguments):
    refused(run(*arguments))


def test_help(run):
    code, out, _ = run("generate", "--help")
    assert code == 0
    for option in ("--seed", "--out", "--grid", "--steps", "--guidance", "--model", "--sampler"):
        assert option in out


def test_python_dash_m(model, tmp_path):
    """In a process of its own: exit code 2 and one sentence, not a traceback."""
    command = [sys.executable, "-m", "diffusionbook", "generate", "red heart", "--model", "no such model"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.count("\n") == 1 and "no model named 'no such model'" in found.stderr


# --- train -------------------------------------------------------------------------------------
RECIPE = """
data = {name = "digits", count = 20, size = 8, classes = ["digit"]}
network = {channels = [8, 8], attention = ["", "self"], heads = [1, 1], layers_per_block = 1, in_channels = 1, \
out_channels = 1, groups = 4, sample_size = 8, context_width = 0}
schedule = {name = "linear"}
loss = {prediction = "epsilon", drop = 0.1}
train = {steps = 4, lr = 1e-3, batch = 4, every = 2}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_is_trained_in_parts(run, recipe, tmp_path):
    code, out, err = run("train", recipe, "--steps", 2, "--device", "cpu")
    folder = tmp_path / "runs" / "tiny"
    assert code == 0 and out == f"{Path('runs') / 'tiny'}\n" and "2/2" in err
    assert {"log.jsonl", "state.pt", "unet", "scheduler", "classes.json"} <= {path.name for path in folder.iterdir()}
    code, out, err = run("train", recipe, "--device", "cpu")
    assert code == 0 and "4/4" in err
    assert (folder / "log.jsonl").read_text().count("\n") == 2


def test_weights_ship_under_a_name(run, recipe, tmp_path, monkeypatch):
    import diffusionbook.__main__ as command
    from diffusionbook.training import load_denoiser

    monkeypatch.setattr(command, "__file__", str(tmp_path / "package" / "__main__.py"))
    shipped = tmp_path / "package" / "weights" / "tiny"
    code, out, _ = run("train", recipe, "--device", "cpu", "--folder", tmp_path / "run", "--ship", "tiny")
    assert code == 0 and out == f"{shipped}\n"
    (ours, classes), (theirs, _) = load_denoiser(tmp_path / "run"), load_denoiser(shipped)
    assert classes == list("0123456789") and not (shipped / "state.pt").exists()
    for name, p in ours.network.state_dict().items():
        assert np.allclose(p, theirs.network.state_dict()[name], rtol=1e-3, atol=1e-6)  # half precision
    assert load_file(shipped / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.float16


@pytest.mark.parametrize("options, words", [
    (["--steps", 0], ["steps must be at least 1"]),
    (["--steps", "many"], ["--steps"]),
    (["--device", "gpu"], ["no device 'gpu' here", "--device"]),
    (["--device", "cuda:99"], ["no device 'cuda:99' here"]),
    (["--ship", "../elsewhere"], ["--ship", "plain name"]),
])
def test_training_that_cannot_be(run, recipe, tmp_path, options, words):
    refused(run("train", recipe, *options), *words)
    assert not (tmp_path / "runs").exists()


def test_a_recipe_that_is_none(run, recipe, tmp_path):
    refused(run("train", tmp_path / "nowhere.toml"), "no recipe at", "nowhere.toml")
    recipe.write_text("steps = 3")
    refused(run("train", recipe), "tiny.toml", "tables")
    refused(run("train"), "recipe")


@pytest.mark.parametrize("name", ["heart.h5", "heart.xbm"])  # Pillow knows these, and can't write colours as such
def test_a_kind_of_picture_that_cannot_be_written(run, model, tmp_path, name):
    refused(run("generate", "red heart", "--model", model, "--out", tmp_path / name), "kind of picture", "heart.png")


def test_a_caption_that_is_no_text(run, model, tmp_path):
    refused(run("generate", "heart \udcff", "--model", model, "--out", tmp_path / "x.png"), "no text in UTF-8")
