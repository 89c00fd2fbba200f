"""Chapter 18: from a caption to a picture by way of an embedding, from a picture to others, and to disk and back."""

import copy
import dataclasses
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusionbook.clip import CLIP, CLIPConfig, VisionConfig
from diffusionbook.dalle2 import (
    DallE2,
    TextProjection,
    TextProjectionConfig,
    enlarged,
    last_step,
    roughened,
    slerp,
)
from diffusionbook.denoising import Condition, Denoiser
from diffusionbook.glide import Glide
from diffusionbook.prior import DiffusionPrior, PriorConfig
from diffusionbook.samplers import sample, starting_noise
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.text import TextConfig, train_bpe
from diffusionbook.unet import UNet, UNetConfig

COSINE = NoiseSchedule.cosine()
QUICK = {"steps": 3, "prior_steps": 3, "output": "tensor", "progress": False}


def randomise(network, amount=0.1):
    with torch.no_grad():
        for p in network.parameters():
            p.add_(amount * torch.randn_like(p))
    return network.eval()


@pytest.fixture(scope="module")
def tiny():
    """A whole system with random weights, one that can inpaint, whose CLIP sees pictures."""
    torch.manual_seed(0)
    tokenizer = train_bpe(["red heart", "pizza"], 520, context_length=10)
    text = TextConfig(vocab_size=520, context_length=10, width=12, layers=1, heads=2)
    vision = VisionConfig(image_size=16, patch=8, width=16, layers=1, heads=2)
    clip = randomise(CLIP(CLIPConfig(text, vision, 12)))
    clip.tokenizer = tokenizer
    prior = randomise(DiffusionPrior(PriorConfig(embedding=12, words=10, width=16, layers=1, heads=2)), 0.2)
    prior.clip_std.data.abs_()
    decoder = UNetConfig(channels=(16, 32), attention=("added", "added"), heads=(2, 4), layers_per_block=1, groups=8,
                         context_width=24, in_channels=7, out_channels=6, scale_shift=True, residual_resampling=True,
                         sample_size=8)
    upsampler = UNetConfig(channels=(16, 32), attention=(None, None), middle=None, heads=(1, 1), layers_per_block=1,
                           groups=8, context_width=None, in_channels=6, out_channels=3, residual_resampling=True,
                           sample_size=16)
    return DallE2(
        text_encoder=clip.text_tower(), tokenizer=tokenizer, clip=clip, prior=Denoiser(prior, COSINE, "x0"),
        text_projection=randomise(TextProjection(TextProjectionConfig(12, 64, 24)), 0.3),
        decoder=Denoiser(randomise(UNet(decoder)), COSINE, "v"), upsampler=Denoiser(randomise(UNet(upsampler)), COSINE))


def bilinear(system):
    """The same with an upsampler that learned as GLIDE's."""
    system = copy.copy(system)
    system.bilinear = True
    return system


