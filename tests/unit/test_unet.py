"""Chapter 07: the U-Net's shape, its start at zero, and what it refuses."""

import dataclasses

import pytest
import torch

from diffusionbook.layers import AttentionBlock, SpatialTransformer
from diffusionbook.unet import UNet, UNetConfig

SMALL = UNetConfig(channels=(16, 24), attention=("cross", None), heads=(2, 4), context_width=10, layers_per_block=1,
                   groups=8)
SELF = UNetConfig(channels=(16, 32), attention=(None, "self"), heads=(2, 4), context_width=None, in_channels=3,
                  out_channels=6, layers_per_block=2, groups=8, cos_first=False, time_shift=1.0, down_padding=0)
DEEP = UNetConfig(channels=(8, 16, 24), attention=("cross", None, "cross"), heads=(2, 2, 3), context_width=10,
                  layers_per_block=1, groups=4, linear_projection=True)


def network(config, *, randomise=True):
    torch.manual_seed(0)
    model = UNet(config).eval()
    if randomise:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return model


def inputs(config, count=2, size=(8, 12)):
    torch.manual_seed(1)
    context = torch.randn(count, 5, config.context_width) if config.context_width else None
    return torch.randn(count, config.in_channels, *size), torch.randint(0, 1000, (count,)), context


@pytest.mark.parametrize("config", [SMALL, SELF, DEEP])
def test_a_new_network_says_zero(config):
    model = network(config, randomise=False)
    assert torch.equal(model(*inputs(config)), torch.zeros(2, config.out_channels, 8, 12))


@pytest.mark.parametrize("config", [SMALL, SELF, DEEP])
def test_a_new_block_passes_its_input_on(config):
    """Before training, every attention is the identity and every residual block its skip."""
    model = network(config, randomise=False)
    torch.manual_seed(2)
    found = []
    for module in model.modules():
        if isinstance(module, AttentionBlock | SpatialTransformer):
            x = torch.randn(1, (module.norm if hasattr(module, "norm") else module.group_norm).num_channels, 4, 4)
            given = (torch.randn(1, 5, config.context_width),) if isinstance(module, SpatialTransformer) else ()
            assert torch.equal(module(x, *given), x)
            found.append(module)
    assert len(found) >= 4


@pytest.mark.parametrize("config", [SMALL, SELF, DEEP])
def test_a_picture_does_not_depend_on_its_neighbours(config):
    model, (x, t, context) = network(config), inputs(config, 3)
    with torch.no_grad():
        together = model(x, t, context)
        assert together.std() > 0.1 and together.shape == (3, config.out_channels, 8, 12)
        for i in range(3):
            alone = model(x[i:i + 1], t[i:i + 1], None if context is None else context[i:i + 1])
            assert torch.allclose(alone[0], together[i], atol=1e-5)


@pytest.mark.parametrize("config", [SMALL, SELF, DEEP])
def test_time_words_and_embedding_are_heard(config):
    model, (x, t, context) = network(config), inputs(config)
    with torch.no_grad():
        out = model(x, t, context)
        assert (model(x, t + 100, context) - out).abs().mean() > 1e-3
        assert (model(x, t + 0.5, context) - out).abs().mean() > 1e-6
        embedding = torch.randn(2, 4 * config.channels[0])
        told = model(x, t, context, embedding)
        assert (told - out).abs().mean() > 1e-3
        assert torch.equal(model(x, t, context, torch.zeros_like(embedding)), out)
        if context is not None:
            assert (model(x, t, context + 1) - out).abs().mean() > 1e-3
            mixed = model(x, t, context.flip(0))
            assert (mixed - out).abs().mean() > 1e-3


@pytest.mark.parametrize("config", [SMALL, SELF, DEEP])
def test_gradients_reach_every_parameter(config):
    model = network(config)
    model(*inputs(config)).square().mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias adds the same to all scores of a query, and softmax doesn't see it.
    assert [name for name in dead if not name.endswith("to_k.bias")] == []


def test_the_first_step_of_training_moves_the_last_layer():
    """Zero weights must not mean zero gradients for ever."""
    model = network(SMALL, randomise=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, t, context = inputs(SMALL)
    losses = []
    for _ in range(4):
        loss = (model(x, t, context) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert model.mid_block.attentions[0].proj_out.weight.abs().sum() > 0


def test_half_precision_stays_half():
    model, (x, t, context) = network(SMALL), inputs(SMALL)
    with torch.no_grad():
        full = model(x, t, context)
        half = model.to(torch.bfloat16)(x.bfloat16(), t, context.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().mean() < 0.05 * full.abs().mean()


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 4, 8), (2, 4, 9, 8), (2, 4, 8, 7)])
def test_inputs_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, 4, H, W\) with H and W multiples of 2, got"):
        network(SMALL)(torch.zeros(shape), torch.tensor([1, 2]), torch.zeros(2, 5, 10))


