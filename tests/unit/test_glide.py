"""Chapter 15: guidance on mixtures whose answers are known, and GLIDE with random weights."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from diffusionbook import dalle2, glide
from diffusionbook.checkpoints import to_guided_diffusion
from diffusionbook.clip import VisionConfig
from diffusionbook.denoising import Condition, Denoiser, classifier_free
from diffusionbook.glide import (
    Glide,
    GlideText,
    GlideTextConfig,
    NoisyImageConfig,
    NoisyImageEncoder,
    at_guess,
    classifier_guidance,
    clip_guidance,
    enlarge,
    fast27,
    from_openai_transformer,
    guidance_interval,
    keep_known,
    load_glide,
    respaced,
    to_openai_transformer,
)
from diffusionbook.samplers import levels, log_likelihood, sample, timesteps
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.scores import GaussianMixture
from diffusionbook.text import GPT2Tokenizer, byte_symbols, train_bpe
from diffusionbook.unet import PRESETS, UNet, UNetConfig

SCHEDULE = NoiseSchedule.cosine()

# A world where everything is known: four bells in the plane, two of each class


MEANS = torch.tensor([[-1.0, 0.5], [1.2, 1.0], [0.3, -1.0], [-0.5, -0.4]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
CLASS = torch.tensor([0, 1, 1, 0])
WORLD = GaussianMixture(MEANS, torch.tensor([0.05, 0.1, 0.2, 0.02]), WEIGHTS)
PART = [GaussianMixture(MEANS[CLASS == c], WORLD.covariances[CLASS == c], WEIGHTS[CLASS == c]) for c in (0, 1)]


def network(x, t, embedding=None):
    """The perfect denoiser of the whole world, or of the class that `embedding` names."""
    chosen = WORLD if embedding is None or embedding[0, 0] < 0 else PART[int(embedding[0, 0])]
    return chosen.x0(x, SCHEDULE.alpha(t), SCHEDULE.sigma(t))


def belongs(x, t, wanted=1):
    """log p(class | x_t), (B,)."""
    return WORLD.posterior(x, SCHEDULE.alpha(t), SCHEDULE.sigma(t))[:, CLASS == wanted].sum(1).log()


PLAIN = Denoiser(network, SCHEDULE, "x0")
POINTS = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("t", [20, 400, torch.tensor([5.0, 100, 200, 300, 500, 700, 900])])
@pytest.mark.parametrize("wanted", [0, 1])
def test_a_perfect_classifier_turns_the_score_into_that_of_the_class(t, wanted):
    guided = classifier_guidance(PLAIN, lambda x, t: belongs(x, t, wanted))
    answer = guided(POINTS, t)
    alpha, sigma = (level.double() for level in SCHEDULE.levels(t))
    column = sigma.reshape(-1, 1)
    torch.testing.assert_close(-answer.eps / column, PART[wanted].score(POINTS, alpha, sigma), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer.x0, PART[wanted].x0(POINTS, alpha, sigma), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alpha.reshape(-1, 1) * answer.x0 + column * answer.eps, POINTS)


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0])
def test_the_guided_score_is_that_of_density_times_a_power_of_the_classifier(scale):
    alpha, sigma = SCHEDULE.levels(300)
    x = POINTS.clone().requires_grad_()
    (WORLD.log_prob(x, alpha, sigma) + scale * belongs(x, torch.full((7,), 300.0))).sum().backward()
    answer = classifier_guidance(PLAIN, belongs, scale=scale)(POINTS, 300)
    torch.testing.assert_close(-answer.eps / sigma, x.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
def test_classifier_free_is_the_same_with_the_classifier_that_the_two_networks_imply(scale):
    one, none = (Condition(embedding=torch.full((7, 1), value)) for value in (1.0, -1.0))

    def either(x, t, embedding):
        halves = zip(x.split(7), t.split(7), embedding.split(7), strict=True)
        return torch.cat([network(*half) for half in halves])

    free = classifier_free(Denoiser(either, SCHEDULE, "x0", one), none, scale=scale)
    for t in (50, 500):
        found = classifier_guidance(PLAIN, belongs, scale=scale)(POINTS, t)
        torch.testing.assert_close(free(POINTS, t).x0, found.x0, rtol=1e-4, atol=1e-5)


def test_samples_land_in_the_class():
    guided = classifier_guidance(PLAIN, belongs)
    x = sample(guided, (400, 2), steps=50, dtype=torch.float64, progress=False)
    painted, real = WORLD.posterior(x).mean(0), WORLD.posterior(PART[1].sample(4000)).mean(0)
    assert painted[CLASS == 1].sum() > 0.97
    torch.testing.assert_close(painted, real, rtol=0, atol=0.05)


def test_the_likelihood_of_a_guided_flow_is_that_of_the_class():
    guided = classifier_guidance(replace(PLAIN, grad=True), belongs)
    times = timesteps(SCHEDULE, 200, spacing="exponential")
    here = levels(SCHEDULE, times[-2:-1])[0]
    x = here.alpha * PART[1].sample(5, seed=1)
    found = log_likelihood(guided, x, times, probes=None)
    torch.testing.assert_close(found, PART[1].log_prob(x, here.alpha, here.sigma), rtol=0, atol=0.03)


def test_without_signal_nothing_is_pushed():
    denoise = Denoiser(lambda x, t: torch.ones_like(x), SCHEDULE.zero_terminal_snr(), "v")
    answer = classifier_guidance(denoise, lambda x, t: x.sum(1), scale=5.0)(POINTS, 999)
    assert torch.equal(answer.x0, denoise(POINTS, 999).x0) and answer.x0.isfinite().all()


def test_scale_zero_asks_no_classifier_and_gradients_stay_inside():
    assert classifier_guidance(PLAIN, belongs, scale=0) is PLAIN
    with torch.no_grad():
        answer = classifier_guidance(PLAIN, belongs)(POINTS, 10)
    assert not answer.x0.requires_grad and not POINTS.requires_grad


@pytest.mark.parametrize("log_prob, message", [
    (lambda x, t: x, r"shape \(7,\); got \(7, 2\)"),
    (lambda x, t: x.sum(1).detach(), "without a derivative"),
])
def test_unfit_classifiers_are_refused(log_prob, message):
    with pytest.raises(ValueError, match=message):
        classifier_guidance(PLAIN, log_prob)(POINTS, 10)
    with pytest.raises(ValueError, match="finite"):
        classifier_guidance(PLAIN, belongs, scale=float("nan"))


def noisy_tower():
    torch.manual_seed(0)
    vision = VisionConfig(image_size=8, patch=4, width=16, layers=1, heads=2)
    return NoisyImageEncoder(NoisyImageConfig(vision, projection=6)).eval()


def test_a_tower_that_knows_noise_is_clips_when_its_time_is_taken_away(tmp_path):
    tower, x = noisy_tower(), torch.rand(3, 3, 8, 8) * 2 - 1
    plain = tower.visual_projection(tower.vision_model.pooled(tower.vision_model(x)))
    early, late = (tower(x, torch.full((3,), t)) for t in (0, 900))
    assert (early - late).abs().max() > 1e-3
    tower.save_pretrained(tmp_path / "eye")
    assert torch.equal(NoisyImageEncoder.from_pretrained(tmp_path / "eye")(x, torch.full((3,), 900)), late)
    torch.nn.init.zeros_(tower.time_embedding.linear_2.weight)
    torch.nn.init.zeros_(tower.time_embedding.linear_2.bias)
    torch.testing.assert_close(tower(x, torch.full((3,), 900)), plain)


def test_a_tower_that_knows_noise_refuses_what_it_cannot_read():
    for x, t in ((torch.zeros(2, 3, 16, 16), torch.zeros(2)), (torch.zeros(2, 1, 8, 8), torch.zeros(2)),
                 (torch.zeros(2, 3, 8, 8), torch.zeros(3))):
        with pytest.raises(ValueError, match="reads pictures .B, 3, 8, 8. at times"):
            noisy_tower()(x, t)
    with pytest.raises(ValueError, match="there is emoji"):
        NoisyImageConfig.preset("large")


def test_clip_guidance_climbs_the_cosine():
    wanted = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    guided = clip_guidance(PLAIN, lambda x, t: x, wanted, scale=2.0)
    t = 200
    x = POINTS.clone().requires_grad_()
    F.cosine_similarity(x, wanted).sum().backward()
    sigma = SCHEDULE.sigma(t)
    torch.testing.assert_close(PLAIN(POINTS, t).eps - guided(POINTS, t).eps, 2.0 * sigma * x.grad)
    # the length of the caption's embedding doesn't matter
    longer = clip_guidance(PLAIN, lambda x, t: x, 10 * wanted, scale=2.0)
    torch.testing.assert_close(longer(POINTS, t).eps, guided(POINTS, t).eps)


def test_at_guess_differentiates_through_the_network():
    """For one Gaussian x0 is linear in x: the slope of a function of it follows from the chain rule."""
    one = GaussianMixture(torch.zeros(1, 2, dtype=torch.float64), 0.5)
    denoise = Denoiser(lambda x, t: one.x0(x, SCHEDULE.alpha(t), SCHEDULE.sigma(t)), SCHEDULE, "x0")
    alpha, sigma = SCHEDULE.levels(300)
    gain = alpha * 0.5 / (alpha**2 * 0.5 + sigma**2)
    guided = classifier_guidance(denoise, at_guess(denoise, lambda x0: -x0.square().sum(1) / 2))
    torch.testing.assert_close(denoise(POINTS, 300).eps - guided(POINTS, 300).eps, -sigma * gain**2 * POINTS)
    with pytest.raises(ValueError, match="the Denoiser itself"):
        at_guess(guided, lambda x0: x0)


def test_guidance_only_in_an_interval():
    guided = classifier_guidance(PLAIN, belongs, scale=4.0)
    some = guidance_interval(guided, PLAIN, low=100, high=500)
    for t, expected in ((99, PLAIN), (100, guided), (500.0, guided), (501, PLAIN), (torch.full((7,), 300), guided)):
        assert torch.equal(some(POINTS, t).x0, expected(POINTS, t).x0)
    assert not torch.equal(PLAIN(POINTS, 300).x0, guided(POINTS, 300).x0)
    with pytest.raises(ValueError, match="one time for the whole batch"):
        some(POINTS, torch.arange(7) * 100)
    with pytest.raises(ValueError, match="low ≤ high"):
        guidance_interval(guided, PLAIN, low=2, high=1)


# Times and small pictures


def test_respaced_times_are_those_of_the_paper():
    assert respaced(NoiseSchedule.linear(300), [10, 15, 20])[:-1] == sorted(
        {*(round(k * 99 / 9) for k in range(10)), *(100 + round(k * 99 / 14) for k in range(15)),
         *(200 + round(k * 99 / 19) for k in range(20))}, reverse=True)
    times = fast27(NoiseSchedule.linear())
    assert len(times) == 28 and times[0] == 997 and 999 not in times and times[-1] is None
    assert times[1:4] == [800, 799, 600] and times[-4:-1] == [44, 22, 0]
    assert respaced(NoiseSchedule.linear(10), [1]) == [0, None]
    with pytest.raises(ValueError, match="1…5 times, got 6"):
        respaced(NoiseSchedule.linear(10), [6, 1])


def test_small_pictures_are_rounded_and_enlarged():
    small = torch.rand(2, 3, 4, 4) * 2 - 1
    same = enlarge(small, (4, 4))
    steps = (same + 1) * 127.5
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert (same - small).abs().max() <= 1.01 / 255
    assert enlarge(small, (16, 8)).shape == (2, 3, 16, 8)
    assert torch.equal(enlarge(torch.full((1, 3, 4, 4), 3.0), (8, 8)), torch.ones(1, 3, 8, 8))


# The text transformer


TEXT = GlideTextConfig(vocab_size=540, context_length=12, width=16, layers=2, heads=2, time_width=64, end_id=539)
WORDS = ["red heart, noto style", "pizza, twemoji style", "grinning face, 3d style"]


class Words:
    """A tokenizer like GPT-2's: no beginning, filled up with the end token; too long a text is an error."""

    def __call__(self, texts, *, truncate=True):
        bpe, rows = train_bpe(WORDS, 540, context_length=40), []
        for row in bpe(texts).tolist():
            ids = row[1:row.index(539)]
            if len(ids) > 12 and not truncate:
                raise ValueError(f"a text has {len(ids)} tokens, at most 12 fit")
            rows.append(ids + [539] * (12 - len(ids)))
        return torch.tensor(rows)


