"""Chapter 19: the whole pipeline, tiny with random weights, and the miniature that ships."""

import json
import re
import shutil
from dataclasses import replace

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusionbook.autoencoders import VAE, VAEConfig
from diffusionbook.checkpoints import locate, sha256, to_guided_diffusion, to_latent_diffusion_vae
from diffusionbook.clip import CLIP, CLIPConfig, VisionConfig
from diffusionbook.data import from_pil, to_pil
from diffusionbook.denoising import Condition, Denoiser
from diffusionbook.samplers import dpmpp_2m, starting_noise, timesteps
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.stable_diffusion import PARTS, StableDiffusion, offload, word_maps
from diffusionbook.text import TextConfig, TextEncoder, train_bpe
from diffusionbook.unet import UNet, UNetConfig

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
    with pytest.raises(ValueError, match="has an option warmth"):
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
    assert tiny(CAPTION, size=(40, 56), output="tensor", **FAST).shape == (1, 3, 40, 56)  # latents of 5 × 7


@pytest.mark.parametrize("options, message", [
    ({"size": (60, 64)}, r"multiples of 8, at least 16, got \(60, 64\)"),  # 8 for the VAE, 2 for the U-Net
    ({"size": (8, 64)}, r"at least 16, got \(8, 64\)"),
    ({"size": (0, 64)}, "multiples of"),
    ({"size": 64}, r"\(height, width\) in pixels, got 64"),
    ({"size": (64.0, 64.0)}, "multiples of 8"),
    ({"n": 0}, "n must be at least 1"),
    ({"n": 2.0}, "n must be at least 1, a whole number, got 2.0"),
    ({"output": "numpy"}, 'output "pil" or "tensor"'),
    ({"steps": 0}, "1…1000"),
    ({"steps": 1001}, "1…1000"),
    ({"sampler": "eluer"}, "ddim, euler"),
    ({"guidance": float("nan")}, "finite"),
    ({"latents": torch.zeros(1, 4, 4, 4), "size": (64, 64)}, r"\(1, 4, 8, 8\), got \(1, 4, 4, 4\)"),
    ({"latents": torch.zeros(1, 4, 1, 8)}, r"at least 16, got \(8, 64\)"),
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


def test_vectors_may_stand_for_captions(tiny):
    context = tiny.encode_text([CAPTION, "pizza"])
    assert context.shape == (2, 12, 16)
    images = tiny(context, output="tensor", **FAST)
    assert torch.allclose(images, tiny([CAPTION, "pizza"], output="tensor", **FAST), atol=1e-4)
    assert tiny(context[:1], n=2, **FAST)[1].info["seed"] == "1"
    assert torch.equal(tiny(context.double(), output="tensor", **FAST), images)
    for wrong in (context[0], context[:, :, :8], context[:0], tiny.tokenizer(["pizza"])):
        with pytest.raises(ValueError, match=r"floats of shape \(B, tokens, 16\)"):
            tiny(wrong, **FAST)


@pytest.mark.parametrize("options, message", [
    ({"n": -1}, "n must be at least 1"), ({"n": 1.5}, "n must be at least 1"), ({"n": 0}, "n must be at least 1"),
])
def test_vectors_are_counted_as_captions_are(tiny, options, message):
    context = tiny.encode_text(["red heart"])
    with pytest.raises(ValueError, match=message):
        tiny(context, **options, **FAST)
    with pytest.raises(ValueError, match="stand for .* tokens where there is guidance"):
        tiny(context[:, :2], **FAST)
    assert len(tiny(context[:, :2], guidance=1.0, **FAST)) == 1


def test_a_picture_is_as_large_as_the_latents_given(tiny):
    latents = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0))
    (found,) = tiny(CAPTION, latents=latents, **FAST)
    assert found.size == (128, 96) and found.info["latents"] == "given"


