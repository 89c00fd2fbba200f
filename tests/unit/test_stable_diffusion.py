"""Chapter 19: the whole pipeline, tiny with random weights, and the miniature that ships."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusionbook.checkpoints import locate, sha256
from diffusionbook.data import from_pil, to_pil
from diffusionbook.denoising import Condition, Denoiser
from diffusionbook.samplers import dpmpp_2m, starting_noise, timesteps
from diffusionbook.stable_diffusion import PARTS, StableDiffusion
from diffusionbook.text import TextConfig, TextEncoder

CAPTION = "red heart, noto style"
FAST = {"steps": 4, "progress": False}


def pixels(pictures):
    return np.stack([np.asarray(picture) for picture in pictures]).astype(int)


@pytest.fixture
def saved(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# What a call gives


def test_a_caption_becomes_a_picture(tiny):
    pictures = tiny(CAPTION, **FAST)
    assert len(pictures) == 1 and isinstance(pictures[0], Image.Image)
    assert pictures[0].size == (64, 64) and pictures[0].mode == "RGB"
    assert pixels(pictures).std() > 5


def test_a_flow_is_not_saved_in_a_layout_that_cannot_say_so(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "prediction", "flow")
    with pytest.raises(ValueError, match="no place for a flow"):
        tiny.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_other_options_reach_the_sampler(tiny):
    usual, leading = tiny(CAPTION, **FAST), tiny(CAPTION, spacing="leading", **FAST)
    assert (pixels(usual) != pixels(leading)).any()
    assert (pixels(usual) != pixels(tiny(CAPTION, sampler="ddim", eta=1.0, **FAST))).any()
    with pytest.raises(ValueError, match="has no option warmth"):
        tiny(CAPTION, warmth=1.0, **FAST)


def test_the_tensor_is_the_same_picture(tiny):
    images = tiny(CAPTION, output="tensor", **FAST)
    assert images.shape == (1, 3, 64, 64) and images.dtype == torch.float32
    assert -1 <= images.min() and images.max() <= 1 and not images.requires_grad
    assert np.array_equal(pixels(to_pil(images)), pixels(tiny(CAPTION, **FAST)))


def test_the_same_seed_paints_the_same_picture_and_another_one_another(tiny):
    first, again, other = (pixels(tiny(CAPTION, seed=seed, **FAST)) for seed in (3, 3, 4))
    assert np.array_equal(first, again) and abs(first - other).mean() > 1


def test_each_picture_is_the_one_that_its_seed_paints_alone(tiny):
    batch = pixels(tiny([CAPTION, "pizza, twemoji style"], n=2, seed=7, **FAST))
    assert len(batch) == 4
    for i, caption in enumerate([CAPTION, CAPTION, "pizza, twemoji style", "pizza, twemoji style"]):
        assert abs(pixels(tiny(caption, seed=7 + i, **FAST))[0] - batch[i]).max() <= 2
    assert min(abs(batch[i] - batch[j]).mean() for i in range(4) for j in range(i)) > 1


def test_the_words_are_heard(tiny):
    paint = lambda caption, **options: pixels(tiny(caption, **FAST, **options))  # noqa: E731
    assert abs(paint(CAPTION) - paint("pizza")).mean() > 0.1
    assert abs(paint(CAPTION) - paint(CAPTION, guidance=9.0)).mean() > 0.1
    assert abs(paint(CAPTION) - paint(CAPTION, negative="pizza")).mean() > 0.1
    assert np.array_equal(paint(CAPTION, guidance=0), paint("pizza", guidance=0))
    assert np.array_equal(paint(CAPTION, negative=CAPTION), paint(CAPTION, negative=CAPTION, guidance=9.0))


def test_a_call_is_encode_sample_decode(tiny):
    """The same picture from its parts, guided by hand."""
    with_text, without = (Denoiser(tiny.unet, tiny.schedule, "v", Condition(context=tiny.encode_text([text])))
                          for text in (CAPTION, ""))

    def guided(x, t):
        yes, no = with_text(x, t), without(x, t)
        return type(yes)(no.x0 + 3 * (yes.x0 - no.x0), no.eps + 3 * (yes.eps - no.eps))

    guided.schedule = tiny.schedule
    *_, (x, _) = dpmpp_2m(guided, starting_noise((1, 4, 8, 8), seed=5), timesteps(tiny.schedule, 4))
    expected = tiny.vae.decode(x).clamp(-1, 1)
    found = tiny(CAPTION, seed=5, guidance=3.0, output="tensor", **FAST)
    assert torch.allclose(found, expected, atol=1e-4)


def test_without_guidance_the_network_is_asked_once_per_step(tiny):
    sizes = []
    handle = tiny.unet.register_forward_hook(lambda module, given, out: sizes.append(len(given[0])))
    try:
        tiny(CAPTION, guidance=1, **FAST)
        tiny(CAPTION, guidance=2, **FAST)
    finally:
        handle.remove()
    assert sizes == [1] * 4 + [2] * 4


def test_options_reach_the_sampler(tiny):
    states = []
    pictures = tiny(CAPTION, sampler="ddim", steps=5, progress=False, on_step=lambda *state: states.append(state))
    assert [i for i, _, _ in states] == [0, 1, 2, 3, 4]
    assert np.array_equal(pixels(to_pil(tiny.decode(states[-1][1]))), pixels(pictures))
    latents = starting_noise((1, 4, 8, 8), seed=9)
    assert np.array_equal(pixels(tiny(CAPTION, latents=latents, **FAST)), pixels(tiny(CAPTION, seed=9, **FAST)))
    assert not np.array_equal(pixels(tiny(CAPTION, **FAST)), pixels(tiny(CAPTION, sampler="ddim", **FAST)))


def test_size_is_height_and_width(tiny):
    assert tiny(CAPTION, size=(32, 48), **FAST)[0].size == (48, 32)
    assert tiny(CAPTION, size=(32, 48), output="tensor", **FAST).shape == (1, 3, 32, 48)


@pytest.mark.parametrize("options, message", [
    ({"size": (60, 64)}, r"multiples of 8, got \(60, 64\)"),
    ({"size": (0, 64)}, "multiples of"),
    ({"size": (72, 64)}, "multiples of"),  # good enough for the VAE, but the U-Net halves once more
    ({"n": 0}, "n must be at least 1"),
    ({"output": "numpy"}, 'output "pil" or "tensor"'),
    ({"steps": 0}, "1…1000"),
    ({"steps": 1001}, "1…1000"),
    ({"sampler": "eluer"}, "ddim, euler"),
    ({"guidance": float("nan")}, "finite"),
    ({"latents": torch.zeros(1, 4, 4, 4)}, r"\(1, 4, 8, 8\), got \(1, 4, 4, 4\)"),
])
def test_impossible_wishes_are_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(CAPTION, **FAST | options)


@pytest.mark.parametrize("prompt", [[], [3], None, 5, [CAPTION, None]])
def test_what_is_not_a_caption_is_refused(tiny, prompt):
    with pytest.raises((ValueError, TypeError), match="string"):
        tiny(prompt, **FAST)


def test_parts_that_do_not_belong_together_are_refused(tiny):
    other = TextEncoder(TextConfig(vocab_size=540, context_length=12, width=20, layers=1, heads=2))
    parts = {"vae": tiny.vae, "unet": tiny.unet, "tokenizer": tiny.tokenizer, "schedule": tiny.schedule}
    with pytest.raises(ValueError, match="width 16, the text encoder writes 20"):
        StableDiffusion(text_encoder=other, **parts)
    with pytest.raises(ValueError, match="epsilon, x0, v"):
        StableDiffusion(text_encoder=tiny.text_encoder, prediction="v_prediction", **parts)


# To disk and back


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_a_saved_pipeline_paints_as_before(tiny, tmp_path, prediction):
    parts = {name: getattr(tiny, name) for name in ("vae", "unet", "text_encoder", "tokenizer", "schedule")}
    pipeline = StableDiffusion(prediction=prediction, **parts)
    pipeline.save_pretrained(tmp_path)
    again = StableDiffusion.from_pretrained(tmp_path)
    assert again.prediction == prediction
    assert np.array_equal(pixels(again(CAPTION, **FAST)), pixels(pipeline(CAPTION, **FAST)))


def test_half_precision_on_disk_is_nearly_the_same(tiny, tmp_path):
    tiny.save_pretrained(tmp_path, dtype=torch.float16)
    stored = load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    again = StableDiffusion.from_pretrained(tmp_path)
    assert again.unet.dtype == again.vae.dtype == again.text_encoder.dtype == torch.float32
    assert 0 < abs(pixels(again(CAPTION, **FAST)) - pixels(tiny(CAPTION, **FAST))).mean() < 2
    low = StableDiffusion.from_pretrained(tmp_path, dtype=torch.bfloat16)
    images = low(CAPTION, output="tensor", **FAST)
    assert low.unet.dtype == torch.bfloat16 and images.dtype == torch.float32
    assert (images - tiny(CAPTION, output="tensor", **FAST)).abs().mean() < 0.1


def test_the_folder_is_a_pipeline_of_diffusers(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert all(index[part] == kind for part, kind in PARTS.items())
    scheduler = json.loads((saved / "scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["timestep_spacing"] == "trailing"
    assert scheduler["clip_sample"] is False and scheduler["beta_schedule"] == "squaredcos_cap_v2"


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(saved, part):
    (saved / part).rename(saved.parent / part)
    with pytest.raises(FileNotFoundError, match=f"it lacks {part};"):
        StableDiffusion.from_pretrained(saved)


def test_all_missing_parts_are_listed(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"it lacks {', '.join(PARTS)};"):
        StableDiffusion.from_pretrained(tmp_path)


def test_unknown_models_are_named():
    with pytest.raises(FileNotFoundError, match="no model named 'emojy'"):
        StableDiffusion.from_pretrained("emojy")


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json",
                                  "text_encoder/model.safetensors"])
def test_an_altered_file_is_named(saved, name):
    content = bytearray((saved / name).read_bytes())
    content[-2] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not the file it was"):
        StableDiffusion.from_pretrained(saved)


def test_a_network_of_another_pipeline_is_refused(saved):
    path = saved / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state.pop("conv_in.weight")
    save_file(state, path)
    (saved / "unet/SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="missing 'conv_in.weight'"):
        StableDiffusion.from_pretrained(saved)


def test_an_unknown_target_is_refused(saved):
    path = saved / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "flow"}))
    with pytest.raises(ValueError, match="prediction_type='flow'"):
        StableDiffusion.from_pretrained(saved)


# The miniature that ships


@pytest.fixture(scope="module")
def emoji_painter():
    return StableDiffusion.from_pretrained("emoji")


def test_the_miniature_is_whole(emoji_painter):
    folder = locate("emoji")
    for part in ("unet", "vae", "text_encoder"):
        for line in (folder / part / "SHA256SUMS").read_text().splitlines():
            digest, name = line.split()
            assert sha256(folder / part / name) == digest
    assert emoji_painter.vae.factor == 8 and emoji_painter.vae.config.latent_channels == 4
    assert emoji_painter.tokenizer.vocab_size <= emoji_painter.text_encoder.config.vocab_size
    assert emoji_painter.tokenizer.context_length == emoji_painter.text_encoder.config.context_length


def test_the_miniature_paints_a_red_heart(emoji_painter):
    """White in the corners, red in the middle, the same picture each time and another one for another seed."""
    first, again = (from_pil(emoji_painter(CAPTION, steps=12, seed=0, progress=False)) for _ in range(2))
    assert torch.equal(first, again)
    three = from_pil(emoji_painter(CAPTION, n=3, steps=12, seed=0, progress=False))
    assert (three[0] - first[0]).abs().max() <= 2 / 127.5 + 1e-6
    assert all((three[0] - three[i]).abs().mean() > 0.002 for i in (1, 2))
    for picture in three:
        red, green, blue = picture[:, 26:38, 26:38].mean((1, 2))
        assert red > 0.3 and green < 0 and blue < 0, (red, green, blue)
        corners = picture[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.min() > 0.6


def test_the_miniature_minds_its_words(emoji_painter):
    captions = ["blue heart, noto style", "green circle, noto style", "yellow heart, noto style"]
    blue, green, yellow = from_pil(emoji_painter(captions, steps=12, progress=False))[:, :, 26:38, 26:38].mean((2, 3))
    assert blue[2] > blue[0] + 0.3
    assert green[1] > green[0] and green[1] > green[2]
    assert yellow[0] > yellow[2] + 0.3 and yellow[1] > yellow[2] + 0.3
