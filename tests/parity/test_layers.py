"""Chapter 06 against diffusers' blocks: same keys, same weights, same answers."""

import pytest
import torch

from diffusionbook.layers import (
    Attention,
    AttentionBlock,
    Downsample,
    FeedForward,
    ResidualBlock,
    SpatialTransformer,
    TimeEmbedding,
    TransformerBlock,
    Upsample,
    sinusoid,
)

pytest.importorskip("diffusers")
from diffusers.models import attention, attention_processor, downsampling, embeddings, resnet, upsampling  # noqa: E402
from diffusers.models.transformers.transformer_2d import Transformer2DModel  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def assert_same(ours, theirs, *inputs, their_inputs=None):
    """Both networks with the same random weights, loaded strictly by name."""
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn_like(p))
        ours.load_state_dict(theirs.state_dict())
        expected = theirs.eval()(*(their_inputs or inputs))
        expected = getattr(expected, "sample", expected)
        assert expected.std() > 0.05
        torch.testing.assert_close(ours.eval()(*inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cos_first", [True, False])
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("width", [4, 32, 320])
def test_sinusoid(cos_first, shift, width):
    t = torch.tensor([0, 1, 7.5, 500, 999])
    expected = embeddings.get_timestep_embedding(t, width, flip_sin_to_cos=cos_first, downscale_freq_shift=shift)
    torch.testing.assert_close(sinusoid(t, width, cos_first=cos_first, shift=shift), expected, rtol=1e-4, atol=1e-5)


def test_time_embedding():
    assert_same(TimeEmbedding(8, 24), embeddings.TimestepEmbedding(8, 24), torch.randn(3, 8))


@pytest.mark.parametrize("out", [16, 24])
@pytest.mark.parametrize("time_width", [None, 20])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_residual_block(out, time_width, eps):
    theirs = resnet.ResnetBlock2D(in_channels=16, out_channels=out, temb_channels=time_width, groups=8, eps=eps)
    time = torch.randn(2, 20) if time_width else None
    ours = ResidualBlock(16, out, time_width=time_width, groups=8, eps=eps)
    assert_same(ours, theirs, torch.randn(2, 16, 6, 10), time)


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("resample", ["up", "down", None])
@pytest.mark.parametrize("out", [16, 24])
def test_residual_block_of_guided_diffusion(scale_shift, resample, out):
    theirs = resnet.ResnetBlock2D(in_channels=16, out_channels=out, temb_channels=20, groups=8, eps=1e-5,
                                  time_embedding_norm="scale_shift" if scale_shift else "default",
                                  up=resample == "up", down=resample == "down")
    ours = ResidualBlock(16, out, time_width=20, groups=8, scale_shift=scale_shift, resample=resample)
    assert_same(ours, theirs, torch.randn(2, 16, 6, 10), torch.randn(2, 20))


@pytest.mark.parametrize("context_width", [None, 10])
@pytest.mark.parametrize("bias", [True, False])
def test_attention(context_width, bias):
    theirs = attention_processor.Attention(16, context_width, heads=4, dim_head=4, bias=bias)
    context = torch.randn(2, 5, 10) if context_width else None
    assert_same(Attention(16, heads=4, context_width=context_width, bias=bias), theirs, torch.randn(2, 7, 16), context)


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_block(heads):
    theirs = attention_processor.Attention(16, heads=heads, dim_head=16 // heads, bias=True, norm_num_groups=8,
                                           eps=1e-6, residual_connection=True, _from_deprecated_attn_block=True)
    assert_same(AttentionBlock(16, heads=heads, groups=8), theirs, torch.randn(2, 16, 6, 10))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_block_with_added_words(masked):
    theirs = attention_processor.Attention(16, cross_attention_dim=16, heads=4, dim_head=4, added_kv_proj_dim=10,
                                           norm_num_groups=8, bias=True, upcast_softmax=True,
                                           processor=attention_processor.AttnAddedKVProcessor2_0())
    ours = AttentionBlock(16, heads=4, context_width=10, groups=8, eps=1e-5)
    x, words = torch.randn(2, 16, 3, 5), torch.randn(2, 7, 10)
    mask = torch.rand(2, 7) < 0.5 if masked else None
    bias = (1 - mask.float())[:, None] * -10000.0 if masked else None  # what their pipelines make of a mask
    assert_same(ours, theirs, x, words, mask, their_inputs=(x, words, bias))


def test_feed_forward():
    assert_same(FeedForward(8), attention.FeedForward(8, activation_fn="geglu"), torch.randn(2, 5, 8))


def test_transformer_block():
    theirs = attention.BasicTransformerBlock(16, 4, 4, cross_attention_dim=10)
    x, context = torch.randn(2, 7, 16), torch.randn(2, 5, 10)
    assert_same(TransformerBlock(16, heads=4, context_width=10), theirs, x, context, their_inputs=(x, None, context))


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_spatial_transformer(linear, depth):
    theirs = Transformer2DModel(4, 4, in_channels=16, num_layers=depth, cross_attention_dim=10, norm_num_groups=8,
                                use_linear_projection=linear)
    ours = SpatialTransformer(16, heads=4, context_width=10, depth=depth, linear=linear, groups=8)
    assert_same(ours, theirs, torch.randn(2, 16, 6, 10), torch.randn(2, 5, 10))


@pytest.mark.parametrize("padding", [0, 1])
def test_downsample(padding):
    theirs = downsampling.Downsample2D(8, use_conv=True, padding=padding, name="op")
    assert_same(Downsample(8, padding=padding), theirs, torch.randn(2, 8, 6, 10))


def test_upsample():
    assert_same(Upsample(8), upsampling.Upsample2D(8, use_conv=True), torch.randn(2, 8, 6, 10))