def random_weights(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def tiny_text():
    torch.manual_seed(0)
    text = random_weights(GlideText(TEXT))
    text.tokenizer = Words()
    return text


def test_what_stands_in_empty_places_does_not_matter():
    text, ids = tiny_text(), torch.randint(0, 539, (2, 12))
    mask = torch.arange(12) < torch.tensor([[3], [12]])
    other = torch.where(mask, ids, 7)
    for found, again in zip(text(ids, mask).parts().values(), text(other, mask).parts().values(), strict=True):
        assert torch.equal(found, again)
    assert not torch.allclose(text(ids, mask).context, text(ids).context)
    short = text(ids[:1, :3])  # filled up, and masked, by itself
    torch.testing.assert_close(short.context, text(ids, mask).context[:1])
    assert short.context.shape == (1, 12, 16) and short.embedding.shape == (1, 64)


def test_every_token_sees_later_ones():
    text, ids = tiny_text(), torch.randint(0, 539, (1, 12))
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 539
    assert not torch.allclose(text(ids).context[0, 0], text(changed).context[0, 0])


def test_the_public_layout_there_and_back():
    state = tiny_text().state_dict()
    public = to_openai_transformer(state, heads=2)
    assert public["transformer.resblocks.1.attn.c_qkv.weight"].shape == (48, 16)
    rows = public["transformer.resblocks.0.attn.c_qkv.weight"].view(2, 3, 8, 16)  # head, then q, k, v
    assert torch.equal(rows[1, 2], state["blocks.0.self_attn.v_proj.weight"][8:])
    back = from_openai_transformer(public, heads=2)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("ids, message", [
    (torch.zeros(1, 13, dtype=torch.int64), "1 ≤ L ≤ 12"),
    (torch.zeros(1, 3), "int64"),
    (torch.zeros(0, 3, dtype=torch.int64), "B ≥ 1"),
    (torch.full((1, 3), 540), r"\[0, 539\], got \[540, 540\]"),
])
def test_unfit_ids_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        tiny_text()(ids)
    with pytest.raises(ValueError, match="the mask must be boolean"):
        tiny_text()(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3))


