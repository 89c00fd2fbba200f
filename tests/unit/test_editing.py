"""Chapter 20: editing, LoRA, ControlNet and new words, on a tiny pipeline with random weights."""

import copy
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusionbook.data import from_pil, to_pil
from diffusionbook.editing import (
    ControlNet,
    ControlNetConfig,
    LoRA,
    LowRank,
    add_word,
    as_mask,
    edge_map,
    edit_words,
    learn_word,
    load_lora,
    matching_tokens,
    prompt_film,
    train_lora,
)
from diffusionbook.samplers import noise_source
from diffusionbook.stable_diffusion import StableDiffusion
from diffusionbook.unet import UNet, UNetConfig

CAPTION = "red heart, noto style"
FAST = {"steps": 4, "progress": False, "output": "tensor"}


@pytest.fixture
def painter(tiny):
    """A copy that a test may change."""
    parts = {name: copy.deepcopy(getattr(tiny, name)) for name in ("vae", "unet", "text_encoder", "tokenizer")}
    return StableDiffusion(schedule=tiny.schedule, prediction=tiny.prediction, **parts)


@pytest.fixture(scope="module")
def picture():
    torch.manual_seed(3)
    return to_pil(torch.rand(1, 3, 64, 64) * 2 - 1)[0]


# A picture as the start


def test_methods_come_with_the_chapter(tiny, picture):
    assert tiny.img2img(picture, CAPTION, **FAST).shape == (1, 3, 64, 64)
    assert {"img2img", "inpaint", "invert", "load_lora", "with_controlnet"} <= set(dir(StableDiffusion))


def test_strength_decides_how_much_of_a_picture_stays(tiny, picture):
    clean = tiny.decode(tiny.encode(from_pil(picture)))
    far = [(tiny.img2img(picture, CAPTION, strength=strength, **FAST | {"steps": 10}) - clean).abs().mean()
           for strength in (0.1, 0.5, 1.0)]
    assert far[0] < far[1] - 0.05 and far[0] < far[2] - 0.05
    steps = []
    tiny.img2img(picture, CAPTION, strength=0.75, on_step=lambda *state: steps.append(state[0]), **FAST | {"steps": 50})
    assert len(steps) == 37  # as diffusers counts


def test_img2img_from_pure_noise_on_a_silent_schedule_is_painting(painter, picture):
    painter.schedule = painter.schedule.scaled_linear().zero_terminal_snr()
    assert torch.allclose(painter.img2img(picture, CAPTION, strength=1.0, seed=4, **FAST),
                          painter(CAPTION, seed=4, **FAST), atol=1e-4)


