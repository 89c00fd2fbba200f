"""Chapter 20 against diffusers and PEFT: img2img, inpainting with 9 channels, LoRA, textual inversion, ControlNet."""

import pytest
import torch
from safetensors.torch import save_file

from diffusionbook.data import to_pil
from diffusionbook.editing import Controlled, ControlNet, ControlNetConfig, LoRA, add_word
from diffusionbook.samplers import starting_noise
from diffusionbook.stable_diffusion import StableDiffusion
from diffusionbook.unet import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

CAPTIONS = ["red heart", "pizza"]
WORDS = {"vocab_size": 520, "max_position_embeddings": 12}


def made_by_diffusers(folder, *, in_channels=4):
    """A tiny Stable Diffusion of diffusers with random weights, saved; and ours, loaded from there."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from diffusionbook.text import train_bpe

    torch.manual_seed(0)
    train_bpe(CAPTIONS, 520, context_length=12, pad="eos").save_pretrained(folder / "tokenizer")
    text = CLIPTextModel(CLIPTextConfig(hidden_size=16, intermediate_size=64, num_hidden_layers=1, eos_token_id=519,
                                        bos_token_id=518, num_attention_heads=2, **WORDS)).eval()
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 24), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), sample_size=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=16, in_channels=in_channels, attention_head_dim=2).eval()
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, scaling_factor=0.7, sample_size=64).eval()
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        timestep_spacing="trailing", steps_offset=1)
    kind = diffusers.StableDiffusionInpaintPipeline if in_channels == 9 else diffusers.StableDiffusionPipeline
    theirs = kind(vae=vae, unet=unet, text_encoder=text, tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
                  scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    theirs.save_pretrained(folder / "theirs")
    theirs.set_progress_bar_config(disable=True)
    return theirs, StableDiffusion.from_pretrained(folder / "theirs")


def pictures(count):
    torch.manual_seed(4)
    return torch.nn.functional.interpolate(torch.rand(count, 3, 8, 8), size=(64, 64), mode="bilinear") * 2 - 1


def test_img2img_paints_the_same(tmp_path):
    theirs, ours = made_by_diffusers(tmp_path)
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(**theirs.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    images = pictures(2)
    generators = [torch.Generator().manual_seed(3 + i) for i in range(2)]
    wanted = pipeline(CAPTIONS, image=ours.encode(images), strength=0.55, num_inference_steps=10, guidance_scale=5.0,
                      generator=generators, output_type="pt").images * 2 - 1
    found = ours.img2img(images, CAPTIONS, strength=0.55, steps=10, guidance=5.0, sampler="ddim", seed=3,
                         output="tensor", progress=False)
    assert found.std() > 0.02 and (found - wanted).abs().max() < 1e-4


def test_inpainting_with_nine_channels_paints_the_same_and_back_again(tmp_path):
    theirs, ours = made_by_diffusers(tmp_path, in_channels=9)
    images, mask = pictures(2), torch.zeros(2, 1, 64, 64)
    mask[:, :, 13:50, 20:61] = 1
    options = {"num_inference_steps": 8, "guidance_scale": 5.0, "strength": 1.0, "output_type": "pt", "height": 64,
               "width": 64, "latents": starting_noise((2, 4, 8, 8), seed=3)}
    known = ours.encode(images * (1 - mask))
    wanted = theirs(CAPTIONS, image=images, mask_image=mask, masked_image_latents=known, **options).images * 2 - 1
    found = ours.inpaint(images, mask, CAPTIONS, steps=8, guidance=5.0, sampler="ddim", seed=3, output="tensor",
                         progress=False)
    assert found.std() > 0.02 and (found - wanted).abs().max() < 1e-4
    ours.save_pretrained(tmp_path / "back")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "back")
    assert isinstance(again, diffusers.StableDiffusionInpaintPipeline)
    again.set_progress_bar_config(disable=True)
    painted = again(CAPTIONS, image=images, mask_image=mask, masked_image_latents=known, **options).images * 2 - 1
    assert (painted - wanted).abs().max() < 1e-5


# LoRA

ATTENTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


def with_peft(theirs, *, unet, text):
    """Adapters of PEFT in both networks, filled with random numbers; returns what `save_lora_weights` takes."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(7)
    parts = {}
    for name, options in (("unet", unet), ("text_encoder", text)):
        network = getattr(theirs, name)
        network.add_adapter(LoraConfig(init_lora_weights="gaussian", **options))
        with torch.no_grad():
            for key, p in network.named_parameters():
                if "lora_" in key:
                    p.normal_(std=0.3)
        config = network.peft_config["default"].to_dict()
        config["target_modules"] = sorted(config["target_modules"])  # a set, which JSON doesn't know
        parts[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
        parts[f"{name}_lora_adapter_metadata"] = config
    return parts


@torch.no_grad()
def said_by_theirs(theirs, ours):
    """What the words are and what the U-Net answers, from diffusers' networks."""
    words = theirs.text_encoder(ours.tokenizer(CAPTIONS)).last_hidden_state
    return words, theirs.unet(starting_noise((2, 4, 8, 8), seed=1), torch.tensor([40, 700]), words).sample


@torch.no_grad()
def said_by_ours(ours):
    words = ours.encode_text(CAPTIONS)
    return words, ours.unet(starting_noise((2, 4, 8, 8), seed=1), torch.tensor([40, 700]), words)


def agree(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "alpha", "other alphas and ranks here and there", "rank-stabilised",
                                  "convolutions"])