def pictures(count, side=16, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# The parts


@torch.no_grad()
def test_the_projection_says_the_picture_twice_and_the_text_twice(tiny):
    told, image = tiny.read(["red heart", "pizza"]), torch.randn(2, 12)
    before, projection = tiny.text_projection(image, told), tiny.text_projection
    assert before.context.shape == (2, 14, 24) and before.embedding.shape == (2, 64) and before.mask.shape == (2, 14)
    other = projection(image + 1, told)
    assert (other.embedding - before.embedding).abs().max() > 0.1
    assert (other.context[:, :4] - before.context[:, :4]).abs().amax((1, 2)).min() > 0.1
    assert torch.equal(other.context[:, 4:], before.context[:, 4:])
    nothing, explicit = projection(None, told), projection(projection.nothing.expand(2, -1), told)
    assert all(torch.equal(nothing.parts()[name], explicit.parts()[name]) for name in nothing.parts())
    with pytest.raises(ValueError, match="shape"):
        projection(image[:1], told)


@pytest.mark.parametrize("name, count", [("karlo", 7_878_400), ("emoji", 284_672)])
def test_projection_presets(name, count):
    config = TextProjectionConfig.preset(name)
    assert TextProjectionConfig.from_config(config.to_config()) == config
    with torch.device("meta"):
        assert TextProjection(config).count_parameters() == count
    with pytest.raises(ValueError, match="karlo, emoji"):
        TextProjectionConfig.preset("glide")


def test_the_miniature_parts_belong_together():
    prior, projection, unet = (PriorConfig.preset("emoji"), TextProjectionConfig.preset("emoji"),
                               UNetConfig.preset("emoji-decoder"))
    clip = CLIPConfig.preset("emoji")
    assert prior.embedding == projection.embedding == clip.projection == clip.text.width
    assert prior.words == clip.text.context_length
    assert projection.time_width == 4 * unet.channels[0] and projection.context_width == unet.context_width
    assert UNetConfig.preset("emoji-upsampler").sample_size == 4 * unet.sample_size
    total = 0
    with torch.device("meta"):
        total += sum(UNet(UNetConfig.preset(name)).count_parameters() for name in ("emoji-decoder", "emoji-upsampler"))
    assert total < 11_000_000


def test_slerp():
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, b, 0.5), torch.full((1, 2), 3 / 2**0.5))
    torch.testing.assert_close(slerp(a, 2 * a, 0.25), 1.25 * a)
    x, y = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    weight = torch.linspace(0, 1, 5)
    middle = slerp(x, y, weight)
    torch.testing.assert_close(middle[0], x[0])
    torch.testing.assert_close(middle[4], y[4])
    lengths = torch.lerp(x.flatten(1).norm(dim=1), y.flatten(1).norm(dim=1), weight)
    torch.testing.assert_close(middle.flatten(1).norm(dim=1), lengths)
    torch.testing.assert_close(slerp(x, y, 0.3), slerp(y, x, 0.7))


def test_the_last_step_is_another_network():
    asked = []

    def network(name):
        return Denoiser(lambda x, t: asked.append((name, t[0].item())) or torch.zeros_like(x), COSINE, "x0")

    sample(last_step(network("first"), network("last"), at=0), (2, 3), steps=4, spacing="linspace", sampler="ddim",
           progress=False)
    assert asked == [("first", 999), ("first", 666), ("first", 333), ("last", 0)]
    with pytest.raises(ValueError, match="one time"):
        last_step(network("first"), network("last"), at=0)(torch.zeros(2, 3), torch.tensor([0, 5]))


def test_roughened_pictures():
    images, g = pictures(64, side=8), torch.Generator().manual_seed(1)
    assert torch.equal(roughened(images, torch.Generator(), blur=0, noise=0), images)
    flat = torch.full((3, 3, 8, 8), 0.3)
    torch.testing.assert_close(roughened(flat, g, noise=0), flat)
    blurred = roughened(images, g, noise=0)
    assert (blurred.std((1, 2, 3)) <= images.std((1, 2, 3)) + 1e-6).all() and (blurred - images).abs().mean() > 0.01
    grain = roughened(images, g, blur=0, noise=0.1) - images
    size = grain.std((1, 2, 3))
    assert size.max() < 0.12 and size.min() < 0.02 and abs(size.mean() - 0.05) < 0.015
    again = roughened(images, torch.Generator().manual_seed(1), noise=0)
    assert torch.equal(again, roughened(images, torch.Generator().manual_seed(1), noise=0))
    with pytest.raises(ValueError, match="negative"):
        roughened(images, g, blur=-1)


# From words to a picture


def test_a_picture_depends_on_its_caption_and_seed_alone(tiny):
    whole = tiny(["red heart", "pizza"], n=2, seed=20, **QUICK)
    assert whole.shape == (4, 3, 16, 16) and whole.abs().max() <= 1 and whole.std() > 0.1
    assert (tiny("pizza", seed=22, **QUICK) - whole[2:3]).abs().max() < 2 / 255
    assert (whole[0] - whole[1]).abs().mean() > 0.01
    assert (tiny("red heart", seed=22, **QUICK) - whole[2:3]).abs().mean() > 0.001


