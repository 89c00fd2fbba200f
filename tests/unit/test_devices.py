"""Every network and every sampler on another device: `meta` finds stray CPU tensors, CUDA compares pictures."""

import numpy as np
import pytest
import torch

from diffusionbook.autoencoders import VAE, TinyVAE, VAEConfig
from diffusionbook.clip import CLIP, contrastive_loss
from diffusionbook.dalle import DalleTransformer, sample_codes
from diffusionbook.denoising import Condition, Denoiser, classifier_free, diffusion_loss
from diffusionbook.dvae import DVAE, VQ, gumbel_noise
from diffusionbook.editing import Controlled, ControlNet
from diffusionbook.glide import GlideText, GlideTextConfig, NoisyImageEncoder, clip_guidance, keep_known
from diffusionbook.samplers import SAMPLERS, sample, timesteps
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.stable_diffusion import StableDiffusion
from diffusionbook.text import TextConfig, TextEncoder
from diffusionbook.unet import UNet, UNetConfig

UNETS = ["sd15", "sd15-inpaint", "sd21", "ddpm-cifar10", "emoji-latent", "emoji-upsampler"]
META = torch.device("meta")


def on_meta(kind, preset):
    with META:
        return kind(kind.config_class.preset(preset))


def unet_inputs(config, batch=2):
    side = config.sample_size
    context = torch.empty(batch, 7, config.context_width, device=META) if config.context_width else None
    return torch.empty(batch, config.in_channels, side, side, device=META), context


@pytest.mark.parametrize("preset", UNETS)
def test_unet(preset):
    model = on_meta(UNet, preset)
    x, context = unet_inputs(model.config)
    out = model(x, torch.empty(2, dtype=torch.int64, device=META), context)
    assert out.device == META and out.shape == (2, model.config.out_channels, *x.shape[2:])


@pytest.mark.parametrize("preset", ["sd15", "sd21"])
def test_controlnet(preset):
    unet = on_meta(UNet, preset)
    with META:
        control = ControlNet.beside(unet)
    x, context = unet_inputs(unet.config)
    side = 8 * unet.config.sample_size
    network = Controlled(unet, control, torch.empty(1, 3, side, side, device=META))  # one hint for two with guidance
    assert network(x, torch.empty(2, dtype=torch.int64, device=META), context).shape == x.shape


def test_a_tower_that_knows_noise():
    tower = on_meta(NoisyImageEncoder, "emoji")
    found = tower(torch.empty(2, 3, 16, 16, device=META), torch.empty(2, dtype=torch.int64, device=META))
    assert found.device == META and found.shape == (2, 192)


