"""Recipes that go on from shipped weights: two steps each, on a few pictures, and the files do what they should."""

import sys
from pathlib import Path

import pytest
import torch

from diffusionbook.clip import CLIP, zero_shot
from diffusionbook.data import emoji
from diffusionbook.editing import Controlled, ControlNet
from diffusionbook.stable_diffusion import StableDiffusion
from diffusionbook.unet import UNet

RECIPES = Path(__file__).parents[2] / "recipes"
FEW = {"steps": 2, "batch": 4, "device": torch.device("cpu"), "limit": 8}


@pytest.fixture(autouse=True)
def recipes_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    yield
    for name in [name for name in sys.modules if name.startswith("emoji_") or name == "shared"]:
        del sys.modules[name]


def printed(capsys) -> str:
    return capsys.readouterr().out


def test_lcm(tmp_path, capsys):
    """The student starts as the teacher, learns, and its file changes what the pipeline paints in a few steps."""
    import emoji_lcm

    emoji_lcm.main(tmp_path / "run", ship=tmp_path, **FEW)
    assert "squared distance" in printed(capsys)
    painter = StableDiffusion.from_pretrained("emoji")
    options = {"steps": 2, "sampler": "lcm", "spacing": "lcm", "guidance": 1, "seed": 0, "output": "tensor",
               "progress": False}
    before = painter("red heart", **options)
    lora = painter.load_lora(tmp_path / "lcm")
    after = painter("red heart", **options)
    assert 1e-4 < (after - before).abs().max() < 0.5, "two steps of training should change pictures, and only a little"
    lora.scale = 0.0
    assert torch.equal(painter("red heart", **options), before), "without it the pipeline is the teacher again"


def test_controlnet(tmp_path, capsys):
    """Before it learns, hints change nothing; afterwards they do, through the file that was saved."""
    import emoji_controlnet

    emoji_controlnet.main(tmp_path / "run", ship=tmp_path, **FEW)
    said = printed(capsys)
    assert "validation before" in said and "validation after" in said
    painter, g = StableDiffusion.from_pretrained("emoji"), torch.Generator().manual_seed(0)
    control = ControlNet.from_pretrained(tmp_path / "controlnet", beside=painter.unet)
    assert (tmp_path / "controlnet" / ControlNet.weights_name).stat().st_size < 1_200_000, "the copy is not stored"
    x, hint = torch.randn(1, 4, 8, 8, generator=g), (torch.rand(1, 3, 64, 64, generator=g) < 0.1).float()
    context = painter.encode_text(["red heart"])
    with torch.no_grad():
        plain = painter.unet(x, torch.tensor([500]), context=context)
        learned = Controlled(painter.unet, control, hint)(x, torch.tensor([500]), context=context)
        unlearned = Controlled(painter.unet, ControlNet.beside(painter.unet), hint)(x, torch.tensor([500]),
                                                                                   context=context)
    assert torch.equal(unlearned, plain)
    assert 1e-6 < (learned - plain).abs().max() < 0.5


def test_stable_diffusion(tmp_path, capsys):
    """A U-Net on the frozen VAE and CLIP; a pipeline in the run's folder, and what ships beside VAE and CLIP."""
    import emoji_stable_diffusion

    from diffusionbook.clip import CLIP

    emoji_stable_diffusion.main(tmp_path / "run", ship=tmp_path / "ship", **FEW)
    found = dict(line.split(": ") for line in printed(capsys).splitlines() if ": " in line)
    errors = torch.tensor([float(found[split]) for split in ("validation", "object_style", "tone_style")])
    assert (0.7 < errors).all() and (errors < 1.5).all(), "a network that knows nothing should be wrong by about 1"
    painter, clip = StableDiffusion.from_pretrained(tmp_path / "run/pipeline"), CLIP.from_pretrained("emoji")
    assert torch.allclose(painter.encode_text(["pizza"]), clip.text_model(clip.tokenizer(["pizza"])), atol=2e-3)
    assert painter("pizza", steps=1, output="tensor", progress=False).shape == (1, 3, 64, 64)
    shipped = UNet.from_pretrained(tmp_path / "ship/unet").state_dict()
    assert all(torch.equal(tensor, shipped[name]) for name, tensor in painter.unet.state_dict().items())
    assert {path.name for path in (tmp_path / "ship").iterdir()} == {"unet", "scheduler"}


def test_softened_draws_begin_without_noise_and_cool():
    """The dVAE to compare with: the chances themselves in the first fifth, then draws, the last of them nearly hard."""
    import emoji_dvae

    from diffusionbook.dvae import DVAE, DVAEConfig

    torch.manual_seed(0)
    net = emoji_dvae.Softened(DVAE(DVAEConfig(codes=16, width=8, embedding=4, blocks=1, sample_size=64)), steps=10)
    images, losses, seen = torch.rand(2, 3, 32, 32) * 2 - 1, [], []
    for seed in (0, 1) * 5:
        loss, told = net.loss(images, torch.Generator().manual_seed(seed))
        losses.append(loss.item())
        seen.append(told["temperature"])
    assert losses[0] == losses[1] and losses[2] != losses[3], "chance should come in after the first fifth"
    assert seen[:3] == [1, 1, 1] and all(a > b for a, b in zip(seen[2:], seen[3:], strict=False))
    assert seen[-1] == pytest.approx(emoji_dvae.COLDEST, abs=0.05)
    loss.backward()
    assert net.model.encoder.blocks.input.w.grad.abs().max() > 0, "the gradient reaches the encoder"


def test_a_question_adds_up_the_shares_of_a_class():
    """What CLIP's picture tower learns by, when it looks closer: a class with more captions has more pictures."""
    from emoji_clip import Question

    clip = CLIP.from_pretrained("emoji")
    classes = {"heart": ["red heart, noto style", "blue heart, 3d style"], "pizza": ["pizza, twemoji style"]}
    captions = [caption for described in classes.values() for caption in described]
    pictures = emoji("validation").images(range(5))
    question = Question(clip, classes, ["pizza", "heart", "heart", "pizza", "heart"])
    index = torch.tensor([3, 0, 2, 1, 4])
    with torch.no_grad():
        loss = question.loss(clip.embed_images(pictures), index)
    right = torch.tensor([1, 1, 0, 0, 0])  # the class of each picture: that of answer number `index`
    alone = zero_shot(clip, pictures, {caption: [caption] for caption in captions})
    shares = torch.stack([alone[:, :2].sum(1), alone[:, 2]], dim=1)
    torch.testing.assert_close(loss, -shares.gather(1, right[:, None]).log().mean(), rtol=1e-5, atol=1e-5)


def test_mixed_pictures_are_made_of_whole_blocks_of_all_four():
    from emoji_clip import BLOCK, mix

    four = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 3, 64, 64) + torch.rand(1, 1, 3, 64, 64) / 2
    mixed = mix(four, torch.Generator().manual_seed(0))
    blocks = (mixed - four[0]).unfold(2, BLOCK, BLOCK).unfold(3, BLOCK, BLOCK).round()  # whose block it is
    assert torch.equal(blocks, blocks[:, :1, :, :, :1, :1].expand_as(blocks))
    assert set(blocks.flatten().tolist()) == {0, 1, 2, 3}