@pytest.mark.parametrize("context, got", [(None, "none"), (torch.zeros(2, 5, 9), r"\(2, 5, 9\)")])
def test_other_contexts_are_refused(context, got):
    x, t, _ = inputs(SMALL)
    with pytest.raises(ValueError, match=rf"context must have shape \(B, M, 10\), got {got}"):
        network(SMALL)(x, t, context)


# Configs


@pytest.mark.parametrize("name", ["sd15", "sd15-inpaint", "sd21", "ddpm-cifar10", "emoji-latent"])
def test_presets_survive_the_public_layout(name):
    config = UNetConfig.preset(name)
    assert UNetConfig.from_config(config.to_config()) == config


@pytest.mark.parametrize("config", [
    SMALL,
    DEEP,
    dataclasses.replace(SELF, heads=(1, 1)),
    dataclasses.replace(SELF, heads=(2, 4)),  # 8 channels a head on both levels
    dataclasses.replace(SMALL, attention=(None, None)),  # words only in the middle
    dataclasses.replace(SELF, attention=(None, None), heads=(1, 1)),
])
def test_configs_survive_the_public_layout(config):
    assert UNetConfig.from_config(config.to_config()) == config


def test_heads_that_the_public_layout_cannot_say_are_not_lost_in_silence():
    """A `UNet2DModel` has one width of a head for all levels; here there would be 8 and 16."""
    config = dataclasses.replace(SELF, heads=(2, 2))
    with pytest.raises(ValueError, match="heads"):
        config.to_config()


def test_words_and_itself_side_by_side_are_not_written_wrongly():
    """In a public config one entry means heads for the one kind of attention and their width for the other."""
    config = dataclasses.replace(SMALL, attention=("cross", "self"), heads=(4, 4))
    with pytest.raises(ValueError, match="cross.*self|self.*cross"):
        config.to_config()
    public = SMALL.to_config() | {"down_block_types": ["CrossAttnDownBlock2D", "AttnDownBlock2D"],
                                  "up_block_types": ["AttnUpBlock2D", "CrossAttnUpBlock2D"]}
    with pytest.raises(ValueError, match="cross.*self|self.*cross"):
        UNetConfig.from_config(public)


def test_a_saved_network_answers_as_before(tmp_path):
    model = network(DEEP)
    model.save_pretrained(tmp_path)
    again = UNet.from_pretrained(tmp_path)
    assert again.config == DEEP
    with torch.no_grad():
        assert torch.equal(again(*inputs(DEEP)), model(*inputs(DEEP)))


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="sd15, sd15-inpaint, sd21, ddpm-cifar10, emoji-latent"):
        UNetConfig.preset("sdxl")


@pytest.mark.parametrize("changes, message", [
    ({"heads": (2,)}, "2 levels of channels need 2 entries"),
    ({"attention": ("cross",)}, "2 levels of channels need 2 entries"),
    ({"attention": ("cross", "linear")}, r'"cross", "self" or None per level, got \[\'linear\'\]'),
    ({"context_width": None}, "context_width"),
])
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize("changes", [{"groups": 7}, {"heads": (3, 4)}])
def test_what_does_not_divide_is_refused(changes):
    with pytest.raises(ValueError, match="can't be split"):
        UNet(dataclasses.replace(SMALL, **changes))


@pytest.mark.parametrize("changes, message", [
    ({"down_block_types": ["ResnetDownsampleBlock2D", "DownBlock2D"]}, "ResnetDownsampleBlock2D"),
    ({"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "mirror"),
    ({"act_fn": "gelu"}, "act_fn='gelu'"),
    ({"class_embed_type": "timestep"}, "class_embed_type"),
    ({"addition_embed_type": "text_time"}, "addition_embed_type"),
    ({"dual_cross_attention": True}, "dual_cross_attention"),
    ({"mid_block_scale_factor": 0.5}, "mid_block_scale_factor"),
    ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
    ({"time_embedding_type": "fourier"}, "time_embedding_type"),
    ({"transformer_layers_per_block": [1, 2]}, "transformer_layers_per_block"),
    ({"center_input_sample": True}, "center_input_sample"),
    ({"resnet_out_scale_factor": 2.0}, "resnet_out_scale_factor"),
    ({"resnet_skip_time_act": True}, "resnet_skip_time_act"),
    ({"timestep_post_act": "silu"}, "timestep_post_act"),
    ({"time_embedding_act_fn": "silu"}, "time_embedding_act_fn"),
    ({"only_cross_attention": True}, "only_cross_attention"),
    ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
])
def test_public_options_that_this_network_does_not_compute_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_config(SMALL.to_config() | changes)


def test_options_that_change_nothing_are_passed_over():
    public = SMALL.to_config() | {"_diffusers_version": "0.2", "upcast_attention": True, "dropout": 0.0,
                                  "num_class_embeds": None, "class_embed_type": None}
    assert UNetConfig.from_config(public) == SMALL