def test_seeds_of_all_sizes_and_no_others(tiny):
    """Each part has a seed of its own, far from the picture's; the largest must not run over."""
    last = tiny("pizza", seed=2**63 - 1, **QUICK)
    assert last.isfinite().all() and not torch.equal(last, tiny("pizza", seed=0, **QUICK))
    for seed in (-1, 2**63, 1.5, "a"):
        for paint in (partial(tiny, "pizza"), partial(tiny.variations, pictures(1)),
                      partial(tiny.interpolate, pictures(1), pictures(1))):
            with pytest.raises(ValueError, match=r"seed must lie in 0…2⁶³-1 and be a whole number, got"):
                paint(seed=seed)
    with pytest.raises(ValueError, match="must have shape|captions"):
        tiny.paint(torch.zeros(2, 12), "pizza")


def test_pil_pictures_and_other_samplers(tiny):
    painted = tiny("pizza", n=2, steps=3, prior_steps=3, sampler="dpmpp_2m", progress=False)
    assert [type(picture) for picture in painted] == [Image.Image] * 2 and painted[0].size == (16, 16)


def test_every_stage_matters(tiny):
    before = tiny("pizza", **QUICK)
    for change in ({"guidance": 1.0}, {"prior_guidance": 1.0}, {"seed": 1}, {"steps": 5}, {"prior_steps": 6}):
        assert (tiny("pizza", **QUICK | change) - before).abs().mean() > 1e-4, change


def test_negative_words_push_both_stages_away(tiny):
    before, without = tiny("pizza", **QUICK), tiny("pizza", negative="red heart", **QUICK)
    assert (without - before).abs().mean() > 1e-4
    embedding = tiny.imagine(["pizza"], steps=3)
    assert (tiny.imagine(["pizza"], negative="red heart", steps=3) - embedding).abs().mean() > 1e-4
    x, parts = torch.randn(1, 3, 8, 8), [tiny.denoiser(embedding, ["pizza"], negative="red heart", guidance=2),
                                         tiny.denoiser(embedding, ["pizza"], guidance=1),
                                         tiny.denoiser(None, ["red heart"], guidance=1)]
    guided, told, away = (part.denoise(x, 500).x0 for part in parts)  # before it is clamped
    assert torch.allclose(guided, away + 2 * (told - away), atol=1e-4)


def test_every_step_of_the_decoder_is_shown(tiny):
    seen = []
    tiny("pizza", **QUICK | {"steps": 4}, on_step=lambda i, x, answer: seen.append((i, tuple(x.shape))))
    assert seen == [(i, (1, 3, 8, 8)) for i in range(4)]


def test_without_the_prior(tiny):
    """The controls of the paper: the caption alone, and the text's embedding in place of a picture's."""
    captions = ["pizza", "red heart"]
    alone = tiny.paint(None, captions, steps=3)
    text = tiny.paint(tiny.read(captions).embedding, captions, steps=3)
    image = tiny.paint(tiny.imagine(captions, steps=3), captions, steps=3)
    assert alone.shape == text.shape == image.shape == (2, 3, 16, 16)
    assert all((a - b).abs().mean() > 0.001 for a, b in ((alone, text), (text, image), (alone, image)))


def test_without_the_prior_it_is_glide(tiny):
    """One cascade, two systems: the same decoder reads captions alone, and paints a hole that it is shown."""
    glide = bilinear(tiny).without_prior()
    told = glide.denoiser(["pizza"], guidance=1, concat=torch.zeros(1, 4, 8, 8))
    own = tiny.denoiser(None, ["pizza"], guidance=1)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(told(x, 500).x0.clamp(-1, 1), own(x, 500).x0)
    image, mask = pictures(1), torch.zeros(16, 16, dtype=torch.bool)
    mask[:, 8:] = True
    painted = glide.inpaint(image, mask, "pizza", steps=2, upsampler_steps=2, output="tensor", progress=False)
    assert torch.equal(painted[..., :8], image[..., :8]) and (painted - image)[..., 8:].abs().mean() > 0.1