def test_clip_skip_leaves_out_the_last_blocks(tiny):
    encoder = TextEncoder(replace(tiny.text_encoder.config, layers=3)).eval()
    parts = {name: getattr(tiny, name) for name in ("vae", "unet", "tokenizer", "schedule", "prediction")}
    painter = StableDiffusion(text_encoder=encoder, **parts)
    short = TextEncoder(replace(tiny.text_encoder.config, layers=2)).eval()
    short.load_state_dict(encoder.state_dict(), strict=False)
    painter_short = StableDiffusion(text_encoder=short, **parts)
    skipped = painter(CAPTION, clip_skip=1, output="tensor", **FAST)
    assert torch.equal(skipped, painter_short(CAPTION, output="tensor", **FAST))
    assert not torch.equal(skipped, painter(CAPTION, output="tensor", **FAST))
    assert painter(CAPTION, clip_skip=1, **FAST)[0].info["clip_skip"] == "1"
    with pytest.raises(ValueError, match=r"skip must lie in \[0, 2\]"):
        painter(CAPTION, clip_skip=3, **FAST)


def test_guidance_is_rescaled_where_the_schedule_ends_without_signal(tiny):
    parts = {name: getattr(tiny, name) for name in ("vae", "unet", "text_encoder", "tokenizer", "prediction")}
    silent = StableDiffusion(schedule=NoiseSchedule.scaled_linear().zero_terminal_snr(), **parts)
    paint = lambda painter, **options: painter(CAPTION, guidance=6, output="tensor", **FAST, **options)  # noqa: E731
    assert torch.equal(paint(silent), paint(silent, rescale=0.7))
    assert not torch.equal(paint(silent), paint(silent, rescale=0.0))
    assert torch.equal(paint(tiny), paint(tiny, rescale=0.0))


# What a picture says about itself


