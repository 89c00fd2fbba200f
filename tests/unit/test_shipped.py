"""Chapters 15, 16, 18 and 20: the miniatures that ship paint what they are asked for."""

import pytest
import torch

from diffusionbook.checkpoints import locate
from diffusionbook.clip import CLIP
from diffusionbook.dalle import DallE
from diffusionbook.dalle2 import DallE2
from diffusionbook.data import STYLES, emoji
from diffusionbook.glide import Glide, NoisyImageEncoder
from diffusionbook.stable_diffusion import StableDiffusion

QUICK = {DallE: {"top_p": 0.9}, DallE2: {"steps": 8, "prior_steps": 8},
         Glide: {"steps": 8, "upsampler_steps": 4}}
QUIET = {"output": "tensor", "progress": False}


@pytest.fixture(scope="module", params=list(QUICK))
def paint(request):
    pipe = request.param.from_pretrained("emoji")
    return lambda captions, **options: pipe(captions, **QUICK[request.param], **QUIET, **options)


def test_hearts_have_their_colours_and_lie_on_white(paint):
    red, blue = paint(["red heart", "blue heart"], n=3).unflatten(0, (2, 3))  # (3, 3, 64, 64) each
    for hearts, colour in ((red, 0), (blue, 2)):
        middle = hearts[..., 24:40, 24:40].mean((0, 2, 3))
        assert middle.argmax() == colour and middle[colour] - middle[2 - colour] > 0.7
        assert hearts[..., -6:, :6].mean() > 0.8


def test_skin_has_the_tone_of_the_caption(paint):
    dark, light = (paint(f"raised hand, {tone} skin tone", n=3)[..., 28:44, 24:40].mean() for tone in ("dark", "light"))
    assert light - dark > 0.5


def test_a_picture_does_not_depend_on_its_neighbours(paint):
    together, alone = paint(["red heart", "pizza"], seed=3), paint("pizza", seed=4)
    torch.testing.assert_close(together[1], alone[0], atol=4 / 255, rtol=0)  # 2/255 of a picture's own range


def test_the_hole_is_filled_and_the_rest_kept():
    data = emoji("train")
    heart, hole = data.images([data.find("red heart, noto style")]), torch.zeros(64, 64, dtype=torch.bool)
    hole[:, 32:] = True
    filled = Glide.from_pretrained("emoji").inpaint(heart, hole, "red heart", **QUICK[Glide], **QUIET)
    torch.testing.assert_close(filled[..., :32], heart[..., :32], atol=1e-5, rtol=0)
    assert filled[0, 0, 24:40, 34:44].mean() - filled[0, 2, 24:40, 34:44].mean() > 0.7, "the right half isn't red"


def test_variations_keep_what_the_picture_shows():
    data = emoji("train")
    hearts = [data.images([data.find(f"{colour} heart, noto style")]) for colour in ("red", "blue")]
    pipe = DallE2.from_pretrained("emoji")
    red, blue = (pipe.variations(heart, n=2, steps=8, output="tensor")[..., 24:40, 24:40].mean((0, 2, 3))
                 for heart in hearts)
    assert red[0] - red[2] > 0.7 and blue[2] - blue[0] > 0.7


@torch.no_grad()
def test_the_tower_that_knows_noise_reads_it():
    """At t = 500 the card has 59 % of the pictures with their own caption among the five nearest; chance is 2 %."""
    eye, clip = NoisyImageEncoder.from_pretrained("emoji"), CLIP.from_pretrained("emoji")
    small, t = emoji("validation", size=16).images(), torch.full((282,), 500)
    x = Glide.from_pretrained("emoji").base.schedule.add_noise(
        small, torch.randn(small.shape, generator=torch.Generator().manual_seed(0)), t)
    near = torch.nn.functional.normalize(eye(x, t), dim=1) @ torch.nn.functional.normalize(
        clip.embed_texts(emoji("validation").captions), dim=1).T
    assert (near.topk(5, dim=1).indices == torch.arange(282)[:, None]).any(1).float().mean() > 0.5


def test_the_lora_jumps():
    """One call with it is nearer to what twenty steps paint from the same noise than one step without it."""
    painter = StableDiffusion.from_pretrained("emoji")
    asked = [f"{name}, {style} style" for name in ("red heart", "flag: Italy", "woman firefighter, dark skin tone")
             for style in STYLES]
    wanted, without = (painter(asked, steps=steps, **QUIET) for steps in (20, 1))
    painter.load_lora(locate("emoji", "lcm"))
    found = painter(asked, steps=1, sampler="lcm", spacing="lcm", guidance=1, **QUIET)
    assert (found - wanted).square().mean() < 0.5 * (without - wanted).square().mean()