def test_several_pictures_and_captions(tiny, picture):
    images = from_pil([picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    assert len(tiny.img2img(picture, [CAPTION, "pizza"], n=2, **FAST)) == 4
    both = tiny.img2img(images, [CAPTION, "pizza"], seed=2, **FAST)
    alone = tiny.img2img(images[1:], "pizza", seed=3, **FAST)
    assert torch.allclose(both[1], alone[0], atol=1e-4)
    found = tiny.img2img(picture, CAPTION, steps=4, progress=False)
    assert found[0].info["edit"] == "img2img, strength 0.6" and found[0].info["caption"] == CAPTION


def test_options_of_a_call_reach_guidance_and_captions(painter, picture):
    """rescale and clip_skip are the denoiser's, not the sampler's."""
    control = ControlNet.beside(painter.unet, hint_channels=(8, 16, 16, 32))
    edits = {"img2img": partial(painter.img2img, picture, CAPTION, strength=1.0),
             "inpaint": partial(painter.inpaint, picture, half_mask(), CAPTION),
             "control": partial(painter.with_controlnet(control), CAPTION, torch.zeros(1, 3, 64, 64))}
    for name, edit in edits.items():
        plain = edit(guidance=5, **FAST)
        assert (edit(guidance=5, rescale=0.9, clip_skip=0, **FAST) - plain).abs().mean() > 1e-4, name
        with pytest.raises(ValueError, match="skip must lie in"):
            edit(clip_skip=1, **FAST)  # there is one block only


@pytest.mark.parametrize("options, message", [
    ({"strength": 0.0}, "strength must lie"), ({"strength": 1.2}, "strength must lie"),
    ({"strength": 0.1}, "leave at least one step of 4"),
])
def test_impossible_strengths_are_refused(tiny, picture, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.img2img(picture, CAPTION, **options, **FAST)


def test_pictures_that_do_not_fit_are_refused(tiny, picture):
    with pytest.raises(ValueError, match="multiples of 8"):
        tiny.img2img(picture.resize((60, 64)), CAPTION, **FAST)
    with pytest.raises(ValueError, match="2 pictures don't go with 3 captions"):
        tiny.img2img([picture] * 2, [CAPTION] * 3, **FAST)
    with pytest.raises(ValueError, match=r"must lie in \[-1, 1\]"):
        tiny.img2img(torch.full((1, 3, 64, 64), 9.0), CAPTION, **FAST)


# Inpainting


def half_mask():
    mask = torch.zeros(64, 64)
    mask[:, 32:] = 1
    return mask


def test_what_the_mask_keeps_is_kept(tiny, picture):
    states = []
    images = tiny.inpaint(picture, half_mask(), "pizza", on_step=lambda i, x, answer: states.append(x), **FAST)
    known = tiny.encode(from_pil(picture))
    assert torch.allclose(states[-1][..., :4], known[..., :4], atol=1e-6)
    assert (states[-1][..., 4:] - known[..., 4:]).abs().mean() > 0.05
    other = tiny.inpaint(picture, half_mask(), "pizza", seed=1, **FAST)
    changed = (other - images).abs().mean((0, 1, 2))
    assert changed[48:].mean() > 2 * changed[:16].mean()


def test_nine_channels_see_mask_and_picture(tiny, picture):
    torch.manual_seed(0)
    unet = UNet(replace(tiny.unet.config, in_channels=9)).eval()
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(0.1 * torch.randn_like(p))
    seen = []
    unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    parts = {name: getattr(tiny, name) for name in ("vae", "text_encoder", "tokenizer", "schedule", "prediction")}
    painter = StableDiffusion(unet=unet, **parts)
    assert painter.extra_channels == 5
    painter.inpaint(picture, half_mask(), CAPTION, **FAST)
    assert seen[0].shape == (2, 9, 8, 8)
    assert torch.equal(seen[0][0, 4], torch.tensor([0.0] * 4 + [1.0] * 4).expand(8, 8))
    masked = from_pil(picture) * (1 - half_mask())
    assert torch.allclose(seen[-1][1, 5:], painter.encode(masked)[0], atol=1e-5)


def test_masks_are_checked(tiny, picture):
    assert as_mask(half_mask(), (64, 64)).unique().tolist() == [0.0, 1.0]
    drawn = Image.fromarray((half_mask().numpy() * 255).astype(np.uint8))
    assert torch.equal(as_mask(drawn, (64, 64))[0, 0], half_mask())
    with pytest.raises(ValueError, match=r"size of the picture, \(64, 64\), got \(1, 1, 32, 64\)"):
        as_mask(torch.zeros(32, 64), (64, 64))
    with pytest.raises(ValueError, match="a PIL picture or a tensor, got ndarray"):
        as_mask(half_mask().numpy(), (64, 64))
    for values in (torch.full((64, 64), 40, dtype=torch.uint8), torch.full((64, 64), torch.nan), -torch.ones(64, 64)):
        with pytest.raises(ValueError, match=r"values of a mask must lie in \[0, 1\]"):
            as_mask(values, (64, 64))
    for nothing in (torch.zeros(64, 64), Image.new("L", (64, 64))):
        with pytest.raises(ValueError, match="nothing in this mask is white"):
            as_mask(nothing, (64, 64))
    with pytest.raises(ValueError, match="size of the picture"):
        as_mask(Image.new("L", (32, 64)), (64, 64))
    for mode in ("F", "I;16"):
        with pytest.raises(ValueError, match="8 bits per colour"):
            as_mask(Image.new(mode, (64, 64), 1), (64, 64))
    assert as_mask(torch.ones(64, 64, dtype=torch.bool), (64, 64)).min() == as_mask(Image.new("1", (64, 64), 1),
                                                                                    (64, 64)).min() == 1
    with pytest.raises(ValueError, match="3 masks don't go with 2 pictures"):
        tiny.inpaint(picture, torch.ones(3, 1, 64, 64), CAPTION, n=2, **FAST)


# Inversion and words


def test_an_inverted_picture_is_painted_again():
    emoji = StableDiffusion.from_pretrained("emoji")  # random weights make no smooth way
    image = emoji(CAPTION, steps=10, output="tensor", progress=False)
    options = {"steps": 20, "guidance": 1.0}
    noise = emoji.invert(image, CAPTION, corrections=2, **options)
    assert abs(noise.std() - 1) < 0.1
    again = emoji(CAPTION, latents=noise, sampler="ddim", output="tensor", progress=False, **options)
    other = emoji(CAPTION, seed=5, sampler="ddim", output="tensor", progress=False, **options)
    target = emoji.decode(emoji.encode(image))
    assert (again - target).abs().mean() < 0.01 and (other - target).abs().mean() > 0.05


def test_tokens_find_their_partners():
    assert matching_tokens([1, 2, 3, 9], [1, 5, 3, 9]) == ([0, 1, 2, 3], [0, 1, 2, 3])
    assert matching_tokens([1, 2, 9, 0], [1, 7, 2, 9]) == ([0, 1, 2], [0, 2, 3])


def test_the_second_caption_looks_where_the_first_looks(tiny):
    both = edit_words(tiny, CAPTION, "red heart, 3d style", seed=3, **FAST)
    alone = tiny(CAPTION, seed=3, **FAST)
    free = edit_words(tiny, CAPTION, "red heart, 3d style", seed=3, share=0.0, **FAST)
    assert torch.allclose(both[:1], alone, atol=1e-4)
    assert torch.allclose(free[1:], tiny("red heart, 3d style", seed=3, **FAST), atol=1e-4)
    assert (both[1] - free[1]).abs().mean() > 0.005
    same = edit_words(tiny, CAPTION, CAPTION, share=1.0, **FAST)
    assert torch.allclose(same[0], same[1], atol=1e-6)
    assert not any(module._forward_hooks for module in tiny.unet.modules())
    told, _ = edit_words(tiny, CAPTION, "pizza", seed=3, steps=1, progress=False)
    assert told.info["seed"] == "3"


@pytest.mark.parametrize("sampler", ["ddpm", "euler_ancestral", "dpmpp_2m"])
def test_both_captions_and_all_frames_share_all_noise(tiny, sampler):
    """Each picture is what its caption paints alone with that seed, by a random sampler, too; metadata says so."""
    options = {"seed": 5, "sampler": sampler, "steps": 4, "progress": False}
    alone = [tiny(caption, **options)[0] for caption in (CAPTION, "pizza")]
    both = edit_words(tiny, CAPTION, "pizza", share=0.0, **options)
    film = prompt_film(tiny, [CAPTION, "pizza"], frames=2, **options)
    for found, expected in zip((*both, film[0], film[2]), alone * 2, strict=True):
        assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1
        assert (found.info["seed"], found.info["sampler"]) == ("5", sampler)
    assert [picture.info["caption"] for picture in film] == [CAPTION, f"{CAPTION} (1/2 of the way to pizza)", "pizza"]


def test_a_film_goes_from_caption_to_caption(tiny):
    film = prompt_film(tiny, [CAPTION, "pizza"], frames=3, seed=2, **FAST)
    assert film.shape == (4, 3, 64, 64)
    assert torch.allclose(film[:1], tiny(CAPTION, seed=2, **FAST), atol=1e-4)
    assert torch.allclose(film[3:], tiny("pizza", seed=2, **FAST), atol=1e-4)
    steps = (film[1:] - film[:-1]).abs().mean((1, 2, 3))
    assert steps.max() < (film[-1] - film[0]).abs().mean()
    for captions, frames in (("pizza", 3), (["pizza"], 3), ([CAPTION, "pizza"], 0)):
        with pytest.raises(ValueError, match="a list of two captions or more"):
            prompt_film(tiny, captions, frames=frames, **FAST)


def test_options_of_a_call_reach_a_film():
    emoji = StableDiffusion.from_pretrained("emoji")  # the tiny one has no block to skip
    film = prompt_film(emoji, [CAPTION, "pizza"], frames=1, clip_skip=1, guidance=2.0, negative="blue", **FAST)
    expected = emoji([CAPTION], clip_skip=1, guidance=2.0, negative="blue", **FAST)
    assert torch.allclose(film[:1], expected, atol=1e-4)


# LoRA


def filled(lora):
    torch.manual_seed(5)
    with torch.no_grad():
        for p in lora.parameters():
            p.normal_(std=0.3)
    return lora


def test_a_new_lora_changes_nothing_and_detached_it_leaves_no_trace(painter):
    before = painter(CAPTION, **FAST)
    lora = LoRA(painter, rank=2).attach()
    assert torch.equal(painter(CAPTION, **FAST), before)
    filled(lora)
    assert (painter(CAPTION, **FAST) - before).abs().mean() > 0.01
    lora.detach()
    assert torch.equal(painter(CAPTION, **FAST), before)


@pytest.mark.parametrize("targets", [r"to_[qv]$", r"^unet\.", r"text_encoder"], ids=["attention", "all", "text"])
def test_merging_is_the_same_as_adding(painter, targets):
    lora = filled(LoRA(painter, rank=2, targets=targets)).attach(scale=0.7)
    unet, x = painter.unet, noise_source(0)(torch.empty(1, 4, 8, 8))
    say = lambda: unet(x, torch.tensor([5]), painter.encode_text([CAPTION]))  # noqa: E731
    with torch.no_grad():
        added = say()
        lora.merge(scale=0.7)
        merged = say()
    assert (added - merged).abs().max() <= 1e-5 * added.abs().max()
    assert painter.unet.state_dict().keys() == UNet(unet.config).state_dict().keys()


def test_what_is_merged_is_what_was_attached(painter, tmp_path):
    filled(LoRA(painter, rank=2)).save(tmp_path / "lora.safetensors")
    lora = painter.load_lora(tmp_path / "lora.safetensors", scale=0.3)
    attached = painter(CAPTION, **FAST)
    lora.merge()
    assert torch.allclose(painter(CAPTION, **FAST), attached, atol=1e-3)


def test_a_folder_holds_a_lora_of_the_usual_name(painter, tmp_path):
    lora = filled(LoRA(painter, rank=2))
    lora.save(tmp_path / "own", dtype=torch.float16)
    stored = load_file(tmp_path / "own/pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    again = painter.load_lora(tmp_path / "own")
    assert all(p.dtype == torch.float32 for p in again.parameters())
    for name in lora.layers:
        assert torch.equal(again.addition(name).down.weight, lora.addition(name).down.weight.half().float())


def test_what_is_no_lora_is_refused(painter, tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match="holds no LoRA"):
        painter.load_lora(tmp_path / "empty.safetensors")
    filled(LoRA(painter, rank=2)).save(tmp_path / "nan.safetensors")
    state = load_file(tmp_path / "nan.safetensors")
    next(iter(state.values()))[0, 0] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="holds NaN"):
        painter.load_lora(tmp_path / "nan.safetensors")
    assert not any(module._forward_hooks for module in painter.unet.modules())
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        LoRA(painter, rank=0)


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_alpha_scales_by_its_share_of_the_rank(alpha):
    layer = torch.nn.Linear(3, 5)
    part = LowRank(layer, 4, alpha=alpha)
    torch.nn.init.normal_(part.up.weight)
    x = torch.randn(2, 3)
    assert torch.allclose(part(x), x @ part.weight().T, atol=1e-6)
    assert part.factor == (1 if alpha is None else 0.25)


def in_layout(state, layout, rank=2):
    """The same tensors under other people's names."""
    found = {}
    for key, tensor in state.items():
        name, _, kind = key.removesuffix(".weight").rpartition(".")
        way = {"lora_A": "down", "lora_B": "up"}[kind]
        if layout == "kohya":
            part, _, name = name.partition(".")
            prefix = "lora_unet_" if part == "unet" else "lora_te_text_model_"
            stem = prefix + name.replace(".", "_")
            found[f"{stem}.lora_{way}.weight"] = tensor
            found[f"{stem}.alpha"] = torch.tensor(float(rank))
        elif layout == "older diffusers":
            found[f"{name.replace('text_encoder.', 'text_encoder.text_model.')}.lora.{way}.weight"] = tensor
        elif layout == "processors":
            name, _, last = name.partition(".to_")
            found[f"{name}.processor.to_{last.removesuffix('.0')}_lora.{way}.weight"] = tensor
        else:
            found[key] = tensor
    return found


@pytest.mark.parametrize("layout", ["diffusers", "older diffusers", "processors", "kohya"])
def test_all_public_layouts_are_read(painter, tmp_path, layout):
    targets = r"to_(q|out\.0)$" if layout == "processors" else r"to_(q|out\.0)$|q_proj$"
    lora = filled(LoRA(painter, rank=2, targets=targets)).attach(scale=0.8)
    wanted = painter(CAPTION, **FAST)
    lora.save(tmp_path / "ours.safetensors")
    lora.detach()
    save_file(in_layout(load_file(tmp_path / "ours.safetensors"), layout), tmp_path / "theirs.safetensors")
    again = painter.load_lora(tmp_path / "theirs.safetensors", scale=0.8)
    assert torch.allclose(painter(CAPTION, **FAST), wanted, atol=1e-5)
    again.detach()


def test_stored_alphas_count(painter, tmp_path):
    lora = filled(LoRA(painter, rank=2))
    lora.save(tmp_path / "lora.safetensors")
    state = load_file(tmp_path / "lora.safetensors")
    told = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 1, "unet.r": 2})}
    save_file(state, tmp_path / "lora.safetensors", metadata=told)
    found = load_lora(painter, tmp_path / "lora.safetensors")
    name = next(iter(found.layers))
    assert torch.allclose(found.addition(name).weight(), 0.5 * lora.addition(name).weight())