def test_a_saved_picture_says_how_it_was_made(tiny, tmp_path):
    first, second = tiny(CAPTION, n=2, seed=5, negative="pizza", guidance=4.0, **FAST)
    second.save(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as found:
        told = found.text
    assert told == {"software": "diffusionbook", "model": "", "caption": CAPTION, "negative": "pizza", "seed": "6",
                    "guidance": "4.0", "steps": "4", "sampler": "dpmpp_2m"}
    assert first.info["seed"] == "5" and first.info["sampler"] == "dpmpp_2m" and "latents" not in first.info
    (other,) = tiny(CAPTION, rescale=0.5, **FAST)
    assert other.info["rescale"] == "0.5" and "clip_skip" not in other.info
    second.save(tmp_path / "picture.jpg")
    (plain,) = tiny(CAPTION, metadata=False, **FAST)
    plain.save(tmp_path / "plain.png")
    with Image.open(tmp_path / "plain.png") as found:
        assert found.text == {}
    second.resize((8, 8)).save(tmp_path / "small.png")
    with Image.open(tmp_path / "small.png") as found:
        assert found.text == {}


# What went wrong


def test_nan_is_traced_to_a_layer_and_a_remedy_is_named(tiny):
    for network, where in ((tiny.unet, "mid_block.resnets.1.conv2"), (tiny.vae, "decoder.mid_block.resnets.0.conv1")):
        layer = network.get_submodule(where)
        kept = layer.bias.data
        layer.bias.data = torch.full_like(kept, 3e38)
        layer.weight.data *= 1e38
        try:
            with pytest.raises(FloatingPointError, match=rf"began in .*{re.escape(where)}.* of the {network.subfolder},"
                                                         r" computed in torch.float32; use less guidance"):
                tiny(CAPTION, **FAST)
        finally:
            layer.bias.data, layer.weight.data = kept, layer.weight.data / 1e38


@pytest.mark.parametrize("dtype, types", [(torch.float16, "torch.bfloat16 or torch.float32"),
                                          (torch.bfloat16, "torch.float32")])
def test_half_precision_is_told_what_to_take_instead(tiny, dtype, types):
    said = str(tiny._lost(UNet(tiny.unet.config).to(dtype), lambda: None))
    assert f"computed in {dtype}; load the pipeline with dtype={types}, or use less guidance" in said


def test_what_a_long_caption_loses_is_said(tiny):
    for end in ("pan", "plan"):  # each caption, not only the first
        with pytest.warns(UserWarning, match="there is room for 10; this part was cut: '.*n'"):
            tiny("pizza " * 20 + end, **FAST)


def test_a_network_for_inpainting_says_so(tiny):
    parts = {name: getattr(tiny, name) for name in ("vae", "text_encoder", "tokenizer", "schedule", "prediction")}
    unet = UNet(replace(tiny.unet.config, in_channels=9))
    with pytest.raises(ValueError, match="5 more channels, a mask and a picture: call inpaint"):
        StableDiffusion(unet=unet, **parts)(CAPTION, **FAST)
    with pytest.raises(ValueError, match="call inpaint"):
        StableDiffusion(unet=unet, **parts).img2img(torch.zeros(1, 3, 64, 64), CAPTION, **FAST)


def test_latents_and_pictures_of_another_type(tiny):
    latents = starting_noise((1, 4, 8, 8), seed=1)
    assert torch.equal(tiny.decode(latents.double()), tiny.decode(latents))
    with pytest.raises(ValueError, match="float tensor.*uint8"):
        tiny.encode(torch.ones(1, 3, 64, 64, dtype=torch.uint8))


def test_words_are_looked_at_on_some_sides_only(tiny):
    assert word_maps(tiny, "pizza", side=4, steps=1, progress=False)[2].shape[1:] == (4, 4)
    with pytest.raises(ValueError, match="no layer of this network looks at words on maps 3 high"):
        word_maps(tiny, "pizza", side=3, steps=1, progress=False)


def test_maps_of_a_picture_that_is_not_square(tiny):
    assert word_maps(tiny, "pizza", size=(64, 256), steps=1, progress=False)[2].shape[1:] == (8, 32)
    small = word_maps(tiny, "pizza", size=(64, 256), side=4, steps=1, progress=False)[2]
    assert small.shape[1:] == (4, 16)


def test_what_does_not_exist_is_an_attribute_error(tiny):
    with pytest.raises(AttributeError, match="no attribute 'upscale'"):
        tiny.upscale  # noqa: B018


# Little memory


def test_blocks_come_to_the_device_only_while_they_run(tiny):
    unet = UNet(tiny.unet.config).eval()
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    offload(unet, "meta")
    places = []
    unet.mid_block.resnets[0].conv1.register_forward_pre_hook(
        lambda *_: places.append((unet.mid_block.resnets[0].conv1.weight.device.type, unet.conv_in.weight.device.type)))
    out = unet(*(torch.empty(shape, device="meta") for shape in ((1, 4, 8, 8), (1,), (1, 3, 16))))
    assert out.device.type == "meta" and places == [("meta", "cpu")]
    assert all(p.device.type == "cpu" and torch.equal(p, before[name]) for name, p in unet.named_parameters())


def test_low_memory_paints_the_same(saved, tiny):
    low = StableDiffusion.from_pretrained(saved, memory="low").to("cpu")
    images = low(CAPTION, n=2, output="tensor", **FAST)
    assert torch.allclose(images, tiny(CAPTION, n=2, output="tensor", **FAST), atol=0.02)
    with pytest.raises(ValueError, match='"low" or None'):
        StableDiffusion.from_pretrained(saved, memory="little")
    again = low.to("meta").to("meta").to("cpu")(CAPTION, n=2, output="tensor", **FAST)
    assert torch.equal(again, images)  # a device that was left is no longer used
    assert not any(module._forward_hooks for module in low.unet.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_with_little_memory_all_networks_work_on_the_device_and_rest_elsewhere(saved, dtype):
    low = StableDiffusion.from_pretrained(saved, memory="low", dtype=dtype).to("meta")
    layers = [layer for part in (low.unet, low.vae, low.text_encoder) for layer in part.modules()
              if any(p is not None for p in layer._parameters.values())]
    worked = set()
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: worked.add((layer, next(layer.parameters()).device.type)))
    assert low.encode_text([CAPTION]).device.type == "meta"
    assert low(CAPTION, output="tensor", **FAST).device.type == "meta"
    assert low.encode(torch.empty(1, 3, 64, 64, device="meta")).device.type == "meta"
    assert {place for _, place in worked} == {"meta"} and {layer for layer, _ in worked} == set(layers)
    assert all(p.device.type == "cpu" for part in (low.unet, low.vae, low.text_encoder) for p in part.parameters())


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


def test_the_words_may_come_from_a_whole_clip(tiny, saved):
    vision = VisionConfig(image_size=16, patch=8, width=16, layers=1, heads=2)
    clip = CLIP(CLIPConfig(tiny.text_encoder.config, vision, 8))
    clip.text_model.load_state_dict(tiny.text_encoder.state_dict())
    clip.save_pretrained(saved / "clip")
    shutil.rmtree(saved / "text_encoder")
    again = StableDiffusion.from_pretrained(saved)
    assert np.array_equal(pixels(again(CAPTION, **FAST)), pixels(tiny(CAPTION, **FAST)))
    shutil.move(saved / "tokenizer", saved / "other")
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        StableDiffusion.from_pretrained(saved)
    clip.tokenizer = tiny.tokenizer
    clip.save_pretrained(saved / "clip")
    again = StableDiffusion.from_pretrained(saved)
    assert np.array_equal(pixels(again(CAPTION, **FAST)), pixels(tiny(CAPTION, **FAST)))


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


def test_truncated_weights_are_refused(saved):
    path = saved / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    (saved / "unet/SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="damaged or not safetensors"):
        StableDiffusion.from_pretrained(saved)


# A single file with the original names


def ldm_text(encoder, *, modern):
    state = encoder.state_dict()
    if not modern:
        return {f"transformer.text_model.{key}": tensor for key, tensor in state.items()} | {
            "transformer.text_model.embeddings.position_ids": torch.arange(encoder.config.context_length)[None]}
    renamed, layers = {}, encoder.config.layers
    names = [("embeddings.token_embedding.", "token_embedding."), ("embeddings.position_embedding.weight",
             "positional_embedding"), ("encoder.layers.", "transformer.resblocks."), ("layer_norm", "ln_"),
             ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("self_attn", "attn"), ("final_ln_.", "ln_final.")]
    for key, tensor in state.items():
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        renamed[f"model.{key.replace('final_layer_norm', 'ln_final')}"] = tensor
    for i in range(layers):
        for kind in ("weight", "bias"):
            stem = f"model.transformer.resblocks.{i}.attn"
            parts = [renamed.pop(f"{stem}.{name}_proj.{kind}") for name in "qkv"]
            renamed[f"{stem}.in_proj_{kind}"] = torch.cat(parts)
    unused = {key.replace(f"resblocks.{layers - 1}.", f"resblocks.{layers}."): torch.randn_like(tensor)
              for key, tensor in renamed.items() if f"resblocks.{layers - 1}." in key}
    return renamed | unused | {"model.logit_scale": torch.ones(()), "model.text_projection": torch.ones(2, 2)}


def single_file(painter, *, modern):
    state = {f"model.diffusion_model.{key}": tensor
             for key, tensor in to_guided_diffusion(painter.unet.state_dict(), head_width=None).items()}
    state |= to_latent_diffusion_vae(painter.vae.state_dict())
    text = ldm_text(painter.text_encoder, modern=modern)
    state |= {f"cond_stage_model.{key}": tensor for key, tensor in text.items()}
    state |= {"betas": painter.schedule.betas.float(), "alphas_cumprod": painter.schedule.alpha_bar.float(),
              "model_ema.decay": torch.ones(())}
    return {key: tensor.contiguous() for key, tensor in state.items()}


def ldm_painter(*, modern):
    """A small pipeline that follows the rules by which a single file is read."""
    torch.manual_seed(1)
    tokenizer = train_bpe([CAPTION], 516, context_length=12, pad="zero" if modern else "eos")
    encoder = TextEncoder(TextConfig(vocab_size=516, context_length=12, width=64, layers=2, heads=1,
                                     activation="gelu" if modern else "quick_gelu", pad_id=tokenizer.pad_id)).eval()
    heads = {"heads": (1, 2), "linear_projection": True, "upcast_attention": True} if modern else {"heads": (8, 8)}
    unet = UNet(UNetConfig(channels=(64, 128), attention=("cross", None), context_width=64, layers_per_block=1,
                           sample_size=96 if modern else 64, **heads)).eval()
    vae = VAE(VAEConfig(channels=(32, 32, 64), layers_per_block=1)).eval()
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(0.05 * torch.randn_like(p))
        for p in encoder.embeddings.parameters():
            p.normal_()
    return StableDiffusion(vae=vae, unet=unet, text_encoder=encoder, tokenizer=tokenizer,
                           schedule=NoiseSchedule.scaled_linear(), prediction="v" if modern else "epsilon")


@pytest.mark.filterwarnings("ignore:.*there is room for:UserWarning")
@pytest.mark.parametrize("modern", [False, True], ids=["Stable Diffusion 1", "Stable Diffusion 2"])
def test_a_single_file_gives_the_same_pipeline(tmp_path, modern):
    painter = ldm_painter(modern=modern)
    state = single_file(painter, modern=modern)
    save_file(state, tmp_path / "model.safetensors")
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "model.ckpt")
    options = {"size": (32, 32), "output": "tensor", **FAST}
    wanted = painter(CAPTION, **options)
    for name in ("model.safetensors", "model.ckpt"):
        found = StableDiffusion.from_pretrained(tmp_path / name, tokenizer=painter.tokenizer)
        assert found.name == "model" and found.prediction == painter.prediction
        for part in ("unet", "vae", "text_encoder"):
            ours, theirs = getattr(painter, part), getattr(found, part)
            changed = {"sample_size": theirs.config.sample_size} if part != "text_encoder" else {
                "eos_id": theirs.config.eos_id, "bos_id": theirs.config.bos_id}
            assert replace(ours.config, **changed) == theirs.config
            assert all(torch.equal(p, theirs.state_dict()[key]) for key, p in ours.state_dict().items())
        assert torch.equal(found(CAPTION, **options), wanted)
    base = StableDiffusion.from_pretrained(tmp_path / "model.ckpt", tokenizer=painter.tokenizer, prediction="epsilon")
    assert base.prediction == "epsilon"


@pytest.mark.filterwarnings("ignore:.*there is room for:UserWarning")
def test_a_single_file_of_the_inpainting_kind_wants_nine_channels(tmp_path):
    painter = ldm_painter(modern=False)
    unet = UNet(replace(painter.unet.config, in_channels=9)).eval()
    unet.load_state_dict({key: tensor if key != "conv_in.weight" else torch.cat([tensor, tensor, tensor[:, :1]], 1)
                          for key, tensor in painter.unet.state_dict().items()})
    painter = StableDiffusion(unet=unet, **{name: getattr(painter, name) for name in (
        "vae", "text_encoder", "tokenizer", "schedule", "prediction")})
    save_file(single_file(painter, modern=False), tmp_path / "inpaint.safetensors")
    found = StableDiffusion.from_pretrained(tmp_path / "inpaint.safetensors", tokenizer=painter.tokenizer)
    assert found.extra_channels == 5 and found.prediction == "epsilon"
    image, mask = torch.rand(1, 3, 32, 32) * 2 - 1, torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    mask[..., :16] = True
    wanted, painted = (pipe.inpaint(image, mask, CAPTION, output="tensor", **FAST) for pipe in (painter, found))
    assert torch.equal(wanted, painted)
    with pytest.raises(ValueError, match="call inpaint"):
        found(CAPTION, size=(32, 32), **FAST)


def test_a_single_file_without_signal_at_its_end_says_so_in_its_table(tmp_path):
    painter = ldm_painter(modern=True)
    state = single_file(painter, modern=True)
    for schedule in (painter.schedule, painter.schedule.zero_terminal_snr()):
        save_file(state | {"alphas_cumprod": schedule.alpha_bar.float()}, tmp_path / "model.safetensors")
        found = StableDiffusion.from_pretrained(tmp_path / "model.safetensors", tokenizer=painter.tokenizer)
        assert torch.allclose(found.schedule.alpha_bar, schedule.alpha_bar, atol=1e-6)
    assert found.schedule.alpha_bar[-1] == 0


def test_a_file_of_something_else_is_refused(tmp_path):
    save_file({"model.diffusion_model.out.2.weight": torch.ones(1)}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="lacks vae, text_encoder: no checkpoint of a whole"):
        StableDiffusion.from_pretrained(tmp_path / "half.safetensors")


# The Hub


def test_only_what_is_needed_is_downloaded(saved, monkeypatch, tmp_path):
    asked = []

    def snapshot_download(repository, *, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    painter = StableDiffusion.from_pretrained("someone/a-model")
    assert painter.name == "a-model"
    ((repository, patterns),) = asked
    assert repository == "someone/a-model"
    assert "unet/diffusion_pytorch_model.safetensors" in patterns and "text_encoder/model.safetensors" in patterns
    assert not any("safety" in pattern or ".bin" in pattern or ".ckpt" in pattern for pattern in patterns)
    for name in ("unet/diffusion_pytorch_model.safetensors",):
        (saved / name).unlink()
    with pytest.raises((FileNotFoundError, ValueError)):
        StableDiffusion.from_pretrained("someone/a-model")
    for (_, patterns), end in zip(asked[1:], ("model.safetensors", ".fp16.safetensors", ".bin"), strict=True):
        assert any(pattern.endswith(end) for pattern in patterns)
    weights = saved / "unet" / "diffusion_pytorch_model.fp16.safetensors"  # a repository with nothing but these
    tensors = {key: tensor.half() for key, tensor in painter.unet.state_dict().items()}

    def halves_only(repository, *, allow_patterns):
        if any(".fp16." in pattern for pattern in allow_patterns):
            save_file(tensors, weights)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", halves_only)
    (saved / "unet" / "SHA256SUMS").unlink()
    assert torch.equal(StableDiffusion.from_pretrained("someone/a-model").unet.conv_in.weight,
                       tensors["conv_in.weight"].float())


def test_a_damaged_download_is_noticed(saved, monkeypatch, tmp_path):
    """The Hub's cache holds each large file under its SHA-256, and the repository's folder points there."""
    weights, blobs = saved / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "blobs"
    blobs.mkdir()
    blob = blobs / sha256(weights)
    weights.rename(blob)
    weights.symlink_to(blob)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *given, **options: str(saved))
    monkeypatch.chdir(tmp_path)
    assert StableDiffusion.from_pretrained("someone/a-model").name == "a-model"
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.safetensors is damaged: its SHA-256.*delete it"):
        StableDiffusion.from_pretrained("someone/a-model")


def test_with_little_memory_pictures_are_read_in_tiles(tiny, monkeypatch):
    tiles = []
    read = type(tiny.vae).encode
    monkeypatch.setattr(type(tiny.vae), "encode", lambda vae, images, *, tile=None: (
        tiles.append(tile), read(vae, images, tile=tile))[1])
    parts = {name: getattr(tiny, name) for name in ("unet", "vae", "text_encoder", "tokenizer", "schedule",
                                                    "prediction")}
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    latents = [StableDiffusion(**parts, memory=memory).encode(image) for memory in (None, "low")]
    assert tiles == [None, 256] and (latents[0] - latents[1]).abs().max() < 1e-4


def test_a_pipeline_is_saved_whole_or_not_at_all(tiny, tmp_path):
    bias = tiny.vae.decoder.conv_out.bias
    kept = bias.data.clone()
    bias.data[0] = 1e6  # too large for float16, and in the last part that is written
    try:
        with pytest.raises(ValueError, match="holds NaN or infinity as torch.float16, so nothing was saved"):
            tiny.save_pretrained(tmp_path / "new", dtype=torch.float16)
    finally:
        bias.data = kept
    assert list(tmp_path.iterdir()) == []
    tiny.save_pretrained(tmp_path / "new", dtype=torch.float16)
    before = (tmp_path / "new" / "unet" / "config.json").stat().st_mtime_ns
    tiny.save_pretrained(tmp_path / "new")  # over the old one
    assert (tmp_path / "new" / "unet" / "config.json").stat().st_mtime_ns > before
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert StableDiffusion.from_pretrained(tmp_path / "new").name == "new"


def test_without_a_connection_the_message_says_what_to_do(monkeypatch, tmp_path):
    def snapshot_download(repository, *, allow_patterns):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder or file 'someone/a-model' here.*no route to host.*"
                                                "downloaded elsewhere"):
        StableDiffusion.from_pretrained("someone/a-model")


