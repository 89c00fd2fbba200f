"""Chapter 18 against diffusers: a tiny Karlo, stage by stage and whole, and the names in Karlo's own files."""

import json

import pytest
import torch
import torch.nn.functional as F

from diffusionbook.checkpoints import check_keys, from_guided_diffusion, rename, to_guided_diffusion
from diffusionbook.dalle2 import (
    DECODER,
    UPSAMPLER,
    DallE2,
    TextProjection,
    TextProjectionConfig,
    karlo_parts,
)
from diffusionbook.denoising import Denoiser
from diffusionbook.prior import DiffusionPrior, PriorConfig
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.text import train_bpe
from diffusionbook.unet import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
unclip = pytest.importorskip("diffusers.pipelines.deprecated.unclip.text_proj")
pipelines = pytest.importorskip("diffusers.pipelines.deprecated.unclip.pipeline_unclip")

CAPTIONS = ["red heart", "pizza"]
SIZE, WORDS = 12, 10
DECODER_CONFIG = {
    "attention_head_dim": 8, "block_out_channels": [16, 32], "class_embed_type": "identity", "cross_attention_dim": 24,
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"], "in_channels": 3, "out_channels": 6,
    "layers_per_block": 1, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "norm_num_groups": 8, "sample_size": 8,
    "resnet_time_scale_shift": "scale_shift", "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"]}
UPSAMPLER_CONFIG = {
    "add_attention": False, "block_out_channels": [16, 32], "down_block_types": ["ResnetDownsampleBlock2D"] * 2,
    "in_channels": 6, "layers_per_block": 1, "norm_num_groups": 8, "out_channels": 3, "sample_size": 16,
    "up_block_types": ["ResnetUpsampleBlock2D"] * 2}
PRIOR_CONFIG = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "embedding_dim": SIZE,
                "num_embeddings": WORDS}


def randomise(model, amount=0.1):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(amount * torch.randn_like(p))
    return model.eval()


def scheduler(**options):
    """diffusers' scheduler with its tables in float64: in float32, 1 - alpha_bar at t = 0 is off by a thousandth."""
    made, exact = diffusers.UnCLIPScheduler(**options), NoiseSchedule.cosine()
    made.betas, made.alphas, made.alphas_cumprod = exact.betas, exact.alphas, exact.alpha_bar
    return made


@pytest.fixture(scope="module")
def karlo():
    """The parts of a tiny Karlo, as diffusers and transformers build them."""
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=520, hidden_size=SIZE, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=WORDS, projection_dim=SIZE, bos_token_id=518, eos_token_id=519, pad_token_id=0)
    prior = randomise(diffusers.PriorTransformer(**PRIOR_CONFIG), 0.2)
    prior.clip_std.data.abs_()
    return {
        "prior": prior,
        "decoder": randomise(diffusers.UNet2DConditionModel(**DECODER_CONFIG)),
        "text_proj": randomise(unclip.UnCLIPTextProjModel(clip_embeddings_dim=SIZE, time_embed_dim=64,
                                                          cross_attention_dim=24), 0.3),
        "text_encoder": randomise(transformers.CLIPTextModelWithProjection(text)),
        "super_res_first": randomise(diffusers.UNet2DModel(**UPSAMPLER_CONFIG)),
        "super_res_last": randomise(diffusers.UNet2DModel(**UPSAMPLER_CONFIG)),
        "prior_scheduler": scheduler(clip_sample_range=5.0, prediction_type="sample"),
        "decoder_scheduler": scheduler(variance_type="learned_range"),
        "super_res_scheduler": scheduler(),
    }


@pytest.fixture(scope="module")
def folder(karlo, tmp_path_factory):
    """The same on disk, as a public folder has it."""
    folder = tmp_path_factory.mktemp("karlo")
    for name, part in karlo.items():
        part.save_pretrained(folder / name)
    train_bpe(CAPTIONS, 520, context_length=WORDS).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return DallE2.from_pretrained(folder)


def generators(seed, count):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def noise(like, made):
    return torch.cat([torch.randn(1, *like, generator=g) for g in made])