def test_captions_are_read_by_gpt2s_tokenizer_in_lower_case():
    torch.manual_seed(0)
    text = GlideText(replace(GlideTextConfig(), width=16, layers=1, heads=2)).eval()
    told = text.condition(["A red heart", "a red heart", ""])
    assert told.context.shape == (3, 128, 16) and told.embedding.shape == (3, 768)
    assert torch.equal(told.context[0], told.context[1]) and not torch.allclose(told.context[0], told.context[2])
    with pytest.raises(ValueError, match="room for 128"):
        text.condition(["heart " * 200])


# The pipeline


GUIDED = {"attention": (None, "added"), "heads": (2, 2), "channels": (16, 24), "groups": 8, "layers_per_block": 1,
          "context_width": 16, "scale_shift": True, "residual_resampling": True, "out_channels": 6}
KINDS = {name: GUIDED | {"in_channels": channels, "sample_size": side} for name, channels, side in (
    ("glide", 3, 8), ("glide-inpaint", 7, 8), ("glide-upsampler", 6, 16), ("glide-upsampler-inpaint", 10, 16))}
FAST = {"steps": 3, "upsampler_steps": 2, "progress": False, "output": "tensor"}


def tiny(inpaint=False, upsampler=True):
    kinds = [kind + "-inpaint" * inpaint for kind in ("glide", "glide-upsampler")]
    nets = [random_weights(UNet(UNetConfig(**KINDS[kind]))) for kind in kinds]
    base, larger = Denoiser(nets[0], NoiseSchedule.cosine()), Denoiser(nets[1], NoiseSchedule.linear())
    return Glide(base=base, conditioner=tiny_text(), upsampler=larger if upsampler else None,
                 upsampler_conditioner=tiny_text() if upsampler else None)