# The miniature that ships


@pytest.fixture(scope="module")
def emoji_painter():
    return StableDiffusion.from_pretrained("emoji")


def test_the_miniature_is_whole(emoji_painter):
    folder = locate("emoji")
    for part in ("unet", "vae", "clip"):
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


def test_a_negative_caption_needs_guidance(tiny):
    with pytest.raises(ValueError, match="negative works through guidance, which 1 turns off"):
        tiny("pizza", negative="blurry", guidance=1, steps=1, progress=False)


def test_a_folder_has_its_own_tokenizer(saved, tiny):
    with pytest.raises(ValueError, match="tokenizer is for a single file"):
        StableDiffusion.from_pretrained(saved, tokenizer=tiny.tokenizer)


def test_networks_that_do_not_go_together_are_refused(tiny):
    parts = {name: getattr(tiny, name) for name in ("vae", "text_encoder", "tokenizer", "schedule")}
    for channels in (5, 7, 8):
        with pytest.raises(ValueError, match=f"reads {channels} channels and the VAE writes 4: only 4, or 9"):
            StableDiffusion(unet=UNet(replace(tiny.unet.config, in_channels=channels)), **parts)


def test_a_device_that_is_not_there_changes_nothing(tiny):
    before = tiny(CAPTION, output="tensor", **FAST)
    with pytest.raises((RuntimeError, AssertionError)):
        tiny.to("cuda:99")
    assert torch.equal(tiny(CAPTION, output="tensor", **FAST), before)


def test_folders_of_other_kinds_say_which(saved):
    config = saved / "scheduler" / "scheduler_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"thresholding": True}))
    with pytest.raises(ValueError, match="wants thresholding, which is for pixels"):
        StableDiffusion.from_pretrained(saved)
    (saved / "text_encoder_2").mkdir()
    with pytest.raises(ValueError, match="two text encoders, as Stable Diffusion XL has"):
        StableDiffusion.from_pretrained(saved)


def test_a_function_as_sampler_is_named_in_the_metadata(tiny):
    (picture,) = tiny(CAPTION, sampler=dpmpp_2m, **FAST)
    assert picture.info["sampler"] == "dpmpp_2m" and (pixels([picture]) == pixels(tiny(CAPTION, **FAST))).all()