@pytest.mark.parametrize("preset", ["sd", "emoji"])
def test_vae(preset):
    model = on_meta(VAE, preset)
    side = model.config.sample_size
    images = torch.empty(2, 3, side, side, device=META)
    cloud = model.encode(images)
    assert cloud.sample(torch.Generator()).device == cloud.kl().device == META
    assert cloud.mean.shape == (2, 4, side // 8, side // 8)
    restored, _ = model(images, torch.empty_like(cloud.mean))
    assert restored.shape == images.shape and restored.device == META
    assert model.decode(model.encode(images, tile=side // 2).mean, tile=side // 2).device == META


def test_tiny_vae():
    model = on_meta(TinyVAE, "taesd")
    z = model.encode(torch.empty(2, 3, 64, 64, device=META))
    assert z.shape == (2, 4, 8, 8) and model.decode(z).shape == (2, 3, 64, 64) and model.decode(z).device == META


@pytest.mark.parametrize("preset", ["openai", "emoji"])
@pytest.mark.parametrize("kind", [DVAE, VQ])
def test_discrete_autoencoders(kind, preset):
    model = on_meta(kind, preset).eval()
    side = model.config.sample_size
    images, places = torch.empty(1, 3, side, side, device=META), side // model.factor
    codes = model.encode(images)
    assert codes.device == META and codes.shape == (1, places, places)
    assert model.decode(codes).device == META and model.decode(codes).shape == images.shape
    noise = (gumbel_noise((1, model.config.codes, places, places)),) if kind is DVAE else ()
    output, other = model(images, *noise, **({"temperature": 1.0} if kind is DVAE else {}))
    assert output.device == other.device == META and output.shape == (1, 6, side, side)


@pytest.mark.parametrize("preset", ["dalle", "emoji"])
def test_dalle(preset):
    model = on_meta(DalleTransformer, preset)
    c = model.config
    ids = torch.empty(2, c.text_length, dtype=torch.int64, device=META)
    codes = torch.empty(2, c.places, dtype=torch.int64, device=META)
    value, _ = model.loss(ids, codes)
    assert value.device == META
    written = sample_codes(model, ids, start=codes[:, :-3], unconditional=ids[:1], guidance=2.0, top_k=9, top_p=0.9,
                           progress=False)
    assert written.device == META and written.shape == codes.shape


@pytest.mark.parametrize("preset", ["sd15", "sd21", "emoji"])
def test_text_encoder(preset):
    model = on_meta(TextEncoder, preset)
    ids = torch.empty(2, model.config.context_length, dtype=torch.int64, device=META)
    hidden = model(ids)
    assert hidden.device == META and hidden.shape == (*ids.shape, model.config.width)
    assert model.pooled(hidden, ids).device == META


@pytest.mark.parametrize("preset", ["vit-l-14", "emoji"])
def test_clip(preset):
    model = on_meta(CLIP, preset)
    c = model.config
    images = torch.empty(2, 3, c.vision.image_size, c.vision.image_size, device=META)
    ids = torch.empty(2, c.text.context_length, dtype=torch.int64, device=META)
    image = model.encode_image(images, torch.empty(2, 5, dtype=torch.int64, device=META))
    states, text = model.text_states(ids)
    assert image.shape == text.shape == (2, c.projection) and states.shape == (*ids.shape, c.text.width)
    loss = contrastive_loss(image, model.encode_text(ids), model.logit_scale,
                            right=torch.empty(2, 2, dtype=torch.bool, device=META))
    assert loss.device == image.device == text.device == states.device == META


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_step_with_guidance(sampler, prediction):
    model = on_meta(UNet, "emoji-latent")
    x, context = unet_inputs(model.config)
    denoise = classifier_free(Denoiser(model, NoiseSchedule.cosine(), prediction, Condition(context=context)),
                              Condition(context=torch.empty_like(context)), scale=5.0)
    states = list(SAMPLERS[sampler](denoise, x, timesteps(denoise.schedule, 4)))
    assert len(states) == 4
    for state, answer in states:
        assert state.device == answer.x0.device == answer.eps.device == META and state.shape == x.shape
    whole = sample(denoise, x.shape, sampler=sampler, steps=3, device=META, progress=False)
    assert whole.device == META and whole.shape == x.shape


def test_every_part_of_a_condition():
    model = on_meta(UNet, "sd15-inpaint")
    x = torch.empty(1, 4, 8, 8, device=META)
    condition = Condition(context=torch.empty(1, 7, 768, device=META), embedding=torch.empty(1, 1280, device=META),
                          concat=torch.empty(1, 5, 8, 8, device=META))
    denoise = Denoiser(model, NoiseSchedule.scaled_linear(), condition=condition)
    answer = classifier_free(denoise, condition, scale=7)(x, 3)
    assert answer.x0.device == META and answer.x0.shape == x.shape


def test_glide_with_guidance_by_gradient():
    with META:
        text, unet = GlideText(GlideTextConfig()), UNet(UNetConfig.preset("glide"))
    condition = text(torch.empty(1, 128, dtype=torch.int64, device=META), torch.empty(1, 128, dtype=bool, device=META))
    denoise = Denoiser(unet, NoiseSchedule.cosine(), condition=condition)
    wanted = torch.empty(1, 3, device=META)
    guided = clip_guidance(denoise, lambda x, t: x.mean((2, 3)), wanted, scale=3.0)
    x, mask = torch.empty(1, 3, 64, 64, device=META), torch.empty(1, 1, 64, 64, dtype=bool, device=META)
    assert keep_known(guided, x, mask)(x, 3).x0.device == META


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_a_training_step(prediction):
    model = on_meta(UNet, "emoji-latent")
    x, context = unet_inputs(model.config)
    t = torch.empty(2, dtype=torch.int64, device=META)
    loss = diffusion_loss(model, x, torch.empty_like(x), t, schedule=NoiseSchedule.cosine(), prediction=prediction,
                          context=context).mean()
    loss.backward()
    assert loss.device == META and all(p.grad.device == META for p in model.parameters())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_whole_pipeline(tiny, sampler):
    with META:
        unet, vae, text_encoder = (type(part)(part.config) for part in (tiny.unet, tiny.vae, tiny.text_encoder))
    pipeline = StableDiffusion(vae=vae, unet=unet, text_encoder=text_encoder, tokenizer=tiny.tokenizer,
                               schedule=tiny.schedule, prediction="v")
    images = pipeline(["red heart", "pizza"], n=2, steps=3, sampler=sampler, output="tensor", progress=False)
    assert images.device == META and images.shape == (4, 3, 64, 64)


# On a GPU


@pytest.fixture
def exact():
    """Full float32 in convolutions and products, so that pictures can be compared."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def both_devices(painter, *args, **options):
    pictures = []
    for device in ("cpu", "cuda"):
        painter.to(device)
        pictures.append(np.stack([np.asarray(p) for p in painter(*args, progress=False, **options)]).astype(int))
    painter.to("cpu")
    return pictures


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_cuda_paints_the_picture_of_the_cpu(tiny, exact, sampler):
    cpu, cuda = both_devices(tiny, ["red heart, noto style", "pizza"], n=2, steps=10, sampler=sampler)
    assert cpu.std() > 5 and abs(cpu - cuda).max() <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_cuda_paints_the_emoji_of_the_cpu(exact, sampler):
    painter = StableDiffusion.from_pretrained("emoji")
    cpu, cuda = both_devices(painter, ["red heart, noto style", "pizza, 3d style"], steps=20, sampler=sampler)
    assert abs(cpu - cuda).max() <= 2


@pytest.mark.gpu
def test_cuda_with_little_memory_paints_the_emoji_of_the_cpu(exact):
    painter = StableDiffusion.from_pretrained("emoji", memory="low")
    cpu, cuda = both_devices(painter, ["red heart, noto style"], steps=10)
    assert abs(cpu - cuda).max() <= 2
    assert all(p.device.type == "cpu" for p in painter.unet.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_cuda_is_close(tiny, tmp_path, dtype):
    tiny.save_pretrained(tmp_path)
    low = StableDiffusion.from_pretrained(tmp_path, dtype=dtype).to("cuda")
    images = low("red heart", steps=10, output="tensor", progress=False).cpu()
    assert (images - tiny("red heart", steps=10, output="tensor", progress=False)).abs().mean() < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("config", [
    UNetConfig(channels=(32, 64), attention=("cross", None), heads=(4, 4), context_width=24, groups=8),
    UNetConfig(channels=(32, 64), attention=(None, "self"), heads=(1, 1), context_width=None, groups=8, down_padding=0),
])
def test_cuda_networks_answer_and_learn_as_on_the_cpu(exact, config):
    torch.manual_seed(0)
    model = UNet(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
    context = torch.randn(2, 5, 24) if config.context_width else None
    found = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        out = model(x.to(device), t.to(device), None if context is None else context.to(device))
        out.square().mean().backward()
        found.append((out.detach().cpu(), model.conv_in.weight.grad.cpu().clone()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_cuda_vae_encodes_and_decodes_as_the_cpu(exact):
    torch.manual_seed(0)
    model = VAE(VAEConfig(channels=(16, 32), groups=8, layers_per_block=1)).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        cpu = model.decode(model.encode(images).sample(torch.Generator().manual_seed(1)))
        model.to("cuda")
        cuda = model.decode(model.encode(images.cuda()).sample(torch.Generator().manual_seed(1))).cpu()
    torch.testing.assert_close(cuda, cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_cuda_text_encoder_reads_as_the_cpu(exact):
    torch.manual_seed(0)
    model = TextEncoder(TextConfig(vocab_size=600, context_length=12, width=32, layers=2, heads=4)).eval()
    ids = torch.randint(0, 600, (3, 12))
    with torch.no_grad():
        cpu = model(ids)
        cuda = model.to("cuda")(ids.cuda()).cpu()
    torch.testing.assert_close(cuda, cpu, rtol=1e-3, atol=1e-3)