def test_a_lora_for_another_model_is_refused(painter, tmp_path):
    other = StableDiffusion(vae=painter.vae, tokenizer=painter.tokenizer, schedule=painter.schedule,
                            text_encoder=painter.text_encoder, prediction="v",
                            unet=UNet(replace(painter.unet.config, channels=(24, 32), groups=8)))
    LoRA(other, rank=2).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="made for another model: unet.* needs"):
        painter.load_lora(tmp_path / "other.safetensors")
    save_file({"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": torch.ones(2, 2)}, tmp_path / "xl.safetensors")
    with pytest.raises(ValueError, match="no place for 'lora_unet_input_blocks"):
        painter.load_lora(tmp_path / "xl.safetensors")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{name}.lora_magnitude_vector": torch.ones(24)}, tmp_path / "dora.safetensors")
    with pytest.raises(ValueError, match="dora.safetensors is a DoRA"):
        painter.load_lora(tmp_path / "dora.safetensors")
    save_file({f"{name}.lora_A.weight": torch.ones(2, 24)}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="lacks up for unet.mid_block"):
        painter.load_lora(tmp_path / "half.safetensors")
    assert not any(module._forward_hooks for module in painter.unet.modules())
    with pytest.raises(ValueError, match="no layer of the pipeline"):
        LoRA(painter, targets="nothing")


