"""Chapter 12 against torch's and diffusers' own, and against the public tensors of openai/DALL-E."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from diffusionbook.dvae import DVAE, VQ, DVAEConfig, gumbel_noise, gumbel_softmax, map_pixels

SMALL = DVAEConfig(codes=12, width=8, embedding=6, groups=3, blocks=2, sample_size=16)


def randomise(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def openai_shapes(*, width, codes, start, groups=4, blocks=2):
    """Names and shapes of the tensors in encoder.pkl and decoder.pkl, by the rules of their two files."""
    def layer(name, a, b, kernel):
        shapes.update({f"{name}.w": (b, a, kernel, kernel), f"{name}.b": (b,)})

    shapes = {}
    layer("encoder.blocks.input", 3, width, 7)
    layer("decoder.blocks.input", codes, start, 1)
    for part, kernels in (("encoder", (3, 3, 3, 1)), ("decoder", (1, 3, 3, 3))):
        ladder = [width * 2**k for k in range(groups)]
        before = ladder[0] if part == "encoder" else start
        for group, out in enumerate(ladder if part == "encoder" else ladder[::-1], start=1):
            for block in range(1, blocks + 1):
                name, quarter = f"{part}.blocks.group_{group}.block_{block}", out // 4
                steps = zip((before, quarter, quarter, quarter), (quarter, quarter, quarter, out), kernels, strict=True)
                for i, (a, b, kernel) in enumerate(steps, start=1):
                    layer(f"{name}.res_path.conv_{i}", a, b, kernel)
                if before != out:
                    layer(f"{name}.id_path", before, out, 1)
                before = out
    layer("encoder.blocks.output.conv", width * 2 ** (groups - 1), codes, 1)
    layer("decoder.blocks.output.conv", width, 6, 1)
    return shapes


def test_the_public_dvae_has_the_same_tensors():
    with torch.device("meta"):
        model = DVAE(DVAEConfig.preset("openai"))
    assert {key: tuple(p.shape) for key, p in model.state_dict().items()} == \
        openai_shapes(width=256, codes=8192, start=128)
    assert model.count_parameters() == 97_616_006
    assert model.factor == 8 and model.encode(torch.empty(1, 3, 256, 256, device="meta")).shape == (1, 32, 32)


def test_two_public_files_are_one_state_dict():
    model = randomise(DVAE(SMALL))
    files = {part: getattr(model, part).state_dict() for part in ("encoder", "decoder")}
    assert set(files["encoder"]) >= {"blocks.group_2.block_1.id_path.w", "blocks.output.conv.b", "blocks.input.w"}
    both = {f"{part}.{key}": tensor for part, state in files.items() for key, tensor in state.items()}
    again = DVAE(SMALL).load(both)
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(again.encode(images), model.encode(images))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_towers_compute_what_the_public_ones_do(part):
    """The rules of openai/DALL-E once more, as plain functions of the state dict."""
    model = randomise(DVAE(SMALL))
    state = {key.removeprefix(f"{part}.blocks."): p for key, p in model.state_dict().items() if key.startswith(part)}

    def convolve(x, name):
        weight = state[f"{name}.w"]
        return F.conv2d(x, weight, state[f"{name}.b"], padding=(weight.shape[-1] - 1) // 2)

    x = torch.rand(2, *((3, 16, 16) if part == "encoder" else (12, 4, 4)), generator=torch.Generator().manual_seed(1))
    h = convolve(x, "input")
    for group in (1, 2, 3):
        for block in (1, 2):
            name, inner = f"group_{group}.block_{block}", h
            for i in range(1, 5):
                inner = convolve(inner.relu(), f"{name}.res_path.conv_{i}")
            kept = convolve(h, f"{name}.id_path") if f"{name}.id_path.w" in state else h
            h = kept + inner / (3 * 2) ** 2
        if group < 3:
            h = F.max_pool2d(h, 2) if part == "encoder" else F.interpolate(h, scale_factor=2)
    expected = convolve(h.relu(), "output.conv")
    with torch.no_grad():
        torch.testing.assert_close(getattr(model, part)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_the_soft_draw_is_torchs(temperature):
    logits = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    theirs = F.gumbel_softmax(logits, tau=temperature, dim=1)
    ours = gumbel_softmax(logits, gumbel_noise(logits.shape, torch.Generator().manual_seed(5)),
                          temperature=temperature, dim=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_nearest_vector_and_the_jumping_gradient_are_those_of_diffusers():
    quantizer = pytest.importorskip("diffusers.models.autoencoders.vq_model").VectorQuantizer
    model = randomise(VQ(dataclasses.replace(SMALL, codes=20)))
    theirs = quantizer(20, 6, beta=0.25, legacy=False)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    features = model.encoder(map_pixels(images))
    some = features.detach().permute(0, 2, 3, 1).flatten(0, 2)[:20]
    model.codebook.copy_(some + 0.01 * torch.randn(20, 6))  # where the features are, so that several are chosen
    theirs.embedding.weight.data.copy_(model.codebook)
    vectors, loss, (_, _, codes) = theirs(features)
    ours = model.choose(features)
    assert torch.equal(ours.flatten(), codes.flatten()) and len(codes.unique()) > 3
    torch.testing.assert_close(model.vectors(ours), vectors, rtol=1e-4, atol=1e-5)
    # Theirs adds the codebook's own loss to beta times the commitment, and both have the same value.
    torch.testing.assert_close(1.25 * model(images)[1], loss, rtol=1e-4, atol=1e-5)
