"""Chapter 07: the U-Net's shape, its start at zero, and what it refuses."""

import dataclasses
import re

import pytest
import torch

from diffusionbook.checkpoints import to_guided_diffusion
from diffusionbook.denoising import Denoiser
from diffusionbook.layers import AttentionBlock, SpatialTransformer
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.unet import PRESETS, UNet, UNetConfig

SMALL = UNetConfig(channels=(16, 24), attention=("cross", None), heads=(2, 4), context_width=10, layers_per_block=1,
                   groups=8)
SELF = UNetConfig(channels=(16, 32), attention=(None, "self"), heads=(2, 4), context_width=None, in_channels=3,
                  out_channels=6, layers_per_block=2, groups=8, cos_first=False, time_shift=1.0, down_padding=0)
DEEP = UNetConfig(channels=(8, 16, 24), attention=("cross", None, "cross"), heads=(2, 2, 3), context_width=10,
                  layers_per_block=1, groups=4, linear_projection=True)

GUIDED = UNetConfig(channels=(16, 24), attention=(None, "added"), heads=(2, 3), context_width=10, layers_per_block=1,
                    groups=8, scale_shift=True, residual_resampling=True, in_channels=3, out_channels=6)
CLASSES = dataclasses.replace(GUIDED, attention=(None, "self"), middle="self", context_width=None, classes=7)
EVERY = pytest.mark.parametrize("config", [SMALL, SELF, DEEP, GUIDED, CLASSES])


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


def nothing(config, count=2):
    """What a network that is told classes must be given when no class matters."""
    return torch.zeros(count, 4 * config.channels[0]) if config.classes else None


@EVERY
def test_a_new_network_says_zero(config):
    model = network(config, randomise=False)
    assert torch.equal(model(*inputs(config), nothing(config)), torch.zeros(2, config.out_channels, 8, 12))


@EVERY
def test_a_new_block_passes_its_input_on(config):
    """Before training, every attention is the identity and every residual block its skip."""
    model = network(config, randomise=False)
    torch.manual_seed(2)
    found = []
    for module in model.modules():
        if isinstance(module, AttentionBlock | SpatialTransformer):
            x = torch.randn(1, (module.norm if hasattr(module, "norm") else module.group_norm).num_channels, 4, 4)
            context = torch.randn(1, 5, config.context_width) if config.context_width else None
            assert torch.equal(module(x, context), x)
            found.append(module)
    assert len(found) >= 4 - (config in (GUIDED, CLASSES))


@EVERY
def test_a_picture_does_not_depend_on_its_neighbours(config):
    model, (x, t, context) = network(config), inputs(config, 3)
    with torch.no_grad():
        together = model(x, t, context, nothing(config, 3))
        assert together.std() > 0.1 and together.shape == (3, config.out_channels, 8, 12)
        for i in range(3):
            alone = model(x[i:i + 1], t[i:i + 1], None if context is None else context[i:i + 1], nothing(config, 1))
            assert torch.allclose(alone[0], together[i], atol=1e-5)


@EVERY
def test_time_words_and_embedding_are_heard(config):
    model, (x, t, context) = network(config), inputs(config)
    with torch.no_grad():
        none = nothing(config)
        out = model(x, t, context, none)
        assert (model(x, t + 100, context, none) - out).abs().mean() > 1e-3
        assert (model(x, t + 0.5, context, none) - out).abs().mean() > 1e-6
        embedding = torch.randn(2, 4 * config.channels[0])
        told = model(x, t, context, embedding)
        assert (told - out).abs().mean() > 1e-3
        assert torch.equal(model(x, t, context, torch.zeros_like(embedding)), out)
        if context is not None:
            assert (model(x, t, context + 1) - out).abs().mean() > 1e-3
            mixed = model(x, t, context.flip(0))
            assert (mixed - out).abs().mean() > 1e-3


@EVERY
def test_gradients_reach_every_parameter(config):
    model = network(config)
    labels = torch.tensor([3, 5]) if config.classes else None
    model(*inputs(config), labels).square().mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias adds the same to all scores of a query, and softmax doesn't see it.
    assert [name for name in dead if not name.endswith(("to_k.bias", "add_k_proj.bias"))] == []


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


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 4, 8), (2, 4, 1, 8), (2, 4, 8, 0)])
def test_inputs_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, 4, H, W\) with H and W at least 2, got"):
        network(SMALL)(torch.zeros(shape), torch.tensor([1, 2]), torch.zeros(2, 5, 10))


