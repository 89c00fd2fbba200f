"""The tensors that GLIDE's and Karlo's U-Nets have in guided diffusion's naming, listed without our code.

The lists follow from the published layouts: the numbering of input and output blocks, the places of the layers inside
residual blocks and attention, and the widths. The totals of GLIDE's checkpoints are known; what its text transformer
holds is subtracted.
"""

import pytest
import torch

from diffusionbook.checkpoints import to_guided_diffusion
from diffusionbook.unet import UNet, UNetConfig


def expected(widths, blocks, *, attend, into=3, out=6, words=None, scale_shift=True, classes=0, middle=True):
    """Names and shapes of a U-Net with `widths` per level, attention at the levels in `attend`."""
    time, shapes = 4 * widths[0], {}

    def put(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def residual(name, before, after):
        put(f"{name}.in_layers.0", before)
        put(f"{name}.in_layers.2", after, before, 3, 3)
        put(f"{name}.emb_layers.1", after * (2 if scale_shift else 1), time)
        put(f"{name}.out_layers.0", after)
        put(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            put(f"{name}.skip_connection", after, before, 1, 1)

    def attention(name, width):
        put(f"{name}.norm", width)
        put(f"{name}.qkv", 3 * width, width, 1)
        put(f"{name}.proj_out", width, width, 1)
        if words:
            put(f"{name}.encoder_kv", 2 * width, words, 1)

    put("time_embed.0", time, widths[0])
    put("time_embed.2", time, time)
    if classes:
        shapes["label_emb.weight"] = (classes, time)
    put("input_blocks.0.0", widths[0], into, 3, 3)
    passed, width, number = [widths[0]], widths[0], 1
    for level, after in enumerate(widths):
        for _ in range(blocks):
            residual(f"input_blocks.{number}.0", width, after)
            if level in attend:
                attention(f"input_blocks.{number}.1", after)
            width, number = after, number + 1
            passed.append(width)
        if level + 1 < len(widths):  # half the size, in a residual block
            residual(f"input_blocks.{number}.0", width, width)
            number += 1
            passed.append(width)
    residual("middle_block.0", width, width)
    if middle:
        attention("middle_block.1", width)
    residual(f"middle_block.{1 + middle}", width, width)
    number = 0
    for level in reversed(range(len(widths))):
        for block in range(blocks + 1):
            residual(f"output_blocks.{number}.0", width + passed.pop(), widths[level])
            width, place = widths[level], 1
            if level in attend:
                attention(f"output_blocks.{number}.1", width)
                place = 2
            if level and block == blocks:  # twice the size
                residual(f"output_blocks.{number}.{place}", width, width)
            number += 1
    put("out.0", widths[0])
    put("out.2", out, widths[0], 3, 3)
    assert not passed
    return shapes


GLIDE = {"widths": (192, 384, 576, 768), "blocks": 3, "attend": (1, 2, 3), "words": 512}
GLIDE_UP = {"widths": (192, 192, 384, 384, 768, 768), "blocks": 2, "attend": (3, 4, 5), "words": 512, "into": 6}
#: GLIDE's text transformer: 12 tensors in each of 16 layers, three tables, final norm and projection.
TEXT = 16 * 12 + 3 + 2 + 2
NETWORKS = {
    "glide": (GLIDE, 783 - TEXT),
    "glide-inpaint": (GLIDE | {"into": 7}, 783 - TEXT),
    "glide-upsampler": (GLIDE_UP, 797 - TEXT),
    "glide-upsampler-inpaint": (GLIDE_UP | {"into": 10}, 797 - TEXT),
    "guided-64": ({"widths": (192, 384, 576, 768), "blocks": 3, "attend": (1, 2, 3), "classes": 1000}, 541),
    "guided-256": ({"widths": (256, 256, 512, 512, 1024, 1024), "blocks": 2, "attend": (3, 4, 5)}, 566),
    "dalle2-decoder": ({"widths": (320, 640, 960, 1280), "blocks": 3, "attend": (1, 2, 3), "words": 1536}, None),
    "dalle2-upsampler": ({"widths": (320, 640, 960, 1280), "blocks": 3, "attend": (), "into": 6, "out": 3,
                          "scale_shift": False, "middle": False}, 408),
}
#: Written out by hand: where each kind of tensor stands, and how large it is.
SPOTS = {
    "glide": {
        "time_embed.0.weight": (768, 192), "input_blocks.0.0.weight": (192, 3, 3, 3),
        "input_blocks.4.0.in_layers.2.weight": (192, 192, 3, 3),  # the first halving
        "input_blocks.5.0.skip_connection.weight": (384, 192, 1, 1),
        "input_blocks.5.0.emb_layers.1.weight": (768, 768),
        "input_blocks.5.1.qkv.weight": (1152, 384, 1), "input_blocks.5.1.encoder_kv.weight": (768, 512, 1),
        "input_blocks.15.1.proj_out.bias": (768,), "middle_block.1.encoder_kv.bias": (1536,),
        "middle_block.2.out_layers.3.weight": (768, 768, 3, 3),
        "output_blocks.0.0.in_layers.0.weight": (1536,), "output_blocks.3.2.in_layers.2.weight": (768, 768, 3, 3),
        "output_blocks.4.0.skip_connection.weight": (576, 1344, 1, 1),
        "output_blocks.15.0.in_layers.2.weight": (192, 384, 3, 3), "out.2.weight": (6, 192, 3, 3),
    },
    "glide-upsampler": {
        "input_blocks.0.0.weight": (192, 6, 3, 3), "input_blocks.10.1.encoder_kv.weight": (768, 512, 1),
        "output_blocks.2.2.in_layers.2.weight": (768, 768, 3, 3),  # after an attention
        "output_blocks.11.1.in_layers.2.weight": (384, 384, 3, 3),  # after none
        "output_blocks.17.0.out_layers.3.bias": (192,),
    },
    "glide-inpaint": {"input_blocks.0.0.weight": (192, 7, 3, 3)},
    "glide-upsampler-inpaint": {"input_blocks.0.0.weight": (192, 10, 3, 3)},
    "guided-64": {"label_emb.weight": (1000, 768)},
    "guided-256": {"input_blocks.17.1.qkv.weight": (3072, 1024, 1), "out.2.bias": (6,)},
    "dalle2-decoder": {"input_blocks.5.1.encoder_kv.weight": (1280, 1536, 1),
                       "middle_block.1.qkv.weight": (3840, 1280, 1), "out.2.weight": (6, 320, 3, 3)},
    "dalle2-upsampler": {"middle_block.1.in_layers.2.weight": (1280, 1280, 3, 3),  # no attention before it
                         "input_blocks.1.0.emb_layers.1.weight": (320, 1280), "out.2.weight": (3, 320, 3, 3)},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_has_its_public_name_and_shape(name):
    layout, count = NETWORKS[name]
    with torch.device("meta"):
        net = UNet(UNetConfig.preset(name))
    shapes = {key: tuple(p.shape) for key, p in to_guided_diffusion(net.state_dict(), head_width=64).items()}
    assert shapes == expected(**layout)
    assert count is None or len(shapes) == count
    assert SPOTS[name].items() <= shapes.items()
