"""Chapter 19 against diffusers' StableDiffusionPipeline: the same folder, the same picture, in both directions."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusionbook.autoencoders import VAE, VAEConfig
from diffusionbook.samplers import starting_noise
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.stable_diffusion import StableDiffusion
from diffusionbook.text import TextConfig, TextEncoder, train_bpe
from diffusionbook.unet import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

CAPTIONS = ["red heart, noto style", "pizza, twemoji style"]
SCHEDULES = {"cosine": NoiseSchedule.cosine(), "sd": NoiseSchedule.scaled_linear(),
             "no signal at the end": NoiseSchedule.scaled_linear().zero_terminal_snr()}
CASES = [("cosine", "v", "eos"), ("sd", "epsilon", "eos"), ("sd", "x0", "zero"), ("no signal at the end", "v", "zero")]


def randomise(*networks):
    torch.manual_seed(0)
    with torch.no_grad():
        for network in networks:
            for p in network.parameters():
                p.add_(0.1 * torch.randn_like(p))


def pipeline(schedule="cosine", prediction="v", pad="eos"):
    tokenizer = train_bpe(CAPTIONS, 530, context_length=12, pad=pad)
    text_encoder = TextEncoder(TextConfig(vocab_size=530, context_length=12, width=16, layers=2, heads=2,
                                          pad_id=tokenizer.pad_id)).eval()
    unet = UNet(UNetConfig(channels=(16, 24), attention=("cross", "cross"), heads=(2, 2), context_width=16,
                           layers_per_block=1, groups=8, sample_size=8)).eval()
    vae = VAE(VAEConfig(channels=(8, 8, 16, 16), layers_per_block=1, groups=4, scaling_factor=0.7,
                        sample_size=64)).eval()
    randomise(text_encoder, unet, vae)
    return StableDiffusion(vae=vae, unet=unet, text_encoder=text_encoder, tokenizer=tokenizer,
                           schedule=SCHEDULES[schedule], prediction=prediction)


def theirs_paints(reference, captions=CAPTIONS, **options):
    reference.set_progress_bar_config(disable=True)
    latents = starting_noise((len(captions), 4, 8, 8), seed=3)
    options = {"num_inference_steps": 10, "guidance_scale": 5.0, "height": 64, "width": 64} | options
    if reference.scheduler.config.get("rescale_betas_zero_snr"):
        options["guidance_rescale"] = 0.7  # what we do by default there
    return reference(captions, latents=latents, output_type="pt", **options).images * 2 - 1


def ours_paints(pipeline, captions=CAPTIONS, **options):
    return pipeline(captions, seed=3, output="tensor", progress=False,
                    **{"steps": 10, "sampler": "ddim", "guidance": 5.0} | options)


def assert_same_pictures(ours, theirs):
    assert ours.std() > 0.05 and (ours[0] - ours[1]).abs().mean() > 0.01
    assert (ours - theirs).abs().max() <= 2 / 127.5


@pytest.mark.parametrize("schedule, prediction, pad", CASES)
def test_diffusers_opens_ours_and_paints_the_same(tmp_path, schedule, prediction, pad):
    ours = pipeline(schedule, prediction, pad)
    ours.save_pretrained(tmp_path)
    reference = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(reference.scheduler).__name__ == "DDIMScheduler"
    ids = reference.tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, ours.tokenizer(CAPTIONS))
    assert_same_pictures(ours_paints(ours), theirs_paints(reference))


def test_guidance_and_negative_captions_mean_the_same(tmp_path):
    ours = pipeline()
    ours.save_pretrained(tmp_path)
    reference = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    for guidance in (1.0, 2.0):
        assert_same_pictures(ours_paints(ours, guidance=guidance), theirs_paints(reference, guidance_scale=guidance))
    plain = ours_paints(ours)
    ours_negative = ours_paints(ours, negative="pizza")
    assert (ours_negative - plain).abs().mean() > 0.001
    assert_same_pictures(ours_negative, theirs_paints(reference, negative_prompt=["pizza"] * 2))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_dpmpp_paints_the_same(tmp_path):
    ours = pipeline("sd", "epsilon")
    ours.save_pretrained(tmp_path)
    reference = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    reference.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        reference.scheduler.config, algorithm_type="dpmsolver++", final_sigmas_type="zero")
    assert_same_pictures(ours_paints(ours, sampler="dpmpp_2m", steps=12),
                         theirs_paints(reference, num_inference_steps=12))


@pytest.fixture
def public(tmp_path):
    """A folder as diffusers writes it, and the pipeline that it came from."""
    ours = pipeline("sd", "epsilon")
    ours.save_pretrained(tmp_path / "ours")
    reference = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "public", safe_serialization=True)
    return tmp_path / "public", reference


def test_we_open_what_diffusers_saved(public):
    folder, reference = public
    assert not list(folder.rglob("SHA256SUMS"))
    again = StableDiffusion.from_pretrained(folder)
    assert again.prediction == "epsilon"
    assert torch.equal(again.schedule.betas, SCHEDULES["sd"].betas)
    assert_same_pictures(ours_paints(again), theirs_paints(reference))


def test_we_open_text_encoders_with_the_old_prefix(public):
    folder, reference = public
    path = folder / "text_encoder/model.safetensors"
    state = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in load_file(path).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    save_file(state, path, metadata={"format": "pt"})
    assert_same_pictures(ours_paints(StableDiffusion.from_pretrained(folder)), theirs_paints(reference))


def test_we_open_schedulers_as_public_checkpoints_have_them(public):
    """Stable Diffusion 1 comes with PNDM and leading timesteps; its noise schedule is what counts here."""
    folder, reference = public
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
        "clip_sample": False}))
    assert_same_pictures(ours_paints(StableDiffusion.from_pretrained(folder)), theirs_paints(reference))


# Tiny pipelines that diffusers made: Stable Diffusion 1 and 2 in every respect but size

VERSIONS = {
    1: {"unet": {"attention_head_dim": 4}, "text": {"hidden_act": "quick_gelu"}, "pad": "eos",
        "scheduler": {"prediction_type": "epsilon"}},
    2: {"unet": {"attention_head_dim": [2, 4], "use_linear_projection": True, "upcast_attention": True},
        "text": {"hidden_act": "gelu"}, "pad": "zero", "scheduler": {"prediction_type": "v_prediction"}},
    "2 without signal at the end": {
        "unet": {"attention_head_dim": [2, 4], "use_linear_projection": True}, "text": {"hidden_act": "gelu"},
        "pad": "zero", "scheduler": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}},
}


def made_by_diffusers(folder, version, *, in_channels=4):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    made, sizes = VERSIONS[version], {"vocab_size": 530, "max_position_embeddings": 12}
    torch.manual_seed(0)
    tokenizer = train_bpe(CAPTIONS, 530, context_length=12, pad=made["pad"])
    tokenizer.save_pretrained(folder / "ours")
    text = CLIPTextModel(CLIPTextConfig(hidden_size=16, intermediate_size=64, num_hidden_layers=3, eos_token_id=529,
                                        bos_token_id=528, num_attention_heads=2, **sizes, **made["text"])).eval()
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 24), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), sample_size=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=16, in_channels=in_channels, **made["unet"]).eval()
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, scaling_factor=0.7, sample_size=64).eval()
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        timestep_spacing="trailing", steps_offset=1, **made["scheduler"])
    randomise(unet, text)
    kind = diffusers.StableDiffusionInpaintPipeline if in_channels == 9 else diffusers.StableDiffusionPipeline
    reference = kind(vae=vae, unet=unet, text_encoder=text, tokenizer=CLIPTokenizer.from_pretrained(folder / "ours"),
                     scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    reference.save_pretrained(folder / "theirs")
    return reference


def assert_same_latents(ours, reference, captions=CAPTIONS, **options):
    states = []
    ours_paints(ours, captions, on_step=lambda i, x, answer: states.append(x), **options)
    theirs = theirs_latents(reference, captions)
    assert (states[-1] - theirs).abs().max() <= 1e-4 * max(1, theirs.abs().max())


def theirs_latents(reference, captions):
    options = {"guidance_rescale": 0.7} if reference.scheduler.config.rescale_betas_zero_snr else {}
    return reference(captions, latents=starting_noise((len(captions), 4, 8, 8), seed=3), output_type="latent",
                     num_inference_steps=10, guidance_scale=5.0, height=64, width=64, **options).images


@pytest.mark.parametrize("version", VERSIONS)
def test_what_diffusers_made_paints_the_same_and_back_again(tmp_path, version):
    reference = made_by_diffusers(tmp_path, version)
    ours = StableDiffusion.from_pretrained(tmp_path / "theirs")
    assert_same_pictures(ours_paints(ours), theirs_paints(reference))
    assert_same_latents(ours, reference)
    ours.save_pretrained(tmp_path / "back")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "back")
    assert torch.equal(theirs_paints(again), theirs_paints(reference))


def test_skipping_the_last_blocks_means_the_same(tmp_path):
    reference = made_by_diffusers(tmp_path, 1).text_encoder
    ours = StableDiffusion.from_pretrained(tmp_path / "theirs")
    states = reference(ours.tokenizer(CAPTIONS), output_hidden_states=True).hidden_states
    wanted = reference.final_layer_norm(states[-2])
    assert torch.allclose(ours.encode_text(CAPTIONS, clip_skip=1), wanted, atol=1e-5)
    assert (ours.encode_text(CAPTIONS) - wanted).abs().mean() > 0.01


@pytest.mark.parametrize("options", [{}, {"variant": "fp16"}, {"safe_serialization": False}], ids=str)
def test_sharded_weights_paint_the_same(tmp_path, options):
    reference = made_by_diffusers(tmp_path, 1)
    reference.save_pretrained(tmp_path / "shards", max_shard_size="100KB", **options)
    assert len([path for path in (tmp_path / "shards/unet").iterdir() if "-of-" in path.name]) > 1
    assert_same_pictures(ours_paints(StableDiffusion.from_pretrained(tmp_path / "shards")), theirs_paints(reference))


@pytest.mark.filterwarnings("ignore")
def test_diffusers_opens_the_miniature_and_paints_the_same(tmp_path):
    ours = StableDiffusion.from_pretrained("emoji")
    ours.save_pretrained(tmp_path)
    reference = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert_same_pictures(ours_paints(ours), theirs_paints(reference))
