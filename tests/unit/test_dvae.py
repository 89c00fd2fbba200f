"""Chapter 12: the draw that can be learned through, the KL that does not grow, and both kinds of codebook."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from diffusionbook.data import emoji
from diffusionbook.dvae import (
    DVAE,
    VQ,
    Annealed,
    DVAEConfig,
    gumbel_noise,
    gumbel_softmax,
    logit_laplace,
    map_pixels,
    middle,
    perplexity,
    restoration_loss,
    uniform_kl,
    unmap_pixels,
)
from diffusionbook.training import train

SMALL = DVAEConfig(codes=12, width=8, embedding=6, groups=3, blocks=1, sample_size=16)


def pictures(count=2, size=(16, 24), seed=1):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def build(kind, config=SMALL):
    torch.manual_seed(0)
    model = kind(config).eval()
    if kind is VQ:
        model.codebook.mul_(0.2)  # as small as the features of a new encoder, so that all entries have a chance
    return model


# Draws


def test_gumbel_noise_has_the_mean_and_variance_of_its_kind():
    noise = gumbel_noise((400_000,), torch.Generator().manual_seed(0))
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)  # Euler's constant
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    assert noise.isfinite().all()


def test_gumbel_noise_follows_its_generator():
    draw = lambda seed: gumbel_noise((5, 3), torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))


def test_the_largest_noisy_logit_is_a_fair_draw():
    logits = torch.tensor([0.0, 1.0, -2.0, 0.5])
    draws = (logits + gumbel_noise((200_000, 4), torch.Generator().manual_seed(0))).argmax(1)
    share = torch.bincount(draws, minlength=4) / len(draws)
    assert (share - logits.softmax(0)).abs().max() < 0.004  # four standard errors


def test_a_cold_draw_is_the_hard_one_and_a_warm_one_is_not():
    g = torch.Generator().manual_seed(0)
    logits, noise = torch.randn(50, 6, generator=g), gumbel_noise((50, 6), g)
    hard = F.one_hot((logits + noise).argmax(1), 6).float()
    assert torch.allclose(gumbel_softmax(logits, noise, temperature=1e-4), hard, atol=1e-3)
    warm = gumbel_softmax(logits, noise, temperature=5.0)
    assert torch.allclose(warm.sum(1), torch.ones(50)) and warm.max() < 0.9
    assert torch.equal(warm.argmax(1), hard.argmax(1))


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_temperatures_that_are_not_positive_are_refused(temperature):
    with pytest.raises(ValueError, match="must be positive"):
        gumbel_softmax(torch.zeros(3), torch.zeros(3), temperature=temperature)


# The KL


def test_kl_to_the_even_choice_in_closed_form():
    even, sure = torch.zeros(1, 8, 2, 2), torch.full((1, 8, 2, 2), -1e4)
    sure[:, 3] = 0
    half = torch.full((1, 8, 2, 2), -1e4)
    half[:, :2] = 0
    nats = [uniform_kl(logits.log_softmax(1)).item() for logits in (even, sure, half)]
    assert nats == pytest.approx([0, 4 * math.log(8), 4 * math.log(4)], abs=1e-5)


def test_kl_equals_the_one_of_torch():
    logits = torch.randn(3, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    places = torch.distributions.Categorical(logits=logits.movedim(1, -1))
    even = torch.distributions.Categorical(logits=torch.zeros(5))
    reference = torch.distributions.kl_divergence(places, even).sum((1, 2))
    assert torch.allclose(uniform_kl(logits.log_softmax(1)), reference, rtol=1e-5)


def test_the_kl_does_not_grow_with_the_batch():
    """The trap: `F.kl_div(prior, posterior, reduction="batchmean")` divides by the size of its first argument, 1."""
    log_probs = torch.randn(1, 7, 3, 3, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    ours, trap = {}, {}
    for batch in (1, 4, 16):
        many = log_probs.expand(batch, -1, -1, -1)
        ours[batch] = uniform_kl(many).mean().item()
        even = torch.tensor([-math.log(7)])
        trap[batch] = F.kl_div(even, many, None, None, "batchmean", log_target=True).item()
    assert ours[4] == pytest.approx(ours[1], rel=1e-5) and ours[16] == pytest.approx(ours[1], rel=1e-5)
    assert trap[1] == pytest.approx(ours[1], rel=1e-4) and trap[16] == pytest.approx(16 * trap[1], rel=1e-4)


def test_the_loss_of_a_doubled_batch_is_the_same():
    annealed = Annealed(build(DVAE), steps=10).eval()
    annealed.step += 5
    images, noise = pictures(), gumbel_noise((2, 12, 4, 6), torch.Generator().manual_seed(0))
    kl = [uniform_kl(annealed.dvae(x, n, temperature=1.0)[1]).mean() / images[0].numel()
          for x, n in ((images, noise), (torch.cat([images] * 2), torch.cat([noise] * 2)))]
    assert kl[0] > 1e-4 and torch.allclose(kl[0], kl[1], rtol=1e-5)


# The likelihood


@pytest.mark.parametrize("mean, log_scale", [(0.0, 0.0), (1.5, -1.0), (-2.0, 0.4)])
def test_the_density_adds_up_to_one_and_has_its_middle_where_it_should(mean, log_scale):
    edges = torch.linspace(0, 1, 2_000_001, dtype=torch.float64)
    x = (edges[1:] + edges[:-1]) / 2
    density = logit_laplace(x, torch.tensor(mean), torch.tensor(log_scale)).exp() / len(x)
    assert density.sum().item() == pytest.approx(1, abs=2e-3)
    below = density[x < torch.sigmoid(torch.tensor(mean))].sum().item()
    assert below == pytest.approx(0.5, abs=2e-3)


def test_the_density_equals_the_one_of_torch():
    x = torch.rand(100, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    base = torch.distributions.Laplace(0.3, math.exp(-0.7))
    reference = torch.distributions.TransformedDistribution(base, torch.distributions.SigmoidTransform())
    ours = logit_laplace(x, torch.tensor(0.3), torch.tensor(-0.7))
    torch.testing.assert_close(ours, reference.log_prob(x), rtol=1e-4, atol=1e-5)


def test_pixels_go_to_the_range_of_openai_and_back():
    images = pictures()
    assert torch.allclose(map_pixels(images), 0.8 * (images + 1) / 2 + 0.1)
    assert torch.allclose(unmap_pixels(map_pixels(images)), images, atol=1e-6)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [-1, 1]


def test_the_best_guess_is_the_middle_of_the_density():
    images = pictures(1, (4, 4))
    output = torch.cat([map_pixels(images).logit(), torch.zeros_like(images)], dim=1)
    assert torch.allclose(middle(output), images, atol=1e-5)
    worse = output + torch.tensor([0.5, 0, 0, 0, 0, 0]).view(1, 6, 1, 1)
    assert restoration_loss(output, images) < restoration_loss(worse, images)


# The networks


@pytest.mark.parametrize("kind", [DVAE, VQ])
def test_shapes_and_ranges(kind):
    model, images = build(kind), pictures()
    codes = model.encode(images)
    assert model.factor == 4 and codes.shape == (2, 4, 6) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < 12 and len(codes.unique()) > 1
    restored = model.decode(codes)
    assert restored.shape == images.shape and -1 <= restored.min() and restored.max() <= 1 and restored.std() > 0.01


def test_decoding_codes_is_decoding_one_hot_pictures():
    model = build(DVAE)
    codes = torch.randint(12, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    one_hot = F.one_hot(codes, 12).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        torch.testing.assert_close(model.decode(codes), middle(model.decoder(one_hot)), rtol=1e-5, atol=1e-6)


def test_the_encoder_takes_the_likeliest_code():
    model, images = build(DVAE), pictures()
    with torch.no_grad():
        _, log_probs = model(images, torch.zeros(2, 12, 4, 6), temperature=1.0)
    assert torch.equal(model.encode(images), log_probs.argmax(1))
    assert torch.allclose(log_probs.exp().sum(1), torch.ones(2, 4, 6))


def test_vq_takes_the_nearest_vector():
    model, images = build(VQ), pictures()
    with torch.no_grad():
        features = model.features(images)
    distance = (features[:, None] - model.codebook[None, :, :, None, None]).square().sum(2)
    assert torch.equal(model.encode(images), distance.argmin(1))


@pytest.mark.parametrize("kind", [DVAE, VQ])
def test_a_picture_does_not_depend_on_its_neighbours(kind):
    model, images = build(kind), pictures(3)
    with torch.no_grad():
        codes, together = model.encode(images), model.decode(model.encode(images))
        for i in range(3):
            assert torch.equal(model.encode(images[i:i + 1])[0], codes[i])
            assert torch.allclose(model.decode(codes[i:i + 1])[0], together[i], atol=1e-6)


def test_the_blocks_start_near_the_identity():
    model = build(DVAE, dataclasses.replace(SMALL, blocks=2))
    block, x = model.encoder.blocks.group_2.block_2, torch.randn(1, 16, 4, 4)
    assert block.gain == pytest.approx(1 / 36)  # 3 groups of 2 blocks
    with torch.no_grad():
        assert 0 < (block(x) - x).std() < 0.1 * x.std()


def test_gradients_reach_every_parameter_of_the_dvae():
    model = build(DVAE)
    noise = gumbel_noise((2, 12, 4, 6), torch.Generator().manual_seed(0))
    output, log_probs = model(pictures(), noise, temperature=1.0)
    (restoration_loss(output, pictures()) + uniform_kl(log_probs).mean()).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_the_gradient_through_a_soft_draw_equals_a_finite_difference():
    model, images = build(DVAE).double(), pictures(1, (8, 8)).double()
    noise = gumbel_noise((1, 12, 2, 2), torch.Generator().manual_seed(0)).double()
    weight = model.encoder.blocks.output.conv.w
    logits = model.encoder(map_pixels(images))

    def loss():
        soft = gumbel_softmax(model.encoder(map_pixels(images)), noise, temperature=0.7, dim=1)
        return model.decoder(soft).square().sum()

    assert logits.shape == noise.shape
    loss().backward()
    index, h = (4, 3, 0, 0), 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[index] += sign * h
            values.append(loss().item())
            weight[index] -= sign * h
    assert weight.grad[index].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-4)


def test_gradients_jump_over_the_choice_of_vq():
    model = build(VQ)
    output, commitment = model(pictures())
    restoration_loss(output, pictures()).backward()
    assert model.encoder.blocks.input.w.grad.abs().sum() > 0 and commitment > 0


# Training


def test_temperature_and_kl_weight_follow_the_step():
    annealed = Annealed(build(DVAE), steps=100, coldest=0.25)
    seen = []
    for step in (0, 50, 100, 1000):
        annealed.step.fill_(step)
        seen.append(annealed.temperature)
    assert seen == pytest.approx([1, 0.625, 0.25, 0.25])


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 9, "coldest": 0.0}, {"steps": 9, "coldest": 2.0}])
def test_a_cooling_that_makes_no_sense_is_refused(options):
    with pytest.raises(ValueError, match="steps must be at least 1 and coldest"):
        Annealed(build(DVAE), **options)


def test_training_counts_its_steps_and_goes_on_after_an_interruption(tmp_path):
    images = pictures(8, (16, 16))
    once = Annealed(build(DVAE), steps=6)
    train(once, images, Annealed.loss, steps=6, lr=1e-3, batch=4, every=3, progress=False)
    twice = Annealed(build(DVAE), steps=6)
    stopped = {"count": 0}

    def loss(net, batch, generator):
        stopped["count"] += 1
        if stopped["count"] == 5:
            raise KeyboardInterrupt
        return net.loss(batch, generator)

    with pytest.raises(KeyboardInterrupt):
        train(twice, images, loss, steps=6, lr=1e-3, batch=4, every=3, folder=tmp_path, progress=False)
    again = Annealed(build(DVAE), steps=6)
    train(again, images, Annealed.loss, steps=6, lr=1e-3, batch=4, every=3, folder=tmp_path, progress=False)
    assert once.step == again.step == 6
    for a, b in zip(once.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [DVAE, VQ])
def test_both_kinds_learn(kind):
    colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1]])
    images = colours[:, :, None, None].expand(-1, -1, 4, 4)
    model = build(kind, dataclasses.replace(SMALL, groups=2, width=16))
    net = Annealed(model, steps=40, kl_weight=0.0) if kind is DVAE else model
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        value, _ = net.train().loss(images, g)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert sum(losses[-5:]) / 5 < losses[0] - 0.2


@torch.no_grad()
def test_a_vq_is_a_dvae():
    vq, images = build(VQ), pictures(4)
    vq.codebook.copy_(vq.features(images).permute(0, 2, 3, 1).flatten(0, 2)[: SMALL.codes])
    dvae, codes = vq.as_dvae(), vq.encode(images)
    assert len(codes.unique()) > 3, "too few codes to tell anything"
    assert torch.equal(dvae.encode(images), codes)
    torch.testing.assert_close(dvae.decode(codes), vq.decode(codes), atol=1e-5, rtol=0)


def test_the_codebook_is_the_running_mean_of_its_features():
    model = build(VQ, dataclasses.replace(SMALL, codes=2)).train()
    model.codebook.copy_(torch.tensor([[0.0], [10.0]]).expand(2, 6))
    model.uses.fill_(16.0)
    model.sums.copy_(model.codebook * 16)
    features = torch.full((1, 6, 4, 8), 1.0)
    features[..., 4:] = 12.0
    codes = model.choose(features)
    assert codes[0].float().mean() == 0.5
    model._follow(features, codes, torch.Generator().manual_seed(0))
    assert torch.allclose(model.codebook, torch.tensor([[0.01 * 1], [0.99 * 10 + 0.01 * 12]]).expand(2, 6))


def test_a_vector_that_nothing_chooses_begins_anew_at_a_feature():
    model = build(VQ).train()
    model.codebook[1:] = 1e6
    model(pictures(), torch.Generator().manual_seed(0))
    assert model.codebook.abs().max() < 1e3
    before = model.codebook.clone()
    model.eval()(pictures())
    assert torch.equal(model.codebook, before)


# Use of the codes


@pytest.mark.parametrize("codes, count, expected", [
    (torch.zeros(5, dtype=torch.int64), 8, 1), (torch.arange(8), 8, 8), (torch.tensor([[0, 0], [3, 3]]), 8, 2)])
def test_perplexity(codes, count, expected):
    assert perplexity(codes, count) == pytest.approx(expected)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=50))
def test_perplexity_lies_between_one_and_the_kinds_in_use(codes):
    value = perplexity(torch.tensor(codes), 10)
    assert 1 - 1e-9 <= value <= len(set(codes)) + 1e-9


@pytest.mark.parametrize("codes", [torch.tensor([0, 4]), torch.tensor([-1, 0]), torch.tensor([0.5, 1.0])])
def test_what_is_not_a_code_has_no_perplexity(codes):
    with pytest.raises(ValueError, match=r"must be int64 and lie in \[0, 3\]"):
        perplexity(codes, 4)


def test_no_codes_have_no_perplexity():
    with pytest.raises(ValueError, match="at least one code"):
        perplexity(torch.empty(0, dtype=torch.int64), 4)


# Refusals


@pytest.mark.parametrize("images, message", [
    (torch.full((1, 3, 16, 16), 2.0), "divide by 127.5"),
    (torch.zeros(1, 3, 16, 18), "multiples of 4, got 16×18"),
    (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "uint8"),
])
def test_what_is_not_a_picture_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        build(DVAE).encode(images)


@pytest.mark.parametrize("codes, message", [
    (torch.zeros(1, 4, 4), "int64"),
    (torch.zeros(4, 4, dtype=torch.int64), r"\(B, h, w\)"),
    (torch.full((1, 4, 4), 12), r"lie in \[0, 11\]"),
    (torch.full((1, 4, 4), -1), r"lie in \[0, 11\]"),
])
@pytest.mark.parametrize("kind", [DVAE, VQ])
def test_what_is_not_a_code_is_refused(kind, codes, message):
    with pytest.raises(ValueError, match=message):
        build(kind).decode(codes)


@pytest.mark.parametrize("changes, message", [({"width": 6}, "multiple of 4"), ({"codes": 1}, "at least 2 codes")])
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_unknown_presets_and_other_configs_are_refused():
    with pytest.raises(ValueError, match="choose one of openai, emoji"):
        DVAEConfig.preset("vqgan")
    with pytest.raises(ValueError, match="not the config of a DVAE"):
        DVAEConfig.from_config({"_class_name": "AutoencoderKL"})


# Configs and files


@pytest.mark.parametrize("config", [SMALL, DVAEConfig.preset("openai"), DVAEConfig.preset("emoji")])
def test_configs_survive_the_file(config):
    assert DVAEConfig.from_config(config.to_config()) == config


def test_the_miniature_makes_eight_by_eight_tiles():
    config = DVAEConfig.preset("emoji")
    assert (config.sample_size // config.factor, config.factor) == (8, 8)
    with torch.device("meta"):
        assert 1.3e6 < DVAE(config).count_parameters() < 1.6e6


def test_the_shipped_codes_restore_unseen_pictures():
    dvae, images = DVAE.from_pretrained("emoji"), emoji("validation").images(range(0, 256, 4))
    with torch.no_grad():
        codes = dvae.encode(images)
        error = (dvae.decode(codes) - images).square().flatten(1).mean(1)
        assert (10 * torch.log10(4 / error)).mean() > 19.5  # dB; 20.8 over all of them
    assert perplexity(codes, 512) > 120  # 207 over all of them


@pytest.mark.parametrize("kind", [DVAE, VQ])
def test_a_saved_model_answers_as_before(kind, tmp_path):
    model, images = build(kind), pictures()
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert again.config == SMALL and torch.equal(again.encode(images), model.encode(images))
    with torch.no_grad():
        assert torch.equal(again.decode(model.encode(images)), model.decode(model.encode(images)))


def test_the_weights_of_the_other_kind_are_refused(tmp_path):
    build(VQ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="codebook"):
        DVAE.from_pretrained(tmp_path)


def test_gumbel_noise_does_not_depend_on_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        noise = gumbel_noise((4,), torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(noise, gumbel_noise((4,), torch.Generator().manual_seed(0)))


def test_a_choice_that_is_sure_costs_the_whole_logarithm():
    sure = torch.tensor([0.0, -torch.inf]).view(1, 2, 1)
    assert uniform_kl(sure).item() == pytest.approx(math.log(2))


def test_the_nearest_vector_is_found_under_autocast():
    g = torch.Generator().manual_seed(0)
    vq = VQ(DVAEConfig.preset("emoji")).eval()
    vq.codebook.copy_(10 + torch.randn(vq.codebook.shape, generator=g))
    features = 10 + torch.randn(2, vq.codebook.shape[1], 4, 4, generator=g)
    with torch.autocast("cpu", torch.bfloat16):
        found = vq.choose(features)
    nearest = torch.cdist(features.permute(0, 2, 3, 1).double().flatten(0, 2), vq.codebook.double()).argmin(1)
    assert (found.flatten() == nearest).float().mean() > 0.96  # of 32; float32 may swap near ties