def test_glide_has_no_finisher(tiny):
    parts = {name: getattr(tiny, name) for name in ("text_encoder", "tokenizer", "prior", "text_projection", "decoder")}
    whole = DallE2(**parts, upsampler=tiny.upsampler, finisher=tiny.upsampler.network)
    with pytest.raises(ValueError, match=r"no finisher and enlarges bilinearly; paint\(None, captions\)"):
        whole.without_prior()


def test_glide_without_parts_of_its_own_is_not_half_saved(tiny, tmp_path):
    with pytest.raises(ValueError, match="CaptionOnly, can't be saved by itself; save the pipeline"):
        bilinear(tiny).without_prior().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_stages_draw_different_noise(tiny):
    seen = {}
    tiny.paint(None, ["pizza"], steps=2, on_step=lambda i, x, answer: seen.setdefault(i, x))
    assert seen.keys() == {0, 1}
    noise = [starting_noise((1, 12), seed=seed) for seed in (0, 2**30, 2**31)]
    assert all((a - b).abs().mean() > 0.1 for a, b in zip(noise, noise[1:] + noise[:1], strict=True))


@pytest.mark.parametrize("wish, message", [
    ({"prompt": []}, "prompt"), ({"prompt": 3}, "prompt"), ({"prompt": "pizza", "n": 0}, "n must be"),
    ({"prompt": "pizza", "output": "jpg"}, "output"), ({"prompt": "pizza", "steps": 0}, "steps"),
    ({"prompt": "pizza", "sampler": "magic"}, "no sampler"), ({"prompt": "pizza", "candidates": 0}, "candidate"),
    ({"prompt": "pizza", "candidates": 5}, "at most 4"),
    ({"prompt": "pizza", "negative": "red", "guidance": 1.0}, "negative works through guidance"),
    ({"prompt": "pizza", "negative": "red", "prior_guidance": 1.0}, "negative works through guidance"),
    ({"prompt": "pizza", "guidance": float("nan")}, "finite")])
def test_impossible_wishes(tiny, wish, message):
    with pytest.raises(ValueError, match=message):
        tiny(**{"steps": 2, "prior_steps": 2, "progress": False} | wish)