def test_a_lora_learns(painter, picture):
    """The network alone stays as it was, and with its LoRA it knows the picture better."""
    before = copy.deepcopy(painter.unet.state_dict())
    latents = painter.encode(from_pil(picture))
    noise = noise_source(1)(latents)

    def error():
        with torch.no_grad():
            noisy = painter.schedule.add_noise(latents, noise, 500)
            return (painter.denoiser(["pizza"], guidance=1)(noisy, 500).x0 - latents).square().mean().item()

    untrained, chance = error(), torch.get_rng_state()
    lora = train_lora(painter, [picture], ["pizza"], steps=30, batch=4, progress=False)
    assert torch.equal(torch.get_rng_state(), chance)  # nobody else's dice are thrown
    assert all(p.requires_grad and p.grad is None for p in painter.unet.parameters())
    trained = error()
    assert trained < 0.95 * untrained
    lora.detach()
    assert error() == pytest.approx(untrained)
    assert all(torch.equal(p, before[name]) for name, p in painter.unet.state_dict().items())
    with pytest.raises(ValueError, match="2 pictures don't go with 3 captions"):
        train_lora(painter, [picture] * 2, ["pizza"] * 3, progress=False)


# A new word


def test_a_new_word_has_its_own_vector(painter):
    before = painter.encode_text(["pizza"])
    add_word(painter, "zorb", torch.ones(16))
    assert painter.tokenizer.encode("a zorb") == [*painter.tokenizer.encode("a"), 540]
    assert painter.tokenizer.decode([540]) == "zorb"
    assert torch.equal(painter.encode_text(["pizza"]), before)
    assert not torch.equal(painter.encode_text(["zorb"]), before)
    with pytest.raises(ValueError, match="one run of letters"):
        add_word(painter, "two words", torch.ones(16))
    with pytest.raises(ValueError, match=r"shape \(16,\), got \(8,\)"):
        add_word(painter, "other", torch.ones(8))
    with pytest.raises(ValueError, match="NaN"):
        add_word(painter, "other", torch.full((16,), torch.nan))