def test_without_padding_only_even_sizes_come_back():
    """28 → 14 → 7 → 3 → 6: the way up would meet a memory of 7."""
    config = dataclasses.replace(SMALL, down_padding=0)
    with pytest.raises(ValueError, match=r"with H and W multiples of 2, got \(2, 4, 9, 8\)"):
        network(config)(torch.zeros(2, 4, 9, 8), torch.tensor([1, 2]), torch.zeros(2, 5, 10))
    assert network(config)(torch.zeros(2, 4, 6, 8), torch.tensor([1, 2]), torch.zeros(2, 5, 10)).shape[2:] == (6, 8)


@pytest.mark.parametrize("shift", [0.0, 1.0, 0.5])
def test_a_shift_of_time_is_kept(shift):
    config = dataclasses.replace(SMALL, time_shift=shift)
    assert UNetConfig.from_config(config.to_config()).time_shift == shift


def test_residual_blocks_double_even_sizes_only():
    config = dataclasses.replace(SMALL, residual_resampling=True)
    with pytest.raises(ValueError, match=r"with H and W multiples of 2, got \(2, 4, 9, 8\)"):
        network(config)(torch.zeros(2, 4, 9, 8), torch.tensor([1, 2]), torch.zeros(2, 5, 10))


@pytest.mark.parametrize("context, got", [(None, "none"), (torch.zeros(2, 5, 9), r"\(2, 5, 9\)")])
def test_other_contexts_are_refused(context, got):
    x, t, _ = inputs(SMALL)
    with pytest.raises(ValueError, match=rf"context must have shape \(2, M, 10\), got {got}"):
        network(SMALL)(x, t, context)


@pytest.mark.parametrize("t", [3, [3, 4], torch.tensor(3), torch.tensor([3]), torch.tensor([[1], [2]]),
                               torch.arange(3)])
def test_other_shapes_of_t_are_refused(t):
    x, _, context = inputs(SMALL)
    with pytest.raises(ValueError, match=r"t must have shape \(2,\), one timestep per picture, got"):
        network(SMALL)(x, t, context)


@pytest.mark.parametrize("t", [-1, 1000, 2.5e9, float("nan")])
def test_a_time_that_the_schedule_does_not_have_is_refused(t):
    """A network knows no last timestep; whoever asks it through a `Denoiser` is told."""
    x, _, context = inputs(SMALL)
    denoise = Denoiser(lambda x, t: network(SMALL)(x, t, context), NoiseSchedule.linear())
    with pytest.raises(ValueError, match=r"t must lie in \[0, 999\]"):
        denoise(x, t)


def test_words_that_nobody_reads_are_refused():
    x, t, _ = inputs(SELF)
    with pytest.raises(ValueError, match="reads no words"):
        network(SELF)(x, t, torch.zeros(2, 5, 10))


@pytest.mark.parametrize("embedding", [torch.zeros(2, 63), torch.zeros(1, 64), torch.tensor([1, 2]),
                                       torch.zeros(2, 64, dtype=torch.int64)])
def test_other_embeddings_are_refused(embedding):
    x, t, context = inputs(SMALL)
    with pytest.raises(ValueError, match=r"embedding must have shape \(2, 64\), got"):
        network(SMALL)(x, t, context, embedding)


def test_classes_are_heard_and_counted():
    model, (x, t, _) = network(CLASSES), inputs(CLASSES)
    with torch.no_grad():
        told = [model(x, t, embedding=torch.tensor(labels)) for labels in ([0, 1], [0, 6])]
        assert torch.allclose(told[0][0], told[1][0], atol=1e-6)
        assert (told[0][1] - told[1][1]).abs().mean() > 1e-3
        same = model(x, t, embedding=model.class_embedding(torch.tensor([0, 6])))
        assert torch.allclose(same, told[1], atol=1e-6)
        with pytest.raises(ValueError, match=r"\(2, 64\), or \(2,\) of class numbers, got \(2, 7\)"):
            model(x, t, embedding=torch.zeros(2, 7))


@pytest.mark.parametrize("number", [-1, 7])
def test_a_class_that_there_is_not_is_refused(number):
    x, t, _ = inputs(CLASSES)
    with pytest.raises(ValueError, match=rf"class numbers must lie in 0…6, got \[0, {number}\]"):
        network(CLASSES)(x, t, embedding=torch.tensor([0, number]))


