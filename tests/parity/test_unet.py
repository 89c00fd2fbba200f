"""Chapter 07 against diffusers: tiny networks on their answers, public ones on names, shapes and counts."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusionbook.checkpoints import to_guided_diffusion
from diffusionbook.unet import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")

TINY = {
    "like sd15": UNetConfig(channels=(16, 32, 32), attention=("cross", "cross", None), heads=(4, 4, 4),
                            context_width=12, groups=8),
    "like sd15-inpaint": UNetConfig(channels=(16, 32), attention=("cross", None), heads=(4, 4), context_width=12,
                                    groups=8, in_channels=9, layers_per_block=1),
    "like sd21": UNetConfig(channels=(16, 32, 64), attention=("cross", "cross", None), heads=(2, 4, 8),
                            context_width=12, linear_projection=True, groups=8, layers_per_block=1),
    "like ddpm": UNetConfig(channels=(16, 32, 32), attention=(None, "self", None), heads=(1, 1, 1), in_channels=3,
                            out_channels=3, context_width=None, eps=1e-6, cos_first=False, time_shift=1.0,
                            down_padding=0, groups=8),
    "like the miniature": UNetConfig(channels=(16, 32), attention=("cross", "cross"), heads=(4, 4), context_width=12,
                                     groups=8),
    "several heads, to itself": UNetConfig(channels=(16, 32), attention=("self", "self"), heads=(2, 4), in_channels=3,
                                           out_channels=6, context_width=None, eps=1e-2, groups=4, layers_per_block=3),
    "no attention but in the middle": UNetConfig(channels=(16, 32), attention=(None, None), heads=(1, 1), in_channels=3,
                                                 out_channels=3, context_width=None, groups=8),
    "like improved": UNetConfig(channels=(16, 32, 32), attention=(None, "self", None), heads=(2, 4, 4), in_channels=3,
                                out_channels=6, context_width=None, groups=8, scale_shift=True, layers_per_block=1),
    "like guided, told a class": UNetConfig(channels=(16, 32, 32), attention=(None, "self", "self"), heads=(2, 4, 4),
                                            in_channels=3, out_channels=6, context_width=None, groups=8, classes=9,
                                            scale_shift=True, residual_resampling=True, layers_per_block=1),
    "like glide": UNetConfig(channels=(16, 32, 48), attention=(None, "added", "added"), heads=(2, 4, 6), in_channels=3,
                             out_channels=6, context_width=12, groups=8, scale_shift=True, residual_resampling=True),
    "like glide's upsampler": UNetConfig(channels=(16, 16, 32, 32), attention=(None, None, None, "added"), groups=8,
                                         heads=(1, 1, 2, 2), in_channels=6, out_channels=6, context_width=12,
                                         scale_shift=True, residual_resampling=True, layers_per_block=1),
    "like karlo's upsampler": UNetConfig(channels=(16, 32, 32), attention=(None, None, None), middle=None, groups=8,
                                         heads=(1, 1, 1), in_channels=6, out_channels=3, context_width=None,
                                         residual_resampling=True, layers_per_block=3),
    "words only in the middle": UNetConfig(channels=(16, 32), attention=(None, None), heads=(4, 4), context_width=12,
                                           groups=8),
}

# Written out here, so that our presets and our way of writing configs are tested against something else.
SD15 = {"cross_attention_dim": 768, "sample_size": 64}
SD21 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
        "upcast_attention": True}
DDPM = {"act_fn": "silu", "attention_head_dim": None, "block_out_channels": [128, 256, 256, 256],
        "center_input_sample": False,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2,
        "mid_block_scale_factor": 1, "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3, "sample_size": 32,
        "time_embedding_type": "positional",
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]}
IMPROVED = {"add_attention": True, "attention_head_dim": 64, "attn_norm_num_groups": 32,
            "block_out_channels": [128, 256, 256, 256], "layers_per_block": 3, "out_channels": 6, "sample_size": 32,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "resnet_time_scale_shift": "scale_shift"}
GUIDED64 = IMPROVED | {"block_out_channels": [192, 384, 576, 768], "sample_size": 64, "num_class_embeds": 1000,
                       "down_block_types": ["ResnetDownsampleBlock2D"] + ["AttnDownBlock2D"] * 3,
                       "up_block_types": ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
                       "downsample_type": "resnet", "upsample_type": "resnet"}
GUIDED256 = GUIDED64 | {"block_out_channels": [256, 256, 512, 512, 1024, 1024], "sample_size": 256,
                        "layers_per_block": 2, "num_class_embeds": None,
                        "down_block_types": ["ResnetDownsampleBlock2D"] * 3 + ["AttnDownBlock2D"] * 3,
                        "up_block_types": ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"] * 3}
KARLO = {"act_fn": "silu", "attention_head_dim": 64, "block_out_channels": [320, 640, 960, 1280],
         "class_embed_type": "identity", "cross_attention_dim": 1536, "in_channels": 3, "out_channels": 6,
         "down_block_types": ["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * 3,
         "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"], "layers_per_block": 3,
         "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "resnet_time_scale_shift": "scale_shift",
         "sample_size": 64}
GLIDE = KARLO | {"block_out_channels": [192, 384, 576, 768], "cross_attention_dim": 512}
GLIDE_UPSAMPLER = GLIDE | {
    "block_out_channels": [192, 192, 384, 384, 768, 768], "in_channels": 6, "layers_per_block": 2, "sample_size": 256,
    "down_block_types": ["ResnetDownsampleBlock2D"] * 3 + ["SimpleCrossAttnDownBlock2D"] * 3,
    "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"] * 3}
KARLO_UPSAMPLER = {"add_attention": False, "block_out_channels": [320, 640, 960, 1280], "layers_per_block": 3,
                   "down_block_types": ["ResnetDownsampleBlock2D"] * 4, "in_channels": 6, "out_channels": 3,
                   "sample_size": 256, "up_block_types": ["ResnetUpsampleBlock2D"] * 4}
#: GLIDE's checkpoints hold a text transformer too: 16 layers of width 512 over 128 tokens of 50,257, two tables of 128
#: positions and padding, a final LayerNorm, and a linear layer to the width of the time embedding.
GLIDE_TEXT = 16 * 12 * 512**2 + 16 * 13 * 512 + 50_257 * 512 + 2 * 128 * 512 + 2 * 512 + 512 * 768 + 768
PUBLIC = {
    "improved-cifar10": ("UNet2DModel", IMPROVED, 52_546_438, None),  # their tables count its qkv as one tensor
    "guided-64": ("UNet2DModel", GUIDED64, 295_904_454, None),
    "guided-256": ("UNet2DModel", GUIDED256, 552_814_086, None),
    "glide": ("UNet2DConditionModel", GLIDE, 385_030_726 - GLIDE_TEXT, None),
    "glide-inpaint": ("UNet2DConditionModel", GLIDE | {"in_channels": 7}, 385_037_638 - GLIDE_TEXT, None),
    "glide-upsampler": ("UNet2DConditionModel", GLIDE_UPSAMPLER, 398_361_286 - GLIDE_TEXT, None),
    "glide-upsampler-inpaint": ("UNet2DConditionModel", GLIDE_UPSAMPLER | {"in_channels": 10},
                                398_368_198 - GLIDE_TEXT, None),
    "dalle2-decoder": ("UNet2DConditionModel", KARLO, 885_439_686, 716),
    "dalle2-upsampler": ("UNet2DModel", KARLO_UPSAMPLER, 691_579_523, 408),
    "sd15": ("UNet2DConditionModel", SD15, 859_520_964, 686),
    "sd15-inpaint": ("UNet2DConditionModel", SD15 | {"in_channels": 9}, 859_535_364, 686),
    "sd21": ("UNet2DConditionModel", SD21, 865_910_724, 686),
    "ddpm-cifar10": ("UNet2DModel", DDPM, 35_746_307, 328),
}


def kind(config):
    return diffusers.UNet2DModel if config.context_width is None else diffusers.UNet2DConditionModel


def randomise(model):
    """Fresh weights are zero in the places that matter; a comparison of them could not fail."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def inputs(config):
    torch.manual_seed(1)
    context = torch.randn(2, 5, config.context_width) if config.context_width else None
    return torch.randn(2, config.in_channels, 8, 16), torch.tensor([3, 950]), context