@pytest.mark.parametrize("method, arguments, options, message", [
    ("paint", (None, ["pizza"]), {"output": "PIL"}, 'output "pil" or "tensor", got \'PIL\''),
    ("variations", (torch.zeros(3, 3, 16, 16),), {}, "got 3 pictures, 4 times"),
    ("variations", (torch.zeros(1, 3, 16, 16),), {"n": 0}, "got 1 pictures, 0 times"),
    ("interpolate", (torch.zeros(2, 3, 16, 16), Image.new("RGB", (16, 16))), {}, "got 2 pictures, 8 times"),
    ("interpolate", (Image.new("RGB", (16, 16)),) * 2, {"steps": 0}, "got 1 pictures, 0 times"),
    ("text_diff", ([Image.new("RGB", (16, 16))] * 2, "pizza", "red"), {}, "got 2 pictures, 8 times"),
    ("encode", (torch.zeros(1, 3, 16, 32),), {}, "must be square, got 16×32"),
    ("encode", (torch.zeros(1, 3, 16, 16, dtype=torch.uint8),), {}, "float tensor.*uint8"),
])
def test_what_would_be_misread_is_refused(tiny, method, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(tiny, method)(*arguments, **options)


def test_parts_that_do_not_belong_together(tiny):
    parts = {"text_encoder": tiny.text_encoder, "tokenizer": tiny.tokenizer, "prior": tiny.prior,
             "text_projection": tiny.text_projection, "decoder": tiny.decoder}
    small = DiffusionPrior(PriorConfig(embedding=8, words=10, width=16, layers=1, heads=2))
    others = {"prior": Denoiser(small, COSINE),
              "text_projection": TextProjection(TextProjectionConfig(12, 32, 24)),
              "text_encoder": tiny.clip.text_model}
    for name, part in others.items():
        with pytest.raises(ValueError, match="don't belong together"):
            DallE2(**parts | {name: part})


# From a picture to others


def test_a_picture_is_found_again_from_its_code(tiny):
    """With little contrast in the decoder's answers DDIM can be walked back; eta = 0 then repeats the small picture."""
    calm = dataclasses.replace(tiny.decoder, network=UNet(tiny.decoder.network.config).eval())  # says 0: v = 0
    pipe = DallE2(text_encoder=tiny.text_encoder, tokenizer=tiny.tokenizer, prior=tiny.prior, clip=tiny.clip,
                  text_projection=tiny.text_projection, decoder=calm)
    image = 0.8 * pictures(1, side=8)
    found = pipe.variations(image, n=2, eta=0.0, output="tensor")
    torch.testing.assert_close(found, image.expand(2, -1, -1, -1), rtol=1e-2, atol=1e-2)
    free = pipe.variations(image, n=2, eta=1.0, output="tensor")
    assert (free[0] - free[1]).abs().mean() > 0.01


def test_variations_interpolations_and_differences(tiny):
    a, b = pictures(2).split(1)
    options = {"decoder_steps": 3, "output": "tensor"}
    varied = tiny.variations(a, n=3, steps=3, seed=4, output="tensor")
    assert varied.shape == (3, 3, 16, 16) and (varied[0] - varied[1]).abs().mean() > 0.001
    between = tiny.interpolate(a, b, steps=4, **options)
    assert between.shape == (4, 3, 16, 16) and (between[0] - between[3]).abs().mean() > 0.01
    turned = tiny.text_diff(a, "pizza", "red heart", steps=3, **options)
    assert turned.shape == (3, 3, 16, 16) and (turned[0] - turned[2]).abs().mean() > 1e-4
    assert isinstance(tiny.text_diff(Image.new("RGB", (40, 30)), "pizza", "", steps=2, decoder_steps=2)[0], Image.Image)


def test_the_codes_on_the_way_begin_and_end_where_they_should(tiny, monkeypatch):
    """What is painted from; comparing pictures of random networks would compare how they magnify rounding."""
    a, b = pictures(2).split(1)
    codes = [tiny.encode(image, steps=3) for image in (a, b)]
    monkeypatch.setattr(tiny, "_from_code", lambda embedding, noise, **options: (embedding, noise))
    embedding, noise = tiny.interpolate(a, b, steps=4, decoder_steps=3)
    for i, (z, x) in ((0, codes[0]), (3, codes[1])):
        torch.testing.assert_close(embedding[i:i + 1], z, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(noise[i:i + 1], x, rtol=1e-3, atol=1e-3)
    _, shared = tiny.interpolate(a, b, steps=4, decoder_steps=3, seed=1)
    assert torch.equal(shared[0], shared[3])
    turned, noise = tiny.text_diff(a, "pizza", "red heart", steps=3, amount=1.0, decoder_steps=3)
    torch.testing.assert_close(turned[:1], codes[0][0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(turned.norm(dim=1), codes[0][0].norm().expand(3), rtol=1e-3, atol=1e-4)
    old, new = F.normalize(tiny.read(["pizza", "red heart"]).embedding, dim=1)
    assert F.cosine_similarity(turned[2], new - old, dim=0) > 0.999


def test_a_pipeline_that_sees_nothing_says_so(tiny):
    blind = DallE2(text_encoder=tiny.text_encoder, tokenizer=tiny.tokenizer, prior=tiny.prior,
                   text_projection=tiny.text_projection, decoder=tiny.decoder)
    with pytest.raises(ValueError, match="can't look at pictures"):
        blind.variations(pictures(1))
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        tiny.variations(100 * pictures(1))
    assert blind("pizza", **QUICK).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="no upsampler"):
        blind.enlarge(pictures(1, 8))


def test_enlarged_pictures_keep_their_colours():
    flat = torch.full((1, 3, 4, 4), 0.3)
    torch.testing.assert_close(enlarged(flat, 16), torch.full((1, 3, 16, 16), 0.3))


# To disk and back


def test_saved_and_loaded(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    again = DallE2.from_pretrained(tmp_path)
    assert again.decoder.prediction == "v" and again.finisher is None
    assert (again("pizza", **QUICK) - tiny("pizza", **QUICK)).abs().max() < 2 / 255
    with torch.no_grad():
        torch.testing.assert_close(again.clip.encode_image(pictures(2)), tiny.clip.encode_image(pictures(2)))
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "UnCLIPPipeline" and "super_res_last" not in index


def test_an_upsampler_that_learned_from_bilinear_pictures(tiny, tmp_path):
    parts = {name: getattr(tiny, name) for name in ("text_encoder", "tokenizer", "prior", "text_projection", "decoder")}
    other = DallE2(**parts, upsampler=tiny.upsampler, bilinear=True)
    assert (other.enlarge(pictures(1, 8), steps=2) - tiny.enlarge(pictures(1, 8), steps=2)).abs().mean() > 1e-4
    other.save_pretrained(tmp_path)
    again = DallE2.from_pretrained(tmp_path)
    assert again.bilinear and again.upsampler.prediction == "epsilon"
    assert (again.enlarge(pictures(1, 8), steps=2) - other.enlarge(pictures(1, 8), steps=2)).abs().max() < 2 / 255


@pytest.mark.parametrize("bilinear", [False, True])
def test_half_precision(tiny, tmp_path, bilinear):
    parts = {name: getattr(tiny, name) for name in ("text_encoder", "tokenizer", "prior", "text_projection", "decoder")}
    DallE2(**parts, upsampler=tiny.upsampler, bilinear=bilinear, clip=tiny.clip).save_pretrained(tmp_path)
    again = DallE2.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {network.dtype for network in again._networks()} == {torch.bfloat16}
    images = again("pizza", **QUICK | {"steps": 1, "prior_steps": 1, "candidates": 1})
    assert images.shape == (1, 3, 16, 16) and images.dtype == torch.float32 and images.isfinite().all()
    code = again.encode(pictures(1), steps=1)
    assert all(part.dtype == torch.bfloat16 and part.isfinite().all() for part in code)
    if not bilinear:
        return
    glide = Glide.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert glide.base.network.dtype == glide.upsampler.network.dtype == torch.bfloat16


def test_public_folders_keep_the_two_halves_of_clip_apart(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    (tmp_path / "clip").rename(tmp_path / "image_encoder")
    path = tmp_path / "image_encoder" / "model.safetensors"
    state = {key: tensor for key, tensor in load_file(path).items() if key.startswith("vis")}
    save_file(state, path)
    config = tiny.clip.config.vision.to_config() | {"architectures": ["CLIPVisionModelWithProjection"]}
    (tmp_path / "image_encoder" / "config.json").write_text(json.dumps(config))
    again = DallE2.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again.clip.encode_image(pictures(2)), tiny.clip.encode_image(pictures(2)))
    assert (again("pizza", **QUICK) - tiny("pizza", **QUICK)).abs().max() < 2 / 255


def test_what_is_missing_is_named(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="no CLIP"):
        DallE2.from_pretrained(tmp_path)
    tiny.save_pretrained(tmp_path)
    (tmp_path / "prior").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="lacks prior"):
        DallE2.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "prior-ckpt-step=1.ckpt").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="decoder-ckpt"):
        DallE2.from_pretrained(tmp_path)
    for name in ("decoder-ckpt-step=1.ckpt", "improved-sr-ckpt-step=1.ckpt", "ViT-L-14_stats.th"):
        (tmp_path / name).write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="ViT-L-14_stats.th is damaged"):
        DallE2.from_pretrained(tmp_path)