@pytest.fixture(scope="module")
def pipe():
    return tiny()


def test_a_caption_becomes_a_picture(pipe):
    images = pipe("red heart", n=2, **FAST)
    assert images.shape == (2, 3, 16, 16) and images.abs().max() <= 1 and images.std() > 0.1
    pictures = pipe(["red heart", "pizza"], **FAST | {"output": "pil"})
    assert [picture.size for picture in pictures] == [(16, 16)] * 2
    assert pipe("pizza", **FAST | {"upsampler_steps": None}).shape == (1, 3, 16, 16)  # fast27
    assert tiny(upsampler=False)("pizza", **FAST).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_each_picture_is_the_one_that_its_seed_paints_alone(pipe, sampler):
    batch = pipe(["red heart", "pizza"], n=2, seed=7, sampler=sampler, **FAST)
    alone = torch.cat([pipe(caption, seed=7 + i, sampler=sampler, **FAST)
                       for i, caption in enumerate(["red heart", "red heart", "pizza", "pizza"])])
    torch.testing.assert_close(batch, alone, rtol=0, atol=1e-3)
    assert (batch[0] - batch[1]).abs().mean() > 0.01


def test_words_and_guidance_are_heard(pipe):
    paint = lambda caption, **options: pipe(caption, **FAST, **options)  # noqa: E731
    assert not torch.equal(paint("red heart"), paint("pizza"))
    assert not torch.equal(paint("pizza", guidance=1), paint("pizza", guidance=8))
    assert not torch.equal(paint("pizza"), paint("pizza", negative="red heart"))
    assert torch.equal(paint("pizza", negative="pizza"), paint("pizza", negative="pizza", guidance=8))