def test_a_word_in_brackets_stands_anywhere(painter, tmp_path):
    add_word(painter, "<Cat-toy_2>", torch.ones(16))
    encode = painter.tokenizer.encode
    assert encode("a <cat-toy_2>!") == [*encode("a"), 540, *encode("!")]
    assert encode("(<CAT-TOY_2>") == [*encode("("), 540]
    assert painter.tokenizer.decode([540]) == "<cat-toy_2>"
    painter.save_pretrained(tmp_path)
    assert StableDiffusion.from_pretrained(tmp_path).tokenizer.encode("red<cat-toy_2>") == [*encode("red"), 540]
    painter.tokenizer.forget("<cat-toy_2>")
    assert 540 not in encode("<cat-toy_2>")
    for word in ("<cat toy>", "<>", "<cat", "<a<b>"):
        with pytest.raises(ValueError, match="without spaces in <…>"):
            add_word(painter, word, torch.ones(16))
    with pytest.raises(ValueError, match="a word has one vector, got 3; add each as a word of its own"):
        add_word(painter, "<cat>", torch.ones(3, 16))


def test_a_word_is_learned_and_nothing_else_changes(painter, picture):
    before = copy.deepcopy(painter.text_encoder.state_dict())
    vector = learn_word(painter, [picture], "zorb", caption="{}, noto style", like="pizza", steps=5, progress=False)
    table = painter.text_encoder.embeddings["token_embedding"].weight
    assert torch.equal(table[-1], vector) and torch.equal(table[:-1], before["embeddings.token_embedding.weight"])
    assert (vector - table[painter.tokenizer.encode("pizza")].mean(0)).abs().max() > 1e-4
    assert all(p.requires_grad for p in painter.unet.parameters())


@pytest.mark.parametrize("options", [{"like": ""}, {"like": " "}, {"like": "pizza", "caption": "a creature"}])
def test_a_word_needs_a_place_and_a_start(painter, picture, options):
    """Without a place it would learn nothing, without a start it would be NaN."""
    with pytest.raises(ValueError, match="caption needs {} where the word goes, and like a word"):
        learn_word(painter, [picture], "zorb", progress=False, **options)
    with pytest.raises(ValueError, match="multiples of"):
        learn_word(painter, [picture.resize((60, 60))], "zorb", like="pizza", progress=False)
    assert not painter.tokenizer.added  # nothing half learned


# ControlNet


def test_a_new_controlnet_changes_nothing(painter):
    control = ControlNet.beside(painter.unet, hint_channels=(4, 8, 8, 8))
    hint = torch.rand(1, 3, 64, 64)
    assert torch.equal(painter.with_controlnet(control)(CAPTION, hint, **FAST), painter(CAPTION, **FAST))