@torch.no_grad()
def assert_same(ours, theirs):
    x, t, context = inputs(ours.config)
    embedding = None
    if theirs.config.class_embed_type == "identity":
        embedding = torch.randn(2, 4 * ours.config.channels[0])
    elif ours.config.classes:
        embedding = torch.tensor([0, 8])
    told = {} if embedding is None else {"class_labels": embedding}
    expected = theirs(x, t, *([] if context is None else [context]), **told).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x, t, context, embedding), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", TINY)
def test_ours_is_opened_by_diffusers(name, tmp_path):
    ours = randomise(UNet(TINY[name]))
    ours.save_pretrained(tmp_path)
    theirs, report = kind(ours.config).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert_same(ours, theirs.eval())


@pytest.mark.parametrize("name", TINY)
def test_theirs_is_opened_by_us(name, tmp_path):
    theirs = randomise(kind(TINY[name]).from_config(TINY[name].to_config()))
    theirs.save_pretrained(tmp_path)
    ours = UNet.from_pretrained(tmp_path)
    assert ours.config == TINY[name]
    assert_same(ours, theirs)


@pytest.mark.parametrize("side", [(7, 10), (5, 9), (4, 4)])
@pytest.mark.parametrize("name", ["like sd15", "like sd21"])
def test_odd_sizes_are_halved_and_doubled_alike(name, side, tmp_path):
    ours = randomise(UNet(TINY[name]))
    ours.save_pretrained(tmp_path)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path).eval()
    _, t, context = inputs(ours.config)
    x = torch.randn(2, 4, *side)
    with torch.no_grad():
        expected = theirs(x, t, context).sample
        assert expected.shape == x.shape and expected.std() > 0.1
        torch.testing.assert_close(ours(x, t, context), expected, rtol=1e-4, atol=2e-5)