# Another device


def test_everything_runs_on_another_device(tiny):
    """On `meta` no tensor has values: a stray one from the CPU would raise."""
    meta = torch.device("meta")
    with meta:
        parts = [type(part)(part.config) for part in (tiny.clip, tiny.prior.network, tiny.text_projection,
                                                      tiny.decoder.network, tiny.upsampler.network)]
    clip, prior, projection, decoder, upsampler = parts
    pipe = DallE2(text_encoder=clip.text_tower(), tokenizer=tiny.tokenizer, prior=Denoiser(prior, COSINE, "x0"),
                  text_projection=projection, decoder=Denoiser(decoder, COSINE, "v"), clip=clip,
                  upsampler=Denoiser(upsampler, COSINE), finisher=upsampler)
    painted = pipe(["pizza", "red heart"], **QUICK)
    assert painted.device == meta and painted.shape == (2, 3, 16, 16)
    image = torch.empty(1, 3, 16, 16, device=meta)
    for made in (pipe.variations(image, n=2, steps=2, output="tensor"),
                 pipe.interpolate(image, image, steps=3, decoder_steps=2, output="tensor"),
                 pipe.text_diff(image, "pizza", "red heart", steps=2, decoder_steps=2, output="tensor")):
        assert made.device == meta
    assert isinstance(tiny._told(None, ["pizza"]), Condition)