@torch.no_grad()
def loop(scheduler, steps, x, made, network):
    """The public loop: the network's answer, guided already, goes to the scheduler."""
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    for t, then in zip(times, [*times[1:], None], strict=True):
        x = scheduler.step(network(x, t, then is None), t, x, prev_timestep=then, generator=made).prev_sample.float()
    return x


@torch.no_grad()
def texts(karlo, tokenizer, captions):
    ids = tokenizer(captions)
    out = karlo["text_encoder"](ids)
    length = (ids == tokenizer.eos_id).int().argmax(1, keepdim=True)
    return out.text_embeds, out.last_hidden_state, torch.arange(ids.shape[1])[None] <= length


# Sizes and names


def test_the_text_projection_has_the_public_names_shapes_and_size():
    with torch.device("meta"):
        ours = TextProjection(TextProjectionConfig.preset("karlo"))
        theirs = unclip.UnCLIPTextProjModel(time_embed_dim=1280, cross_attention_dim=1536)
    found, wanted = ({key: tensor.shape for key, tensor in model.state_dict().items()} for model in (ours, theirs))
    assert found == wanted and len(found) == 11 and ours.count_parameters() == 7_878_400
    assert TextProjectionConfig.preset("karlo").to_config().items() <= json.loads(theirs.to_json_string()).items()