def test_a_lora_of_peft_says_the_same(tmp_path, kind):
    pytest.importorskip("peft")
    theirs, ours = made_by_diffusers(tmp_path)
    before = said_by_ours(ours)
    unet = {"r": 3, "lora_alpha": 3, "target_modules": ATTENTIONS}
    text = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "out_proj", "fc1"]}
    if kind == "alpha":
        unet["lora_alpha"], text["lora_alpha"] = 6, 1
    elif kind == "rank-stabilised":
        unet |= {"use_rslora": True, "lora_alpha": 2}
    elif kind == "convolutions":
        unet["target_modules"] = [*ATTENTIONS, "conv1", "proj_in", "ff.net.0.proj"]
    elif kind.startswith("other"):
        unet |= {"lora_alpha": 2, "alpha_pattern": {"to_q": 9, "^mid_block.*to_k": 1}, "rank_pattern": {"to_v": 5}}
    parts = with_peft(theirs, unet=unet, text=text)
    wanted = said_by_theirs(theirs, ours)
    assert all((a - b).abs().max() > 0.05 for a, b in zip(before, wanted, strict=True))
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, **parts)
    lora = ours.load_lora(tmp_path / "pytorch_lora_weights.safetensors")
    agree(said_by_ours(ours), wanted)
    lora.detach()
    agree(said_by_ours(ours), before)
    lora.merge()
    agree(said_by_ours(ours), wanted)