def test_a_call_is_base_then_upsampler(pipe):
    """The same picture from its parts."""
    condition = [pipe.conditioner.condition([words]) for words in ("pizza", "")]
    denoise = classifier_free(replace(pipe.base, condition=condition[0]), condition[1], scale=3.0)
    small = sample(glide.dynamic_threshold(denoise, limit=1), (1, 3, 8, 8), steps=3, seed=5, progress=False)
    told = replace(pipe.upsampler_conditioner.condition(["pizza"]), concat=enlarge(small.clamp(-1, 1), (16, 16)))
    noise = 0.997 * glide.starting_noise((1, 3, 16, 16), seed=5 + 2**31)
    large = sample(glide.dynamic_threshold(replace(pipe.upsampler, condition=told), limit=1), (1, 3, 16, 16),
                   sampler="ddim", steps=2, latents=noise, progress=False)
    torch.testing.assert_close(pipe("pizza", seed=5, **FAST), large.clamp(-1, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_inpainting_keeps_what_is_known(trained):
    pipe, image = tiny(inpaint=trained), torch.rand(1, 3, 16, 16) * 2 - 1
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:, 8:] = True
    painted = pipe.inpaint(image, mask, "pizza", n=2, **FAST)
    torch.testing.assert_close(painted[..., :8], image[..., :8].expand(2, -1, -1, -1), rtol=0, atol=1e-4)
    assert (painted[0, ..., 8:] - painted[1, ..., 8:]).abs().mean() > 0.01
    assert (painted[..., 8:] - image[..., 8:]).abs().mean() > 0.05
    other = pipe.inpaint(-image, mask, "pizza", n=2, **FAST)  # what is known changes what is painted
    assert (painted[..., 8:] - other[..., 8:]).abs().mean() > 1e-3
    picture = Image.new("RGB", (16, 16), "white")
    kept = pipe.inpaint([picture], mask[None, None], "pizza", **FAST | {"output": "pil"})[0]
    assert kept.getpixel((0, 0)) == (255,) * 3


def test_a_trained_network_sees_masked_picture_and_mask_in_glides_order():
    seen = []
    pipe, image = tiny(inpaint=True), torch.rand(1, 3, 16, 16) * 2 - 1
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[2:4, 2:4] = True
    for denoise in (pipe.base, pipe.upsampler):
        denoise.network.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    pipe.inpaint(image, mask, "pizza", **FAST)
    small, large = seen[0], seen[-1]
    assert small.shape[1] == 7 and large.shape[1] == 10
    assert torch.equal(large[0, 3:6], image[0] * ~mask) and torch.equal(large[0, 6], (~mask).float())
    assert torch.equal(small[0, 6], F.avg_pool2d((~mask)[None].float(), 2)[0])  # the hole covers whole small pixels
    pipe("pizza", **FAST)  # nothing known: zeros
    assert not seen[-1][0, 3:7].any()


def test_known_pixels_need_a_mask_of_their_size():
    image = torch.zeros(1, 3, 8, 8)
    for mask in (torch.ones(1, 1, 8, 4, dtype=torch.bool), torch.ones(1, 1, 8, 8), torch.ones(8, 8, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"boolean of shape \(B, 1, 8, 8\)"):
            keep_known(PLAIN, image, mask)


@pytest.mark.parametrize("wish, message", [
    ({"prompt": 3}, "string or a list"),
    ({"prompt": []}, "string or a list"),
    ({"n": 0}, "n must be at least 1"),
    ({"output": "numpy"}, "output"),
    ({"prompt": "grinning face " * 9}, "at most 12 fit"),
    ({"guidance": float("inf")}, "finite"),
    ({"sampler": "eluer"}, "no sampler named"),
    ({"upsampler_steps": 0}, "1…1000"),
    ({"warmth": 1}, "has an option warmth"),
])
def test_impossible_wishes_are_refused(pipe, wish, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "pizza", **FAST, **wish})


@pytest.mark.parametrize("image, mask, message", [
    (torch.zeros(1, 3, 16, 16), torch.ones(8, 8, dtype=torch.bool), r"size of the picture, \(16, 16\), got"),
    (torch.zeros(1, 3, 16, 16), torch.full((16, 16), 255.0), r"\[0, 1\] without NaN"),
    (torch.zeros(1, 3, 8, 8), torch.ones(8, 8, dtype=torch.bool), "16×16 pixels.*from_pil"),
    (torch.full((1, 3, 16, 16), 255.0), torch.ones(16, 16, dtype=torch.bool), r"\[-1, 1\].*127.5"),
])
def test_unfit_pictures_and_masks_are_refused(pipe, image, mask, message):
    with pytest.raises(ValueError, match=message):
        pipe.inpaint(image, mask, "pizza", **FAST)


@pytest.mark.parametrize("mask, message", [
    (torch.ones(2, 1, 16, 16, dtype=torch.bool), "one mask serves all captions, got 2"),
    (Image.new("L", (16, 16)), "nothing in this mask is white"),
])
def test_a_mask_is_one_that_shows_something(pipe, mask, message):
    with pytest.raises(ValueError, match=message):
        pipe.inpaint(torch.zeros(1, 3, 16, 16), mask, "pizza", **FAST)


def test_a_mask_may_be_drawn(pipe):
    drawn = Image.new("L", (16, 16), 0)
    drawn.paste(255, (8, 0, 16, 16))
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(pipe.inpaint(image, drawn, "pizza", **FAST),
                       pipe.inpaint(image, (torch.arange(16) >= 8).expand(16, 16), "pizza", **FAST))


def test_impossible_steps_of_the_upsampler_are_refused_before_the_base_works():
    pipe = tiny()
    pipe.base.network.register_forward_pre_hook(lambda *_: pytest.fail("the base was asked"))
    with pytest.raises(ValueError, match="1…1000"):
        pipe("pizza", **FAST | {"upsampler_steps": 1001})


def test_networks_in_the_wrong_place_are_refused(pipe):
    with pytest.raises(ValueError, match="the base must see 3 channels"):
        Glide(base=pipe.upsampler, conditioner=None)
    with pytest.raises(ValueError, match="the upsampler must see 6"):
        Glide(base=pipe.base, conditioner=None, upsampler=pipe.base)
    with pytest.raises(ValueError, match="reads words"):
        Glide(base=pipe.base, conditioner=None, upsampler=pipe.upsampler)


# To disk and back


def test_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = Glide.from_pretrained(tmp_path)
    again.conditioner.tokenizer = again.upsampler_conditioner.tokenizer = Words()
    torch.testing.assert_close(again("pizza", **FAST), pipe("pizza", **FAST), rtol=0, atol=1e-3)
    assert again.upsampler.schedule.to_config() == pipe.upsampler.schedule.to_config()
    with pytest.raises(FileNotFoundError, match="holds no GLIDE"):
        Glide.from_pretrained(tmp_path / "base")
    half = Glide.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.conditioner.tokenizer = half.upsampler_conditioner.tokenizer = Words()
    parts = (half.base.network, half.upsampler.network, half.conditioner, half.upsampler_conditioner)
    assert {part.dtype for part in parts} == {torch.bfloat16} and half("pizza", **FAST).dtype == torch.float32


def test_a_tokenizer_is_saved_with_the_text_model(tmp_path):
    pipe = tiny(upsampler=False)
    pipe.conditioner.tokenizer = train_bpe(WORDS, 540, context_length=12)
    pipe.save_pretrained(tmp_path)
    again = Glide.from_pretrained(tmp_path)
    torch.testing.assert_close(again("red heart", **FAST), pipe("red heart", **FAST), rtol=0, atol=1e-3)


def test_the_miniature_is_a_dalle2_without_its_prior(pipe, tmp_path, monkeypatch):
    asked = []

    class Cascade:
        def without_prior(self):
            return pipe

    monkeypatch.setattr(dalle2.DallE2, "from_pretrained", lambda folder, **options: asked.append(folder) or Cascade())
    (tmp_path / "decoder").mkdir()
    assert Glide.from_pretrained(tmp_path) is pipe and asked == [tmp_path]


def test_an_index_that_names_foreign_code_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "glide.json").read_text())
    (tmp_path / "glide.json").write_text(json.dumps(index | {"conditioner": ["subprocess.Popen", "conditioner"]}))
    with pytest.raises(ValueError, match="not a part of diffusionbook"):
        Glide.from_pretrained(tmp_path)