def test_the_text_projection_answers_alike(karlo, ours):
    embedding, states, mask = texts(karlo, ours.tokenizer, CAPTIONS)
    image = torch.randn(2, SIZE)
    told = ours.read(CAPTIONS)
    torch.testing.assert_close(told.embedding, embedding, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(told.context, states, rtol=1e-4, atol=1e-5)
    assert torch.equal(told.mask, mask) and not mask.all()
    for given, guided in ((image, False), (image[:1], True)):
        count = len(given)
        context, time = karlo["text_proj"](
            image_embeddings=given, prompt_embeds=embedding, text_encoder_hidden_states=states,
            do_classifier_free_guidance=guided)
        with torch.no_grad():
            rows = ours.text_projection(torch.cat([karlo["text_proj"].learned_classifier_free_guidance_embeddings[None],
                                                   given]) if guided else given, told)
        assert context.shape == (2, 4 + WORDS, 24) and count in (1, 2)
        torch.testing.assert_close(rows.context, context, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rows.embedding, time, rtol=1e-4, atol=1e-5)
        assert rows.mask[:, :4].all() and torch.equal(rows.mask[:, 4:], mask)


# Stage by stage


def test_the_prior_draws_alike(karlo, ours):
    asked, empty = texts(karlo, ours.tokenizer, CAPTIONS), texts(karlo, ours.tokenizer, ["", ""])
    embedding, states, mask = (torch.cat(pair) for pair in zip(empty, asked, strict=True))

    def guided(x, t, last):
        without, told = karlo["prior"](torch.cat([x, x]), t, embedding, states, mask).predicted_image_embedding.chunk(2)
        return without + 4 * (told - without)

    made = generators(5, 2)
    x = loop(karlo["prior_scheduler"], 25, noise((SIZE,), made), made, guided)
    expected = karlo["prior"].post_process_latents(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.imagine(CAPTIONS, candidates=1, seed=5), expected, rtol=1e-4, atol=1e-4)


def test_the_decoder_paints_alike(karlo, ours):
    """Learned variance from the conditional half, the null embedding, the empty caption, the padded mask."""
    asked, empty = texts(karlo, ours.tokenizer, CAPTIONS), texts(karlo, ours.tokenizer, ["", ""])
    embedding, states, mask = (torch.cat(pair) for pair in zip(empty, asked, strict=True))
    image = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        context, time = karlo["text_proj"](image_embeddings=image, prompt_embeds=embedding,
                                           text_encoder_hidden_states=states, do_classifier_free_guidance=True)
    mask = F.pad(mask, (4, 0), value=True)

    def guided(x, t, last):
        out = karlo["decoder"](torch.cat([x, x]), t, context, class_labels=time, attention_mask=mask).sample
        without, told = out.chunk(2)
        eps = without[:, :3] + 8 * (told[:, :3] - without[:, :3])
        return torch.cat([eps, told[:, 3:]], dim=1)

    made = generators(5 + DECODER, 2)
    small = loop(karlo["decoder_scheduler"], 25, noise((3, 8, 8), made), made, guided).clamp(-1, 1)
    alone = DallE2(text_encoder=ours.text_encoder, tokenizer=ours.tokenizer, prior=ours.prior, decoder=ours.decoder,
                   text_projection=ours.text_projection)
    found = alone.paint(image, CAPTIONS, guidance=8.0, seed=5)
    assert small.std() > 0.1
    # the first step divides by alpha = 5e-5, guidance multiplies by 8: a few numbers feel float32's rounding more
    difference = (found - small).abs()
    assert difference.mean() < 2e-5 and difference.quantile(0.98) < 1e-4 and difference.max() < 1e-3


@pytest.mark.parametrize("steps", [7, 4])
def test_the_upsamplers_paint_alike(karlo, ours, steps):
    small = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    large = F.interpolate(small, [16, 16], mode="bicubic", align_corners=False, antialias=True)
    asked = []

    def network(x, t, last):
        asked.append("super_res_last" if last else "super_res_first")
        return karlo[asked[-1]](torch.cat([x, large], dim=1), t).sample

    made = generators(5 + UPSAMPLER, 2)
    expected = loop(karlo["super_res_scheduler"], steps, noise((3, 16, 16), made), made, network).clamp(-1, 1)
    assert asked == ["super_res_first"] * (steps - 1) + ["super_res_last"]
    found = ours.enlarge(small, steps=steps, seed=5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # the finisher made a difference
        ours_without = DallE2(text_encoder=ours.text_encoder, tokenizer=ours.tokenizer, prior=ours.prior,
                              decoder=ours.decoder, text_projection=ours.text_projection, upsampler=ours.upsampler)
        assert (ours_without.enlarge(small, steps=steps, seed=5) - found).abs().max() > 0.01


# The whole


class Source:
    """diffusers' pipeline draws from one generator per picture; ours has one for each stage. This changes them over."""

    def __init__(self, monkeypatch, seed, count):
        real = pipelines.randn_tensor
        stages = {(SIZE,): seed, (3, 8, 8): seed + DECODER, (3, 16, 16): seed + UPSAMPLER}
        made = {shape: generators(start, count) for shape, start in stages.items()}
        for module in (pipelines, diffusers.schedulers.scheduling_unclip):
            monkeypatch.setattr(module, "randn_tensor", lambda shape, **options: real(
                shape, **options | {"generator": made[tuple(shape[1:])]}))


def test_the_public_pipeline_paints_the_same_picture(karlo, ours, folder, monkeypatch):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    reference = pipelines.UnCLIPPipeline(tokenizer=tokenizer, **karlo)
    reference.set_progress_bar_config(disable=True)
    Source(monkeypatch, 11, 2)
    expected = torch.from_numpy(reference(CAPTIONS, decoder_num_inference_steps=10, prior_num_inference_steps=10,
                                          output_type="np").images).permute(0, 3, 1, 2) * 2 - 1
    found = ours(CAPTIONS, steps=10, prior_steps=10, guidance=8.0, candidates=1, seed=11, output="tensor",
                 progress=False)
    assert found.std() > 0.1 and (found[0] - found[1]).abs().mean() > 0.01
    assert (found - expected).abs().max() < 1e-3


def test_ours_saved_is_opened_by_diffusers(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    kinds = {"prior": diffusers.PriorTransformer, "decoder": diffusers.UNet2DConditionModel,
             "text_proj": unclip.UnCLIPTextProjModel, "super_res_first": diffusers.UNet2DModel,
             "super_res_last": diffusers.UNet2DModel}
    for name, kind in kinds.items():
        _, report = kind.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path / "text_encoder")
    for name, want in {"prior_scheduler": ("sample", "fixed_small_log", 5.0),
                       "decoder_scheduler": ("epsilon", "learned_range", 1.0),
                       "super_res_scheduler": ("epsilon", "fixed_small_log", 1.0)}.items():
        config = diffusers.UnCLIPScheduler.from_pretrained(tmp_path / name).config
        assert (config.prediction_type, config.variance_type, config.clip_sample_range) == want
    again = DallE2.from_pretrained(tmp_path)
    options = {"steps": 3, "prior_steps": 3, "output": "tensor", "progress": False}
    assert (again(CAPTIONS, **options) - ours(CAPTIONS, **options)).abs().max() < 2 / 255


# Karlo's own files


def karlo_names(networks):
    """Decoder and upsampler files as Karlo has them, made from our networks."""
    _, projection, decoder, first, last = networks
    names = {"text_seq_proj.0": "encoder_hidden_states_proj", "text_seq_proj.1": "text_encoder_hidden_states_norm",
             "clip_tok_proj": "clip_extra_context_tokens_proj", "text_feat_proj": "embedding_proj",
             "clip_emb": "clip_image_embeddings_project_to_time_embeddings"}
    state = projection.state_dict()
    text = {f"model.{theirs}.{end}": state[f"{ours}.{end}"] for theirs, ours in names.items()
            for end in ("weight", "bias")}
    text["model.cf_param"] = state["learned_classifier_free_guidance_embeddings"]
    unet = to_guided_diffusion(decoder.state_dict(), head_width=decoder.config.head_width())
    both = (("model_first_steps", first), ("model_last_step", last))
    upsamplers = {f"{prefix}.{key}": tensor for prefix, network in both
                  for key, tensor in to_guided_diffusion(network.state_dict(), head_width=None).items()}
    return text | {f"model.{key}": tensor for key, tensor in unet.items()}, upsamplers


def copies(ours):
    parts = (ours.prior.network, ours.text_projection, ours.decoder.network, ours.upsampler.network, ours.finisher)
    return [type(part)(part.config) for part in parts], parts


def test_karlos_own_files_give_the_same_networks(ours):
    fresh, parts = copies(ours)
    decoder, upsamplers = karlo_names(parts)
    loaded = karlo_parts(fresh, prior=parts[0].state_dict(), decoder=decoder, upsamplers=upsamplers)
    found = (loaded["prior"].network, loaded["text_projection"], loaded["decoder"].network,
             loaded["upsampler"].network, loaded["finisher"])
    for network, wanted in zip(found, parts, strict=True):
        assert all(torch.equal(tensor, wanted.state_dict()[key]) for key, tensor in network.state_dict().items())
    assert (loaded["prior"].prediction, loaded["decoder"].prediction) == ("x0", "epsilon")
    with pytest.raises(ValueError, match="keys"):
        karlo_parts(copies(ours)[0], prior=parts[0].state_dict(), decoder=decoder | {"model.more": torch.ones(1)},
                    upsamplers=upsamplers)


def test_karlos_names_for_the_public_sizes():
    """Every tensor of the public files finds its place by name and shape, without the weights themselves."""
    with torch.device("meta"):
        networks = [DiffusionPrior(PriorConfig.preset("karlo")), TextProjection(TextProjectionConfig.preset("karlo")),
                    *(UNet(UNetConfig.preset(f"dalle2-{part}")) for part in ("decoder", "upsampler", "upsampler"))]
    total = sum(network.count_parameters() for network in networks)
    assert total == 1_022_030_080 + 7_878_400 + 885_439_686 + 2 * 691_579_523
    decoder, upsamplers = karlo_names(networks)
    decoder = {key.removeprefix("model."): tensor for key, tensor in decoder.items()}
    text = {key: tensor for key, tensor in decoder.items() if key.startswith(("text_", "clip_", "cf_"))}
    unet = {key: tensor for key, tensor in decoder.items() if key not in text}
    check_keys(networks[1].state_dict(), rename(text, TextProjection.dialects))
    for state, network, width in ((unet, networks[2], 64),
                                  ({key.removeprefix("model_last_step."): tensor for key, tensor in upsamplers.items()
                                    if key.startswith("model_last_step.")}, networks[4], None)):
        own = network.state_dict()
        mapped = from_guided_diffusion(state, own, head_width=width)
        assert {key: tensor.shape for key, tensor in mapped.items()} == {key: t.shape for key, t in own.items()}


def test_a_denoiser_of_each_part_is_what_the_scheduler_says(ours):
    assert isinstance(ours.prior, Denoiser) and ours.prior.prediction == "x0" and ours.limit == 5.0
    assert ours.decoder.prediction == ours.upsampler.prediction == "epsilon"
    torch.testing.assert_close(ours.decoder.schedule.betas, NoiseSchedule.cosine().betas)