@pytest.mark.parametrize("config", [SMALL, GUIDED])
def test_masked_words_are_not_heard(config):
    model, (x, t, context) = network(config), inputs(config)
    mask = torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        out = model(x, t, context)
        assert torch.allclose(model(x, t, context, mask=mask), out, atol=1e-5)
        mask[:, 3:] = False
        masked = model(x, t, context, mask=mask)
        assert (masked - out).abs().mean() > 1e-4
        assert torch.allclose(masked, model(x, t, context[:, :3]), atol=1e-5)
    for wrong in (torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 5)):
        with pytest.raises(ValueError, match="one entry for each word"):
            model(x, t, context, mask=wrong)


def test_dropout_forgets_in_training_only():
    model = network(dataclasses.replace(SMALL, dropout=0.3))
    with torch.no_grad():
        assert torch.equal(model(*inputs(SMALL)), network(SMALL)(*inputs(SMALL)))
        model.train()
        given = inputs(SMALL)
        assert not torch.allclose(model(*given), model(*given), atol=1e-3)


# Names of guided diffusion


@pytest.mark.parametrize("config", [SMALL, SELF, GUIDED, CLASSES, dataclasses.replace(SELF, heads=(4, 8))])
def test_the_names_of_guided_diffusion_are_understood(config):
    model = network(config)
    theirs = to_guided_diffusion(model.state_dict(), head_width=config.head_width())
    assert "input_blocks.0.0.weight" in theirs and "middle_block.2.out_layers.3.bias" in theirs
    assert sum(p.numel() for p in theirs.values()) == model.count_parameters()
    again = UNet(config).load(dict(sorted(theirs.items()))).eval()
    with torch.no_grad():
        told = *inputs(config), nothing(config)
        assert torch.equal(again(*told), model(*told))


def test_a_file_of_another_network_is_refused_by_name():
    theirs = to_guided_diffusion(network(GUIDED).state_dict(), head_width=8)
    with pytest.raises(ValueError, match=r"label_emb\.weight"):
        UNet(CLASSES).load(theirs)
    with pytest.raises(ValueError, match=r"has shape .*24.*, the config asks for .*32"):
        UNet(dataclasses.replace(GUIDED, channels=(16, 32), heads=(2, 4))).load(theirs)


def test_weights_of_another_config_are_refused_with_the_nearest_names():
    with pytest.raises(ValueError, match="config and weights belong together") as caught:
        UNet(dataclasses.replace(SMALL, layers_per_block=2)).load(network(SMALL).state_dict())
    assert re.search(r"missing 'down_blocks.0.attentions.1.norm.bias'; nearest there: \S+, \S+, \S+", str(caught.value))

# Configs


@pytest.mark.parametrize("name", PRESETS)
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
    dataclasses.replace(SELF, attention=(None, None), middle=None, heads=(1, 1)),
    GUIDED,
    CLASSES,
    dataclasses.replace(CLASSES, residual_resampling=False, dropout=0.1),
    dataclasses.replace(GUIDED, attention=("added", "added"), scale_shift=False, heads=(2, 3)),
])
def test_configs_survive_the_public_layout(config):
    assert UNetConfig.from_config(config.to_config()) == config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs(name):
    with torch.device("meta"):
        model = UNet(UNetConfig.preset(name))
        config, side = model.config, model.config.sample_size
        context = torch.empty(2, 7, config.context_width) if config.context_width else None
        labels = torch.empty(2, dtype=torch.int64) if config.classes else None
        x = torch.empty(2, config.in_channels, side, side)
        assert model(x, torch.empty(2), context, labels).shape == (2, config.out_channels, side, side)


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
    with pytest.raises(ValueError, match="choose one of sd15, sd15-inpaint, sd21, ddpm-cifar10,.*mathworks-digits"):
        UNetConfig.preset("sdxl")


@pytest.mark.parametrize("changes, message", [
    ({"heads": (2,)}, "2 levels of channels need 2 entries"),
    ({"attention": ("cross",)}, "2 levels of channels need 2 entries"),
    ({"attention": ("cross", "linear")}, r'"cross", "self", "added" or None, got \[\'linear\'\]'),
    ({"middle": "linear"}, r'"cross", "self", "added" or None, got \[\'linear\'\]'),
    ({"context_width": None}, "context_width"),
    ({"channels": (), "attention": (), "heads": ()}, "must be at least 1"),
    ({"layers_per_block": 0}, "must be at least 1"),
    ({"heads": (2, 0)}, "must be at least 1"),
    ({"groups": 0}, "must be at least 1"),
])
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize("changes", [{"groups": 7}, {"heads": (3, 4)}])
def test_what_does_not_divide_is_refused(changes):
    with pytest.raises(ValueError, match="can't be split"):
        UNet(dataclasses.replace(SMALL, **changes))