def test_zero_convolutions_learn_all_the_same(painter):
    control = ControlNet.beside(painter.unet, hint_channels=(4, 8, 8, 8))
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([3]), painter.encode_text([CAPTION]).clone()
    middle, sides = control(x, t, context, control.controlnet_cond_embedding(torch.rand(1, 3, 64, 64)))
    assert not middle.any() and not any(side.any() for side in sides)
    (middle.sum() + sum(side.sum() for side in sides)).backward()
    assert control.controlnet_mid_block.weight.grad.abs().max() > 0
    assert control.controlnet_down_blocks[0].weight.grad.abs().max() > 0
    assert not control.conv_in.weight.grad.any()  # the second step brings its gradient


def test_a_trained_controlnet_minds_its_hint_and_its_strength(painter):
    control = ControlNet.beside(painter.unet, hint_channels=(4, 8, 8, 8))
    with torch.no_grad():
        for p in control.parameters():
            p.add_(0.1 * torch.randn_like(p))
    paint, hints = painter.with_controlnet(control), torch.rand(2, 3, 64, 64)
    first, second = (paint(CAPTION, hint[None], **FAST) for hint in hints)
    assert (first - second).abs().mean() > 1e-4
    assert torch.equal(paint(CAPTION, hints[:1], strength=0.0, **FAST), painter(CAPTION, **FAST))
    both = paint([CAPTION, CAPTION], hints, **FAST)
    assert torch.allclose(both[:1], first, atol=1e-4)
    assert paint(CAPTION, to_pil(hints[:1] * 2 - 1)[0], steps=4, progress=False)[0].info["edit"].startswith("control")


@pytest.mark.parametrize("hint, message", [
    (torch.full((1, 3, 64, 64), 255, dtype=torch.uint8), "float tensor .*uint8"),
    (torch.full((1, 3, 64, 64), 255.0), r"must lie in \[0, 1\].*got \[255, 255\]"),
    (-torch.ones(1, 3, 64, 64), "add 1 and divide by 2"),
    (torch.full((1, 3, 64, 64), torch.nan), "without NaN"),
    (torch.zeros(1, 1, 64, 64), r"\(1, 1, 64, 64\)"),
    (torch.zeros(2, 3, 64, 64), "3 pictures need one hint or as many"),
    (torch.zeros(1, 3, 60, 64), "multiples of 8"),
])
def test_hints_are_checked(painter, hint, message):
    paint = painter.with_controlnet(ControlNet.beside(painter.unet, hint_channels=(8, 16, 16, 32)))
    with pytest.raises(ValueError, match=message):
        paint(["pizza"] * 3, hint, **FAST)


def test_a_controlnet_for_another_network_is_refused(painter):
    other = ControlNet(ControlNetConfig(unet=replace(painter.unet.config, channels=(24, 32), groups=8)))
    with pytest.raises(ValueError, match=r"another U-Net: channels is \(24, 32\) there and \(16, 24\) here"):
        painter.with_controlnet(other)
    with pytest.raises(ValueError, match="global_pool_conditions=True"):
        ControlNetConfig.from_config(other.config.to_config() | {"global_pool_conditions": True})


def test_a_controlnet_goes_to_disk_and_back(painter, tmp_path):
    control = ControlNet.beside(painter.unet, hint_channels=(4, 8, 8, 8))
    control.save_pretrained(tmp_path)
    again = ControlNet.from_pretrained(tmp_path)
    assert again.config.unet == replace(painter.unet.config, sample_size=64)
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in control.state_dict().items())


def test_what_a_controlnet_shares_with_its_network_need_not_be_stored(painter, tmp_path):
    control = ControlNet.beside(painter.unet, hint_channels=(4, 8, 8, 8))
    with torch.no_grad():
        for name, p in control.named_parameters():
            if not name.startswith(ControlNet.copied) or name == "conv_in.bias":
                p.add_(torch.randn_like(p))
    control.save_pretrained(tmp_path / "all")
    control.save_pretrained(tmp_path / "part", beside=painter.unet)
    stored = load_file(tmp_path / "part" / ControlNet.weights_name)
    assert "conv_in.bias" in stored and "conv_in.weight" not in stored and "controlnet_mid_block.weight" in stored
    again = ControlNet.from_pretrained(tmp_path / "part", beside=painter.unet)
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in control.state_dict().items())
    whole = ControlNet.from_pretrained(tmp_path / "all", beside=painter.unet)
    assert all(torch.equal(p, whole.state_dict()[name]) for name, p in control.state_dict().items())
    with pytest.raises(ValueError, match="missing 'conv_in.weight'"):
        ControlNet.from_pretrained(tmp_path / "part")
    with torch.no_grad():
        control.conv_in.bias.copy_(painter.unet.conv_in.bias)
    control.save_pretrained(tmp_path / "part", beside=painter.unet)
    with pytest.raises(ValueError, match="only what was learned beside a U-Net; give that as beside=pipeline.unet"):
        ControlNet.from_pretrained(tmp_path / "part")