@pytest.fixture
def small_presets(monkeypatch):
    """GLIDE's four networks, shrunk, under their own names."""
    for kind, values in KINDS.items():
        monkeypatch.setitem(PRESETS, kind, values)
    monkeypatch.setattr(glide, "GlideTextConfig", lambda: TEXT)


def public(denoise, text):
    unet = denoise.network
    return (to_guided_diffusion(unet.state_dict(), head_width=unet.config.head_width())
            | to_openai_transformer(text.state_dict(), heads=TEXT.heads))


@pytest.mark.parametrize("inpaint", [False, True])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_public_files_give_the_same_pipeline(tmp_path, small_presets, inpaint, suffix):
    pipe = tiny(inpaint=inpaint)
    stages = {"base": (pipe.base, pipe.conditioner), "upsample": (pipe.upsampler, pipe.upsampler_conditioner)}
    for name, parts in stages.items():
        path = tmp_path / f"{name}{'_inpaint' * inpaint}.{suffix}"
        state = {key: tensor.contiguous() for key, tensor in public(*parts).items()}
        torch.save(state, path) if suffix == "pt" else save_file(state, path)
    again = Glide.from_pretrained(tmp_path)
    again.conditioner.tokenizer = again.upsampler_conditioner.tokenizer = Words()
    assert again.upsampler.schedule.to_config()["beta_schedule"] == "linear"
    assert again.base.schedule.to_config()["beta_schedule"] == "squaredcos_cap_v2"
    torch.testing.assert_close(again("pizza", **FAST), pipe("pizza", **FAST), rtol=0, atol=1e-3)