def test_without_its_prior_it_still_moves(tiny):
    glide = bilinear(copy.deepcopy(tiny)).without_prior().to("meta")
    told = glide.conditioner.condition(["red heart"])
    assert told.context.is_meta and glide.base.network.device.type == glide.upsampler.network.device.type == "meta"


def test_what_an_older_system_left_in_a_folder_goes(tiny, tmp_path):
    parts = {name: getattr(tiny, name) for name in ("text_encoder", "tokenizer", "prior", "text_projection", "decoder")}
    DallE2(**parts, upsampler=tiny.upsampler, bilinear=True, clip=tiny.clip).save_pretrained(tmp_path)
    DallE2(**parts, upsampler=tiny.upsampler).save_pretrained(tmp_path)
    again = DallE2.from_pretrained(tmp_path)
    assert again.clip is None and not again.bilinear
    assert not (tmp_path / "clip").exists() and not (tmp_path / "upsampler").exists()


def test_equal_texts_have_no_difference(tiny):
    with pytest.raises(ValueError, match="must differ, got 'pizza' and 'pizza'"):
        tiny.text_diff(pictures(1), "pizza", "pizza", steps=2)


def test_the_priors_prediction_is_obeyed_and_saved(tiny, tmp_path):
    other = copy.copy(tiny)
    other.prior = dataclasses.replace(tiny.prior, prediction="v")
    ours, theirs = (system.imagine(["pizza"], steps=3) for system in (tiny, other))
    assert (ours - theirs).abs().max() > 0.01
    other.save_pretrained(tmp_path / "v")
    assert torch.allclose(DallE2.from_pretrained(tmp_path / "v").imagine(["pizza"], steps=3), theirs, atol=1e-5)


def test_a_text_encoder_of_its_own_comes_back(tiny, tmp_path):
    other = copy.copy(tiny)
    other.text_encoder = randomise(copy.deepcopy(tiny.text_encoder), 0.5)
    other.save_pretrained(tmp_path / "own")
    again = DallE2.from_pretrained(tmp_path / "own")
    told, before = (system.read(["pizza"]).embedding for system in (again, other))
    assert torch.allclose(told, before, atol=1e-5) and (before - tiny.read(["pizza"]).embedding).abs().max() > 0.01


def test_a_scheduler_that_clips_nothing(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "prior_scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample": False}))
    assert DallE2.from_pretrained(tmp_path / "model").limit == torch.inf


def test_texts_that_are_read_alike_have_no_difference(tiny):
    with pytest.raises(ValueError, match="read alike"):
        tiny.text_diff(pictures(1), "red heart", "Red  HEART", steps=2, decoder_steps=2)


def test_what_glide_cannot_enlarge_stays_with_dalle2(tiny):
    assert not tiny.bilinear
    with pytest.raises(ValueError, match="enlarges bilinearly"):
        tiny.without_prior()
    parts = {name: getattr(tiny, name) for name in ("text_encoder", "tokenizer", "prior", "text_projection", "decoder",
                                                    "upsampler")}
    with pytest.raises(ValueError, match="a finisher belongs to an upsampler like Karlo's"):
        DallE2(**parts, bilinear=True, finisher=tiny.upsampler.network)


def test_roughness_does_not_depend_on_the_default_dtype():
    images = pictures(2)
    usual = roughened(images, torch.Generator().manual_seed(0), blur=1.0, noise=0.1)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(roughened(images, torch.Generator().manual_seed(0), blur=1.0, noise=0.1), usual)
    finally:
        torch.set_default_dtype(torch.float32)
