"""Chapter 19 against diffusers' StableDiffusionPipeline: the same folder, the same picture, in both directions."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusionbook.autoencoders import VAE, VAEConfig
from diffusionbook.checkpoints import locate
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


@pytest.mark.filterwarnings("ignore")
def test_diffusers_opens_the_miniature_and_paints_the_same():
    reference = diffusers.StableDiffusionPipeline.from_pretrained(locate("emoji"), torch_dtype=torch.float32)
    ours = StableDiffusion.from_pretrained("emoji")
    assert_same_pictures(ours_paints(ours), theirs_paints(reference))