def test_edges_are_white_lines():
    picture = Image.new("RGB", (32, 32), "white")
    picture.paste("black", (8, 8, 24, 24))
    edges = edge_map(picture)
    assert edges.shape == (1, 3, 32, 32) and edges.unique().tolist() == [0.0, 1.0]
    assert edges[0, 0, 16, 6:10].any() and not edges[0, 0, 12:20, 12:20].any()
    assert torch.equal(edge_map(from_pil(picture).bfloat16().requires_grad_()), edges)


def test_controlnet_of_stable_diffusion_on_meta():
    with torch.device("meta"):
        net = ControlNet(ControlNetConfig(unet=UNetConfig.preset("sd15")))
    assert net.count_parameters() == 361_279_120 and len(net.state_dict()) == 340


def test_a_training_that_fails_leaves_the_pipeline_alone(painter, picture, monkeypatch):
    before = painter(CAPTION, **FAST)

    def interrupted(lora, *args, **options):
        filled(lora)
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusionbook.editing.train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_lora(painter, [picture], ["pizza"], progress=False)
    assert torch.equal(painter(CAPTION, **FAST), before)
    painter.to(torch.device("cpu")).unet.half()
    with pytest.raises(ValueError, match="lost in torch.float16; to train, load the pipeline in float32"):
        train_lora(painter, [picture], ["pizza"], progress=False)


@pytest.mark.parametrize("options", [{"steps": 0}, {"lr": float("inf"), "steps": 5}])
def test_a_word_that_is_not_learned_leaves_no_trace(painter, picture, options):
    before = painter("a zorb", **FAST)
    for known in (False, True):
        with pytest.raises((ValueError, FloatingPointError)):
            learn_word(painter, [picture], "zorb", like="pizza", progress=False, **options)
        assert torch.equal(painter("a zorb", **FAST), before) and ("zorb" in painter.tokenizer.added) == known
        add_word(painter, "zorb", torch.ones(16))
        before = painter("a zorb", **FAST)


def test_learned_words_are_saved_and_read(painter, tmp_path):
    add_word(painter, "zorb", torch.zeros(16))
    add_word(painter, "zorb", torch.ones(16))
    add_word(painter, "blip", -torch.ones(16))
    assert painter.text_encoder.config.vocab_size == len(painter.tokenizer.vocab) + 2
    painter.save_pretrained(tmp_path / "pipe")
    again = StableDiffusion.from_pretrained(tmp_path / "pipe")
    assert again.tokenizer.added == painter.tokenizer.added
    assert torch.equal(again("a zorb and a blip", **FAST), painter("a zorb and a blip", **FAST))
    added = tmp_path / "pipe" / "tokenizer" / "added_tokens.json"
    added.write_text(json.dumps({"a cat toy": 540}))
    with pytest.raises(ValueError, match="has the added word 'a cat toy', which can't be read here"):
        StableDiffusion.from_pretrained(tmp_path / "pipe")


def test_a_word_that_is_cleaned_away_is_refused(painter):
    with pytest.raises(ValueError, match="cleaned to other letters"):
        add_word(painter, "\ufb01xx", torch.ones(16))  # the ligature fi
    assert not painter.tokenizer.added


def test_a_lora_is_no_pickle(painter, tmp_path):
    with pytest.raises(ValueError, match=r"end in .safetensors, not in .bin"):
        LoRA(painter).save(tmp_path / "lora.bin")
    assert not list(tmp_path.iterdir())


def test_a_controlnet_of_another_type_is_refused(painter):
    with pytest.raises(ValueError, match="ControlNet computes in torch.float16 and the pipeline in torch.float32"):
        painter.with_controlnet(ControlNet.beside(painter.unet).half())


def test_additions_follow_a_pipeline_to_its_device(tiny, picture, tmp_path):
    """With little memory the weights stay behind; what is added to their layers works on the device all the same."""
    tiny.save_pretrained(tmp_path)
    for memory in (None, "low"):
        low = StableDiffusion.from_pretrained(tmp_path, memory=memory)
        lora, control = LoRA(low, rank=2).attach(), ControlNet.beside(low.unet).to("meta")
        low.to("meta")
        assert low.with_controlnet(control)(CAPTION, picture, **FAST).device.type == "meta"
        assert low.img2img(picture, CAPTION, **FAST).device.type == "meta"
        assert {p.device.type for p in lora.parameters()} == {"meta"}


