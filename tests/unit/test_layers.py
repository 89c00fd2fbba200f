"""Chapter 06: each block computed a second way, by hand or by plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusionbook.layers import (
    GEGLU,
    Attention,
    AttentionBlock,
    Downsample,
    FeedForward,
    ResidualBlock,
    SpatialFlatten,
    SpatialTransformer,
    SpatialUnflatten,
    TimeEmbedding,
    TransformerBlock,
    Upsample,
    attend,
    attention_weights,
    double,
    group_norm,
    halve,
    sinusoid,
    split_heads,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, rtol=1e-4, atol=tolerance)


# Time


def test_sinusoid_by_hand():
    t, width = 3.0, 8
    frequencies = [10_000 ** (-i / 4) for i in range(4)]
    expected = [math.cos(t * f) for f in frequencies] + [math.sin(t * f) for f in frequencies]
    assert sinusoid(torch.tensor([t]), width)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_sinusoid_in_the_dialect_of_ddpm():
    frequencies = [10_000 ** (-i / 3) for i in range(4)]  # from 1 down to exactly 1/10000
    expected = [math.sin(3 * f) for f in frequencies] + [math.cos(3 * f) for f in frequencies]
    found = sinusoid(torch.tensor([3]), 8, cos_first=False, shift=1.0)[0]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_sinusoid_of_whole_fractional_and_many_timesteps():
    whole, fractional = torch.tensor([0, 7, 999]), torch.tensor([0.0, 7.0, 999.0])
    assert torch.equal(sinusoid(whole, 32), sinusoid(fractional, 32))
    assert sinusoid(whole, 32)[0].tolist() == [1.0] * 16 + [0.0] * 16
    between = sinusoid(torch.tensor([6.0, 6.5, 7.0]), 32)[:, 3:16]
    assert ((between[1] - between[0]) * (between[2] - between[1]) >= 0).all()  # slow waves move steadily
    every = sinusoid(torch.arange(1000), 32)
    assert torch.pdist(every).min() > 0.1  # no two timesteps look alike
    assert close(every.square().sum(1), torch.full((1000,), 16.0), 1e-3)


def test_odd_widths_are_refused():
    with pytest.raises(ValueError, match="even, got 7"):
        sinusoid(torch.tensor([1]), 7)


def test_a_shift_that_leaves_no_frequency_is_refused():
    with pytest.raises(ValueError, match="a shift of 1 needs a width above 2, got 2"):
        sinusoid(torch.tensor([3.0]), 2, shift=1)
    assert sinusoid(torch.tensor([3.0]), 4, shift=1).isfinite().all()


def test_time_embedding_is_linear_swish_linear():
    layer, x = TimeEmbedding(4, 6), torch.randn(3, 4)
    h = x @ layer.linear_1.weight.T + layer.linear_1.bias
    expected = (h / (1 + torch.exp(-h))) @ layer.linear_2.weight.T + layer.linear_2.bias
    assert close(layer(x), expected)


# Residual block


def test_groups_must_divide_channels():
    assert group_norm(8, 4, 1e-3).eps == 1e-3
    with pytest.raises(ValueError, match="10 channels can't be split into 4 groups"):
        group_norm(10, 4, 1e-5)


@pytest.mark.parametrize("out", [8, 12])
@pytest.mark.parametrize("timed", [True, False])
def test_residual_block_by_hand(out, timed):
    block = ResidualBlock(8, out, time_width=6 if timed else None, groups=4, eps=0.1)
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x, time = torch.randn(2, 8, 5, 7), torch.randn(2, 6) if timed else None

    def norm(layer, x):
        groups = x.unflatten(1, (4, -1))
        mean = groups.mean((2, 3, 4), keepdim=True)
        var = groups.var((2, 3, 4), correction=0, keepdim=True)
        x = ((groups - mean) / (var + 0.1).sqrt()).flatten(1, 2)
        return x * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)

    def swish(x):
        return x * torch.sigmoid(x)

    h = block.conv1(swish(norm(block.norm1, x)))
    if timed:
        h = h + block.time_emb_proj(swish(time)).view(2, out, 1, 1)
    h = block.conv2(swish(norm(block.norm2, h)))
    skip = x if out == 8 else F.conv2d(x, block.conv_shortcut.weight, block.conv_shortcut.bias)
    assert (block.conv_shortcut is None) == (out == 8)
    assert close(block(x, time), h + skip)


def test_scale_and_shift_by_hand():
    block = ResidualBlock(8, 12, time_width=6, scale_shift=True, groups=4)
    x, time = torch.randn(2, 8, 5, 7), torch.randn(2, 6)
    assert block.time_emb_proj.out_features == 24
    scale, shift = block.time_emb_proj(F.silu(time))[:, :, None, None].split(12, dim=1)
    h = block.norm2(block.conv1(F.silu(block.norm1(x)))) * (1 + scale) + shift
    assert close(block(x, time), block.conv2(F.silu(h)) + block.conv_shortcut(x))


def test_time_reaches_an_additive_block_only_as_far_as_its_norm_lets_it():
    """With one channel a group, the second norm takes away again what was added to the whole channel."""
    x, times = torch.randn(1, 8, 4, 4), torch.randn(2, 1, 6)
    additive = ResidualBlock(8, 8, time_width=6, groups=8)
    assert close(additive(x, times[0]), additive(x, times[1]), 1e-4)
    scaled = ResidualBlock(8, 8, time_width=6, groups=8, scale_shift=True)
    assert not close(scaled(x, times[0]), scaled(x, times[1]), 1e-2)


@pytest.mark.parametrize("resample, size", [("down", (2, 3)), ("up", (8, 12))])
def test_resampling_inside_the_block_happens_on_both_ways(resample, size):
    block, x = ResidualBlock(8, 8, groups=4, resample=resample), torch.randn(2, 8, 4, 6)
    squares = x.unflatten(2, (2, 2)).unflatten(4, (3, 2))
    halved = squares.mean((3, 5))
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert close(halve(x), halved) and torch.equal(double(x), doubled)
    nn.init.zeros_(block.conv2.weight), nn.init.zeros_(block.conv2.bias)
    assert block(x).shape == (2, 8, *size) and close(block(x), halved if resample == "down" else doubled)


def test_residual_blocks_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="time_width"):
        ResidualBlock(8, 8, groups=4, scale_shift=True)
    with pytest.raises(ValueError, match='"down", "up" or None, got \'sideways\''):
        ResidualBlock(8, 8, groups=4, resample="sideways")


def test_a_time_vector_is_neither_forgotten_nor_passed_over():
    x, time = torch.randn(2, 8, 4, 4), torch.randn(2, 5)
    with pytest.raises(ValueError, match="needs a time vector"):
        ResidualBlock(8, 8, groups=4, time_width=5)(x)
    with pytest.raises(ValueError, match="without time_width"):
        ResidualBlock(8, 8, groups=4)(x, time)


@pytest.mark.parametrize("size", [(5, 4), (4, 5)])
def test_a_map_with_an_odd_side_is_not_cut_in_silence(size):
    with pytest.raises(ValueError, match=f"must be even to be halved, got {size[0]}×{size[1]}"):
        halve(torch.zeros(1, 8, *size))


def test_dropout_only_in_training():
    block, x = ResidualBlock(8, 8, groups=4, dropout=0.5), torch.randn(2, 8, 4, 4)
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


# Flatten and unflatten


def test_flatten_and_unflatten_are_inverse():
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    row = SpatialFlatten()(x)
    assert row.shape == (2, 20, 3)
    assert torch.equal(row[1, 7], x[1, :, 1, 2])  # place 7 is row 1, column 2 of a map 5 wide
    assert torch.equal(SpatialUnflatten()(row, (4, 5)), x)
    volume = torch.randn(2, 3, 2, 4, 5)
    assert torch.equal(SpatialUnflatten()(SpatialFlatten()(volume), volume.shape[2:]), volume)


# Attention


def attention_by_loops(layer, x, context):
    """Softmax of scaled products, one head and one query at a time."""
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    width = q.shape[2] // layer.heads
    mixed = torch.zeros_like(q)
    for b in range(len(x)):
        for head in range(layer.heads):
            part = slice(head * width, (head + 1) * width)
            for n in range(x.shape[1]):
                weights = torch.softmax(k[b, :, part] @ q[b, n, part] / math.sqrt(width), 0)
                mixed[b, n, part] = weights @ v[b, :, part]
    return layer.to_out[0](mixed)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_by_loops(heads):
    layer = Attention(8, heads=heads, context_width=5)
    x, context = torch.randn(2, 3, 8), 3 * torch.randn(2, 4, 5)
    assert close(layer(x, context), attention_by_loops(layer, x, context))
    layer = Attention(8, heads=heads, bias=True)
    assert close(layer(x), attention_by_loops(layer, x, x))


def test_attention_weights_are_shares():
    q, k = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 5, 6)
    weights = attention_weights(q, k)
    assert weights.shape == (2, 3, 4, 5) and close(weights.sum(-1), torch.ones(2, 3, 4))
    assert close(weights[1, 2, 3], torch.softmax(k[1, 2] @ q[1, 2, 3] / math.sqrt(6), 0))
    assert split_heads(torch.arange(12.0).view(1, 2, 6), 3)[0, 1].tolist() == [[2, 3], [8, 9]]


def test_a_mask_hides_words_as_if_they_were_not_there():
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    x, context = torch.randn(2, 3, 8), torch.randn(2, 4, 5)
    layer = Attention(8, heads=2, context_width=5)
    block, image = AttentionBlock(8, heads=2, context_width=5, groups=4), torch.randn(2, 8, 3, 2)
    masked, answer = layer(x, context, mask), block(image, context, mask)
    for i in range(2):
        kept = context[i:i + 1, mask[i]]
        assert close(layer(x[i:i + 1], kept)[0], masked[i]) and close(block(image[i:i + 1], kept)[0], answer[i])


def test_each_query_may_have_a_mask_of_its_own():
    q, k, v = (torch.randn(2, 4, 8) for _ in range(3))
    causal = torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 4, 4)
    masked = attend(q, k, v, heads=2, mask=causal)
    for i in range(4):
        assert close(attend(q[:, i:i + 1], k[:, :i + 1], v[:, :i + 1], heads=2), masked[:, i:i + 1])


@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_learns_as_full_precision(masked):
    """On a CPU short rows are multiplied out instead of going to the fused function; the answers must not differ."""
    q, k, v = (torch.randn(2, n, 16) for n in (6, 5, 5))
    mask = torch.rand(2, 5) < 0.6 if masked else None
    if masked:
        mask[:, 0] = True
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        parts = [part.detach().to(dtype).requires_grad_() for part in (q, k, v)]
        out = attend(*parts, heads=4, mask=mask)
        out.float().square().sum().backward()
        with torch.no_grad():
            assert close(attend(*parts, heads=4, mask=mask).float(), out.float(), 0.03)
        found.append([out.detach(), *(part.grad for part in parts)])
    for full, half in zip(*found, strict=True):  # bfloat16 keeps 8 bits
        assert (full - half.float()).abs().max() < 0.03 * full.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_may_listen_to_nothing_hears_nothing(dtype):
    """On both ways through `attend`, and in the gradient: one caption without a word must not spoil a batch."""
    q, k, v = (torch.randn(2, 5, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[False] * 5, [True, False, True, True, False]])
    out = attend(q, k, v, heads=2, mask=mask)
    assert torch.equal(out[0], torch.zeros_like(out[0])) and out[1].abs().min() > 0
    out.square().sum().backward()
    assert all(part.grad.isfinite().all() for part in (q, k, v))
    shares = attention_weights(q, k, mask[:, None]).sum(-1)
    assert close(shares.float(), mask.any(1).float()[:, None].expand(2, 5), 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_mask_of_numbers_is_refused(dtype):
    x = torch.randn(1, 3, 8)
    with pytest.raises(ValueError, match="mask must be boolean"):
        attend(x, x, x, heads=2, mask=torch.tensor([[1, 1, 0]], dtype=dtype))


def test_attention_does_not_care_for_the_order_of_the_context():
    layer, x, context = Attention(8, heads=2), torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    assert close(layer(x, context), layer(x, context[:, [4, 0, 3, 1, 2]]), 1e-6)
    assert not close(layer(x, context), layer(x, context[:, :4]), 1e-3)


def test_biases_are_where_public_weights_have_them():
    assert [name for name, _ in Attention(8, heads=2).named_parameters()] == [
        "to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"]
    assert AttentionBlock(8, groups=4).to_q.bias is not None


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="8 channels can't be split into 3 heads"):
        Attention(8, heads=3)


def test_attention_block_by_hand():
    block, x = AttentionBlock(8, heads=2, groups=4), torch.randn(2, 8, 3, 2)
    row = block.group_norm(x).flatten(2).transpose(1, 2)
    expected = x + attention_by_loops(block, row, row).transpose(1, 2).reshape(2, 8, 3, 2)
    assert close(block(x), expected)
    assert block.group_norm.eps == 1e-6


@pytest.mark.parametrize("size", [(7,), (3, 5), (2, 3, 4), (2, 1, 3, 2)])
def test_attention_block_in_any_number_of_dimensions(size):
    block, x = AttentionBlock(8, heads=2, groups=4), torch.randn(2, 8, *size)
    flat = block(x.flatten(2)[..., None])  # the same places in one column
    assert block(x).shape == x.shape and close(block(x), flat.view(x.shape))


def test_words_stand_beside_the_places_by_hand():
    block = AttentionBlock(8, heads=2, context_width=5, groups=4)
    x, words = torch.randn(2, 8, 3, 2), torch.randn(2, 4, 5)
    row = block.group_norm(x).flatten(2).transpose(1, 2)
    q = block.to_q(row)
    k = torch.cat([block.add_k_proj(words), block.to_k(row)], 1)
    v = torch.cat([block.add_v_proj(words), block.to_v(row)], 1)
    mixed = torch.zeros(2, 6, 8)
    for head in (slice(0, 4), slice(4, 8)):
        mixed[..., head] = torch.softmax(q[..., head] @ k[..., head].mT / 2, -1) @ v[..., head]
    assert close(block(x, words), x + block.to_out[0](mixed).mT.reshape(2, 8, 3, 2))
    assert not close(block(x, words), block(x, words + 1), 1e-3)


def test_attention_block_moves_with_its_places():
    """It has no idea of where a place is: shuffled places give the same answers, shuffled."""
    block, x = AttentionBlock(8, groups=4), torch.randn(1, 8, 1, 6)
    order = [3, 1, 5, 0, 2, 4]
    assert close(block(x[..., order]), block(x)[..., order])


# Transformer


def test_geglu_opens_the_first_half_by_the_second():
    layer, x = GEGLU(4, 6), torch.randn(3, 4)
    value, gate = (x @ layer.proj.weight.T + layer.proj.bias).split(6, dim=1)
    normal = 0.5 * (1 + torch.erf(gate / math.sqrt(2)))  # exact, not the tanh approximation
    assert close(layer(x), value * gate * normal)


def test_feed_forward_keys_and_width():
    layer = FeedForward(4)
    assert {key: tuple(p.shape) for key, p in layer.state_dict().items()} == {
        "net.0.proj.weight": (32, 4), "net.0.proj.bias": (32,), "net.2.weight": (4, 16), "net.2.bias": (4,)}
    x = torch.randn(2, 3, 4)
    assert close(layer(x), layer.net[2](layer.net[0](x)))


def test_transformer_block_by_hand():
    block, x, context = TransformerBlock(8, heads=2, context_width=5), torch.randn(2, 3, 8), torch.randn(2, 4, 5)
    h = x + block.attn1(block.norm1(x))
    h = h + block.attn2(block.norm2(h), context)
    assert close(block(x, context), h + block.ff(block.norm3(h)))
    assert not close(block(x, context), block(x, context + 1), 1e-3)


@pytest.mark.parametrize("linear", [True, False])
def test_spatial_transformer_projects_alike_by_linear_layer_and_by_convolution(linear):
    one = SpatialTransformer(8, heads=2, context_width=5, depth=2, linear=linear, groups=4)
    other = SpatialTransformer(8, heads=2, context_width=5, depth=2, linear=not linear, groups=4)
    shapes = other.state_dict()
    other.load_state_dict({key: p.reshape(shapes[key].shape) for key, p in one.state_dict().items()})
    x, context = torch.randn(2, 8, 3, 4), torch.randn(2, 6, 5)
    assert close(one(x, context), other(x, context))
    assert len(one.transformer_blocks) == 2 and one.norm.eps == 1e-6


def test_spatial_transformer_adds_to_its_input():
    block = SpatialTransformer(8, heads=2, context_width=5, groups=4)
    nn.init.zeros_(block.proj_out.weight), nn.init.zeros_(block.proj_out.bias)
    x = torch.randn(2, 8, 3, 4)
    assert torch.equal(block(x, torch.randn(2, 6, 5)), x)


# Down and up


def test_downsample_pads_on_all_sides_or_below_and_right():
    x = torch.randn(1, 4, 6, 8)
    for padding in (1, 0):
        layer = Downsample(4, padding=padding)
        padded = torch.zeros(1, 4, 8, 10)
        padded[:, :, padding:6 + padding, padding:8 + padding] = x
        expected = F.conv2d(padded, layer.conv.weight, layer.conv.bias)[:, :, ::2, ::2][:, :, :3, :4]
        assert layer(x).shape == (1, 4, 3, 4) and close(layer(x), expected)


def test_upsample_repeats_pixels_before_the_convolution():
    layer, x = Upsample(4), torch.randn(2, 4, 3, 5)
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert close(layer(x), F.conv2d(doubled, layer.conv.weight, layer.conv.bias, padding=1))


# What all have in common


def blocks():
    context = torch.randn(3, 4, 5)
    yield ResidualBlock(8, 12, time_width=6, groups=4), torch.randn(3, 8, 4, 6), (torch.randn(3, 6),)
    yield ResidualBlock(8, 8, time_width=6, groups=4, scale_shift=True, resample="up"), torch.randn(3, 8, 4, 6), (
        torch.randn(3, 6),)
    yield AttentionBlock(8, heads=2, groups=4), torch.randn(3, 8, 4, 6), ()
    yield AttentionBlock(8, heads=2, context_width=5, groups=4), torch.randn(3, 8, 4, 6), (context,)
    yield SpatialTransformer(8, heads=2, context_width=5, groups=4), torch.randn(3, 8, 4, 6), (context,)
    yield Downsample(8, padding=0), torch.randn(3, 8, 4, 6), ()
    yield Upsample(8), torch.randn(3, 8, 4, 6), ()
    yield TransformerBlock(8, heads=2, context_width=5), torch.randn(3, 7, 8), (context,)
    yield Attention(8, heads=2, context_width=5), torch.randn(3, 7, 8), (context,)
    yield TimeEmbedding(8, 6), torch.randn(3, 8), ()


@pytest.mark.parametrize("number", range(10))
def test_every_block_treats_each_picture_alone_and_learns_everywhere(number):
    block, x, others = list(blocks())[number]
    x.requires_grad_()
    together = block(x, *others)
    for i in range(3):
        assert close(block(x[i:i + 1], *(other[i:i + 1] for other in others))[0], together[i])
    together.square().sum().backward()
    assert x.grad.abs().sum() > 0
    dead = [name for name, p in block.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias adds the same to all scores of a query, and softmax doesn't see it.
    assert [name for name in dead if not name.endswith(("to_k.bias", "add_k_proj.bias"))] == []