@pytest.mark.parametrize("changes, message", [
    ({"down_block_types": ["AttnSkipDownBlock2D", "DownBlock2D"]}, "unknown kind of block 'AttnSkipDownBlock2D'"),
    ({"down_block_types": ["ResnetDownsampleBlock2D", "DownBlock2D"]}, "residual_resampling"),
    ({"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "up_block_types.*would have"),
    ({"act_fn": "gelu"}, "act_fn='gelu'"),
    ({"class_embed_type": "timestep"}, "class_embed_type"),
    ({"addition_embed_type": "text_time"}, "addition_embed_type"),
    ({"dual_cross_attention": True}, "dual_cross_attention"),
    ({"mid_block_scale_factor": 0.5}, "mid_block_scale_factor"),
    ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift"),
    ({"cross_attention_norm": "group_norm"}, "cross_attention_norm"),
    ({"encoder_hid_dim": 64}, "encoder_hid_dim"),
    ({"time_embedding_type": "fourier"}, "time_embedding_type"),
    ({"transformer_layers_per_block": [1, 2]}, "transformer_layers_per_block"),
    ({"center_input_sample": True}, "center_input_sample"),
    ({"resnet_out_scale_factor": 2.0}, "resnet_out_scale_factor"),
    ({"resnet_skip_time_act": True}, "resnet_skip_time_act"),
    ({"timestep_post_act": "silu"}, "timestep_post_act"),
    ({"time_embedding_act_fn": "silu"}, "time_embedding_act_fn"),
    ({"only_cross_attention": True}, "only_cross_attention"),
    ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "added.*cross"),
    ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type='UNetMidBlock2D'"),
])
def test_public_options_that_this_network_does_not_compute_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_config(SMALL.to_config() | changes)


def test_options_that_change_nothing_are_passed_over():
    public = SMALL.to_config() | {"_diffusers_version": "0.2", "dropout": 0.0,
                                  "num_class_embeds": None, "class_embed_type": None}
    assert UNetConfig.from_config(public) == SMALL


def test_attention_in_float32_is_kept_and_says_the_same():
    up = dataclasses.replace(SMALL, upcast_attention=True)
    assert UNetConfig.from_config(up.to_config()) == up and UNetConfig.preset("sd21").upcast_attention
    plain, upcast = UNet(SMALL).eval(), UNet(up).eval()
    with torch.no_grad():
        for p in plain.parameters():
            p.normal_(std=0.1)
    upcast.load_state_dict(plain.state_dict())
    x, t = torch.randn(1, SMALL.in_channels, 16, 16), torch.tensor([7])
    context = torch.randn(1, 3, SMALL.context_width)
    assert torch.equal(plain(x, t, context), upcast(x, t, context))
    low = upcast.bfloat16()(x.bfloat16(), t, context.bfloat16())
    assert low.dtype == torch.bfloat16 and low.isfinite().all()


def test_a_network_that_is_told_a_class_wants_one():
    net = UNet(UNetConfig(channels=(8,), attention=(None,), middle=None, heads=(1,), layers_per_block=1, groups=4,
                          in_channels=3, out_channels=3, context_width=None, classes=5))
    x, t = torch.zeros(2, 3, 8, 8), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"is told a class: give embedding, 2 numbers in 0…4"):
        net(x, t)
    assert net(x, t, embedding=torch.tensor([0, 4])).shape == x.shape


def test_heads_of_several_widths_have_no_place_in_the_layout_where_words_are_added():
    """diffusers' way up takes them in the order of the way down, and so answers something else."""
    config = UNetConfig(channels=(16, 16), attention=("added", "added"), heads=(2, 4), layers_per_block=1, groups=8,
                        context_width=8, scale_shift=True, residual_resampling=True, middle="added")
    with pytest.raises(ValueError, match="one width of heads was expected"):
        config.to_config()
    even = dataclasses.replace(config, heads=(2, 2)).to_config()
    assert even["attention_head_dim"] == 8
    with pytest.raises(ValueError, match="all heads must have one width"):
        UNetConfig.from_config(even | {"attention_head_dim": [8, 4]})