def test_a_lora_with_nan_is_not_saved(painter, tmp_path):
    lora = filled(LoRA(painter, rank=2))
    next(lora.parameters()).data[0] = torch.nan
    with pytest.raises(ValueError, match="holds NaN or infinity, so nothing was saved"):
        lora.save(tmp_path / "lora.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_word_that_exists_can_t_be_new(painter):
    known = next(token for token in ("red", "heart", "pizza") if len(painter.tokenizer.encode(token)) == 1)
    vector = torch.zeros(painter.text_encoder.config.width)
    with pytest.raises(ValueError, match="is a word already"):
        add_word(painter, known, vector)
    for _ in range(2):  # who runs a cell twice learns a word anew
        add_word(painter, "zorb", vector)


def test_edits_say_how_they_were_made(tiny, picture):
    options = {"rescale": 0.5, "eta": 1.0, "sampler": "ddim", "spacing": "linspace", "steps": 4, "progress": False}
    mask = torch.ones(64, 64)
    for found in (tiny.img2img(picture, CAPTION, **options), tiny.inpaint(picture, mask, CAPTION, **options),
                  edit_words(tiny, CAPTION, "pizza", **options), prompt_film(tiny, [CAPTION, "pizza"], **options)):
        told = {name: found[0].info[name] for name in options if name != "progress"}
        assert told == {"rescale": "0.5", "eta": "1.0", "sampler": "ddim", "spacing": "linspace", "steps": "4"}


# One LoRA at a time, and what an edit sets by itself


def test_a_pipeline_wears_one_lora_at_a_time(painter, tmp_path):
    bare = painter(CAPTION, **FAST)
    first = filled(LoRA(painter, rank=2)).attach()
    alone = painter(CAPTION, **FAST)
    first.save(tmp_path / "first.safetensors")
    second = filled(LoRA(painter, rank=2, targets="text_encoder")).attach()
    assert painter.lora is second
    again = painter.load_lora(tmp_path / "first.safetensors")
    assert torch.equal(painter(CAPTION, **FAST), alone)
    again.detach()
    assert painter.lora is None and torch.equal(painter(CAPTION, **FAST), bare)


def test_training_a_lora_again_begins_anew(painter, picture, tmp_path):
    """A cell that is run twice: what the second one saves is all that it painted with."""
    for _ in range(2):
        lora = train_lora(painter, [picture], [CAPTION], steps=3, progress=False)
    seen = painter(CAPTION, **FAST)
    lora.save(tmp_path / "lora.safetensors")
    lora.detach()
    painter.load_lora(tmp_path / "lora.safetensors")
    assert torch.allclose(painter(CAPTION, **FAST), seen, atol=1e-5)


def test_what_is_merged_is_not_added_once_more(painter):
    lora = filled(LoRA(painter, rank=2)).attach()
    lora.merge()
    merged = painter(CAPTION, **FAST)
    for again in (lora.merge, lora.attach):
        with pytest.raises(ValueError, match="part of the weights already"):
            again()
    assert torch.equal(painter(CAPTION, **FAST), merged)


def test_a_pipeline_is_not_saved_without_the_lora_it_wears(painter, tmp_path):
    lora = filled(LoRA(painter, rank=2)).attach()
    with pytest.raises(ValueError, match="a LoRA is attached and would not be saved"):
        painter.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    lora.merge()
    painter.save_pretrained(tmp_path / "model")
    assert torch.allclose(StableDiffusion.from_pretrained(tmp_path / "model")(CAPTION, **FAST),
                          painter(CAPTION, **FAST), atol=1e-5)


def test_gradients_may_be_off_outside(painter, picture):
    with torch.no_grad():
        lora = train_lora(painter, [picture], [CAPTION], steps=2, progress=False)
    assert any(addition.up.weight.abs().max() > 0 for addition in lora.additions.values())


def test_what_an_edit_sets_itself_is_refused_by_its_name(painter, picture):
    noise = torch.zeros(1, 4, 8, 8)
    control = ControlNet.beside(painter.unet)
    for wish, message in [
        (lambda: painter.img2img(picture, CAPTION, latents=noise, **FAST), "img2img sets latents by itself"),
        (lambda: painter.img2img(picture, CAPTION, size=(64, 64), **FAST), "img2img sets size by itself"),
        (lambda: edit_words(painter, CAPTION, CAPTION, latents=noise, **FAST), "edit_words sets latents by itself"),
        (lambda: prompt_film(painter, [CAPTION, "cat"], n=2, **FAST), "prompt_film sets n by itself"),
        (lambda: painter.with_controlnet(control)(CAPTION, picture, size=(64, 64), **FAST), "sets size by itself"),
    ]:
        with pytest.raises(ValueError, match=message):
            wish()


def test_edited_words_show_their_steps(painter):
    seen = []
    edit_words(painter, CAPTION, "blue heart, noto style", on_step=lambda i, x, answer: seen.append(i), **FAST)
    assert seen == [0, 1, 2, 3]


def test_masks_that_say_nothing_clear_are_refused():
    stroke = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    stroke.paste((255,) * 4, (20, 20, 44, 44))
    with pytest.raises(ValueError, match="partly transparent"):
        as_mask(stroke, (64, 64))
    ones = Image.new("L", (64, 64), 0)
    ones.paste(1, (20, 20, 44, 44))
    with pytest.raises(ValueError, match="nothing in this mask is white"):
        as_mask(ones, (64, 64))
    ones.paste(255, (20, 20, 44, 44))
    assert as_mask(ones.convert("RGBA"), (64, 64)).sum() == 24 * 24
