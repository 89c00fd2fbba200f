"""Chapter 15: GLIDE's public files by names, shapes and counts, and its arithmetic against diffusers and PyTorch."""

import pytest
import torch
from torch import nn

from diffusionbook.checkpoints import to_guided_diffusion
from diffusionbook.denoising import Denoiser
from diffusionbook.glide import GlideText, GlideTextConfig, to_openai_transformer
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.unet import UNet, UNetConfig

PUBLIC = {"glide": (385_030_726, 783), "glide-inpaint": (385_037_638, 783), "glide-upsampler": (398_361_286, 797),
          "glide-upsampler-inpaint": (398_368_198, 797)}


@pytest.mark.parametrize("preset", PUBLIC)
def test_a_public_file_has_these_tensors(preset):
    parameters, tensors = PUBLIC[preset]
    with torch.device("meta"):
        unet, text = UNet(UNetConfig.preset(preset)), GlideText(GlideTextConfig())
        theirs = to_guided_diffusion(unet.state_dict(), head_width=unet.config.head_width())
        theirs |= to_openai_transformer(text.state_dict(), heads=8)
    assert unet.count_parameters() + text.count_parameters() == parameters
    assert len(theirs) == tensors and sum(tensor.numel() for tensor in theirs.values()) == parameters
    block = "transformer.resblocks.15."
    assert {key.removeprefix(block): tuple(theirs[key].shape) for key in theirs if key.startswith(block)} == {
        "ln_1.weight": (512,), "ln_1.bias": (512,), "ln_2.weight": (512,), "ln_2.bias": (512,),
        "attn.c_qkv.weight": (1536, 512), "attn.c_qkv.bias": (1536,), "attn.c_proj.weight": (512, 512),
        "attn.c_proj.bias": (512,), "mlp.c_fc.weight": (2048, 512), "mlp.c_fc.bias": (2048,),
        "mlp.c_proj.weight": (512, 2048), "mlp.c_proj.bias": (512,)}
    expected = {"positional_embedding": (128, 512), "padding_embedding": (128, 512), "final_ln.weight": (512,),
                "token_embedding.weight": (50257, 512), "transformer_proj.weight": (768, 512),
                "transformer_proj.bias": (768,), "middle_block.1.encoder_kv.weight": (1536, 512, 1),
                "middle_block.1.qkv.weight": (2304, 768, 1), "out.2.weight": (6, 192, 3, 3)}
    assert {key: tuple(theirs[key].shape) for key in expected} == expected


def random_weights(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


class TextOfPyTorch(nn.Module):
    """GLIDE's text transformer in PyTorch's own layers, loaded from the public names."""

    def __init__(self, state, *, heads):
        super().__init__()
        self.state, width = state, state["token_embedding.weight"].shape[1]
        count = sum(key.endswith("ln_1.weight") for key in state)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
                                       norm_first=True) for _ in range(count))
        for i, layer in enumerate(self.layers):
            mine = {key.removeprefix(f"transformer.resblocks.{i}."): value for key, value in state.items()}
            layer.load_state_dict({
                "self_attn.in_proj_weight": self.ungroup(mine["attn.c_qkv.weight"], heads),
                "self_attn.in_proj_bias": self.ungroup(mine["attn.c_qkv.bias"], heads),
                **{f"self_attn.out_proj.{kind}": mine[f"attn.c_proj.{kind}"] for kind in ("weight", "bias")},
                **{f"linear{k}.{kind}": mine[f"mlp.{name}.{kind}"] for k, name in ((1, "c_fc"), (2, "c_proj"))
                   for kind in ("weight", "bias")},
                **{f"norm{k}.{kind}": mine[f"ln_{k}.{kind}"] for k in (1, 2) for kind in ("weight", "bias")}})
        self.eval()

    @staticmethod
    def ungroup(rows, heads):
        """From q, k and v of the first head, of the second, … to all q, all k, all v."""
        size = len(rows) // heads // 3
        return torch.cat([torch.cat([rows[(3 * h + part) * size:(3 * h + part + 1) * size] for h in range(heads)])
                          for part in range(3)])

    @torch.no_grad()
    def forward(self, ids, mask):
        state = self.state
        x = state["token_embedding.weight"][ids] + state["positional_embedding"]
        x = torch.where(mask[..., None], x, state["padding_embedding"][None])
        for layer in self.layers:
            x = layer(x)
        x = nn.functional.layer_norm(x, x.shape[-1:], state["final_ln.weight"], state["final_ln.bias"])
        return x, x[:, -1] @ state["transformer_proj.weight"].T + state["transformer_proj.bias"]


TEXT = GlideTextConfig(vocab_size=60, context_length=9, width=24, layers=3, heads=3, time_width=64, end_id=59)


def read(text):
    torch.manual_seed(2)
    ids = torch.randint(0, 59, (2, 9))
    mask = torch.arange(9) < torch.tensor([[4], [9]])
    state = to_openai_transformer(text.state_dict(), heads=TEXT.heads)
    return ids, mask, state


@torch.no_grad()
def test_the_text_transformer_is_the_one_of_pytorch_in_public_names():
    text = random_weights(GlideText(TEXT))
    ids, mask, state = read(text)
    context, embedding = TextOfPyTorch(state, heads=3)(ids, mask)
    found = text(ids, mask)
    assert context.std() > 0.1 and embedding.std() > 0.1
    torch.testing.assert_close(found.context, context, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.embedding, embedding, rtol=1e-4, atol=1e-5)
    again = GlideText(TEXT).load(state)
    torch.testing.assert_close(again(ids, mask).context, context, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_whole_tiny_glide_answers_as_diffusers_does(tmp_path):
    """Text by PyTorch, then the U-Net by diffusers, against a Denoiser that was told the Condition of GlideText."""
    diffusers = pytest.importorskip("diffusers")
    text = random_weights(GlideText(TEXT))
    unet = random_weights(UNet(UNetConfig(
        channels=(16, 32, 48), attention=(None, "added", "added"), heads=(2, 4, 6), in_channels=3, out_channels=6,
        context_width=24, groups=8, scale_shift=True, residual_resampling=True)))
    ids, mask, state = read(text)
    context, embedding = TextOfPyTorch(state, heads=3)(ids, mask)
    unet.save_pretrained(tmp_path)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path).eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 700])
    output = theirs(x, t, context, class_labels=embedding).sample
    schedule = NoiseSchedule.cosine()
    answer = Denoiser(unet, schedule, condition=text(ids, mask))(x, t)
    torch.testing.assert_close(answer.eps, output[:, :3], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(answer.variance_mix, (output[:, 3:] + 1) / 2, rtol=1e-4, atol=2e-5)