def test_weights_of_another_model_are_refused(pipe, tmp_path, small_presets):
    state = public(pipe.base, pipe.conditioner)
    with pytest.raises(FileNotFoundError, match="base.pt is missing"):
        load_glide(tmp_path / "base.pt")
    torch.save(state, tmp_path / "base.pt")
    whole = (tmp_path / "base.pt").read_bytes()
    for content, message in ((b"not a zip", "not opened"), (whole[:-99], "damaged|not opened")):
        (tmp_path / "base.pt").write_bytes(content)
        with pytest.raises(ValueError, match=f"base.pt .*({message})"):
            load_glide(tmp_path / "base.pt")
    torch.save({"model": state}, tmp_path / "base.pt")
    with pytest.raises(ValueError, match="base.pt holds no tensors by name, but model"):
        load_glide(tmp_path / "base.pt")
    torch.save(pipe.base.network.state_dict(), tmp_path / "base.pt")
    with pytest.raises(ValueError, match="doesn't hold GLIDE's weights"):
        load_glide(tmp_path / "base.pt")
    torch.save({key: tensor for key, tensor in state.items() if "middle_block" not in key}, tmp_path / "base.pt")
    with pytest.raises(ValueError, match="missing"):
        load_glide(tmp_path / "base.pt")
    torch.save(state | {"token_embedding.weight": torch.zeros(99, 16)}, tmp_path / "base.pt")
    with pytest.raises(ValueError, match="token_embedding.weight has shape"):
        load_glide(tmp_path / "base.pt")


def test_a_negative_caption_needs_guidance():
    with pytest.raises(ValueError, match="negative works through guidance, which 1 turns off"):
        tiny().denoiser(["pizza"], negative="blurry", guidance=1)


def test_a_caption_is_one_row():
    text = tiny_text()
    assert torch.equal(text.condition("pizza").context, text.condition(["pizza"]).context)


def test_a_tokenizer_of_the_kind_of_gpt2_comes_back(tmp_path):
    text = tiny_text()
    symbols = [*byte_symbols().values(), "<|endoftext|>"]
    text.tokenizer = GPT2Tokenizer({symbol: i for i, symbol in enumerate(symbols)}, [], context_length=12)
    text.save_pretrained(tmp_path)
    again = GlideText.from_pretrained(tmp_path)
    assert isinstance(again.tokenizer, GPT2Tokenizer) and again.tokenizer.vocab == text.tokenizer.vocab
    assert torch.equal(again.condition(["pizza"]).context, text.condition(["pizza"]).context)
    text.tokenizer = None
    text.save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer").exists()