def test_a_lora_of_peft_under_kohyas_names_says_the_same(tmp_path):
    pytest.importorskip("peft")
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict

    theirs, ours = made_by_diffusers(tmp_path)
    with_peft(theirs, unet={"r": 3, "lora_alpha": 3, "target_modules": ATTENTIONS},
              text={"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "out_proj"]})
    wanted = said_by_theirs(theirs, ours)
    state = {f"{name}.{key}": tensor.contiguous() for name in ("unet", "text_encoder")
             for key, tensor in get_peft_model_state_dict(getattr(theirs, name)).items()}
    state = convert_state_dict_to_kohya(state)
    assert all(key.startswith(("lora_unet_", "lora_te1_")) for key in state)
    save_file(state, tmp_path / "kohya.safetensors")
    ours.load_lora(tmp_path / "kohya.safetensors")
    agree(said_by_ours(ours), wanted)


def test_a_lora_of_ours_says_the_same_in_diffusers(tmp_path):
    pytest.importorskip("peft")
    theirs, ours = made_by_diffusers(tmp_path)
    lora = LoRA(ours, rank=3, targets=r"to_(q|k|v|out\.0)$|q_proj$|fc1$|conv1$")
    torch.manual_seed(8)
    with torch.no_grad():
        for p in lora.parameters():
            p.normal_(std=0.3)
    lora.attach()
    lora.save(tmp_path / "ours.safetensors")
    before = said_by_theirs(theirs, ours)
    theirs.load_lora_weights(tmp_path, weight_name="ours.safetensors")
    found = said_by_theirs(theirs, ours)
    assert all((a - b).abs().max() > 0.05 for a, b in zip(before, found, strict=True))
    agree(said_by_ours(ours), found)


def test_learned_words_say_the_same(tmp_path):
    theirs, ours = made_by_diffusers(tmp_path)
    torch.manual_seed(1)
    cat, hats = torch.randn(16), torch.randn(2, 16)
    for token, vectors in (("<cat-toy>", cat[None]), ("<hat>", hats)):
        torch.save({token: vectors}, tmp_path / "learned.bin")
        theirs.load_textual_inversion(tmp_path, weight_name="learned.bin")
    for word, vector in (("<cat-toy>", cat), ("<hat>", hats[0]), ("<hat_1>", hats[1])):
        add_word(ours, word, vector)
    for asked, ours_says in (("a <cat-toy> here", "a <cat-toy> here"), ("red,<cat-toy>!", "red,<cat-toy>!"),
                             ("<hat> pizza", "<hat> <hat_1> pizza")):
        wanted = theirs.encode_prompt(asked, "cpu", 1, do_classifier_free_guidance=False)[0]
        torch.testing.assert_close(ours.encode_text([ours_says]), wanted, rtol=1e-4, atol=1e-5)


def test_controlnet_of_diffusers_says_the_same_and_back_again(tmp_path):
    torch.manual_seed(0)
    shape = {"block_out_channels": (16, 24), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 16,
             "attention_head_dim": 2, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    unet = diffusers.UNet2DConditionModel(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), sample_size=8, **shape)
    theirs = diffusers.ControlNetModel(conditioning_embedding_out_channels=(4, 8, 8, 8), **shape).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "control")
    unet.eval().save_pretrained(tmp_path / "unet")
    ours = Controlled(UNet.from_pretrained(tmp_path / "unet"), ControlNet.from_pretrained(tmp_path / "control"),
                      hint := torch.rand(2, 3, 64, 64), strength=0.8)
    x, t, context = torch.randn(4, 4, 8, 8), torch.tensor([7, 7, 300, 300]), torch.randn(4, 5, 16)
    with torch.no_grad():
        sides, middle = theirs(x, t, context, torch.cat([hint, hint]), conditioning_scale=0.8, return_dict=False)
        wanted = unet(x, t, context, down_block_additional_residuals=sides, mid_block_additional_residual=middle).sample
        plain = unet(x, t, context).sample
        found = ours(x, t, context)
    assert (wanted - plain).abs().max() > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    ours.control.save_pretrained(tmp_path / "back")
    again = diffusers.ControlNetModel.from_pretrained(tmp_path / "back")
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in theirs.state_dict().items())


def test_controlnet_of_stable_diffusion_has_the_names_and_shapes_of_diffusers():
    with torch.device("meta"):
        theirs = diffusers.ControlNetModel(cross_attention_dim=768)
        ours = ControlNet(ControlNetConfig(unet=UNetConfig.preset("sd15")))
    shapes = {name: tuple(p.shape) for name, p in theirs.state_dict().items()}
    assert {name: tuple(p.shape) for name, p in ours.state_dict().items()} == shapes
    assert ours.count_parameters() == 361_279_120 and len(shapes) == 340


@pytest.mark.filterwarnings("ignore")
def test_pictures_of_ours_go_in_as_pil(tmp_path):
    _, ours = made_by_diffusers(tmp_path)
    tensors = ours.img2img(pictures(1), "pizza", steps=4, output="tensor", progress=False)
    painted = ours.img2img(to_pil(pictures(1)), "pizza", steps=4, output="tensor", progress=False)
    assert (tensors - painted).abs().max() < 0.02