def test_weights_in_the_old_dialect_are_opened(tmp_path):
    theirs = randomise(kind(TINY["like ddpm"]).from_config(TINY["like ddpm"].to_config()))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, tensor in load_file(path).items():
        for now, before in new.items():
            key = key.replace(f".{now}.", f".{before}.")
        state[key] = tensor
    assert sum(".query." in key for key in state) > 0
    save_file(state, path)
    assert_same(UNet.from_pretrained(tmp_path), theirs)


def test_old_configs_without_newer_options_are_opened(tmp_path):
    """What google/ddpm-cifar10-32 has on the hub, made small."""
    small = DDPM | {"block_out_channels": [16, 32, 32, 32], "norm_num_groups": 8, "_class_name": "UNet2DModel",
                    "_diffusers_version": "0.1.1"}
    theirs = randomise(diffusers.UNet2DModel.from_config(small))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(small))
    assert_same(UNet.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("name", ["like glide", "like sd15"])
def test_masked_words(name, tmp_path):
    ours = randomise(UNet(TINY[name]))
    ours.save_pretrained(tmp_path)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path).eval()
    x, t, context = inputs(ours.config)
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
    labels = torch.randn(2, 64) if name == "like glide" else None
    with torch.no_grad():
        expected = theirs(x, t, context, labels, encoder_attention_mask=mask).sample
        torch.testing.assert_close(ours(x, t, context, labels, mask), expected, rtol=1e-4, atol=2e-5)


def test_one_wrong_weight_would_be_noticed(tmp_path):
    ours = randomise(UNet(TINY["like sd15"]))
    ours.save_pretrained(tmp_path)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        theirs.down_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(1.1)
    with pytest.raises(AssertionError, match="close"):
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["like sd15", "like sd21", "like the miniature"])
def test_our_names_of_guided_diffusion_are_those_that_diffusers_reads(name):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    ours = randomise(UNet(TINY[name]))
    single_file = to_guided_diffusion(ours.state_dict(), head_width=None)
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in single_file.items()}
    read = convert_ldm_unet_checkpoint(prefixed, config=ours.config.to_config() | {"class_embed_type": None})
    assert read.keys() == ours.state_dict().keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in ours.state_dict().items())


@pytest.mark.parametrize("name", PUBLIC)
def test_public_networks_have_the_same_tensors(name):
    reference, public, parameters, tensors = PUBLIC[name]
    with torch.device("meta"):
        theirs = getattr(diffusers, reference).from_config(public)
        ours = UNet(UNetConfig.preset(name))
    shapes = {key: tuple(p.shape) for key, p in ours.state_dict().items()}
    assert shapes == {key: tuple(p.shape) for key, p in theirs.state_dict().items()}
    assert ours.count_parameters() == parameters
    assert tensors is None or len(shapes) == tensors


@pytest.mark.parametrize("name", PUBLIC)
def test_public_configs_are_read_as_our_presets(name):
    reference, public, *_ = PUBLIC[name]
    with torch.device("meta"):
        full = dict(getattr(diffusers, reference).from_config(public).config)
    full["sample_size"] = UNetConfig.preset(name).sample_size
    assert UNetConfig.from_config(json.loads(json.dumps(full))) == UNetConfig.preset(name)
