"""Chapter 17: what the prior hears, what it predicts, and what is drawn from it."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from diffusionbook.denoising import Condition, Denoiser, classifier_free, diffusion_loss
from diffusionbook.prior import (
    DiffusionPrior,
    PriorConfig,
    clamped,
    sample_embedding,
    text_condition,
    text_mask,
    visible,
)
from diffusionbook.samplers import SAMPLERS, sample
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.text import TextConfig, TextEncoder, train_bpe
from diffusionbook.training import DenoisingLoss, train

CONFIG = PriorConfig(embedding=6, words=4, width=16, layers=2, heads=2)
COSINE = NoiseSchedule.cosine()


@pytest.fixture
def prior():
    torch.manual_seed(0)
    prior = DiffusionPrior(CONFIG).eval()
    with torch.no_grad():
        for p in prior.parameters():
            p.add_(0.2 * torch.randn_like(p))
        prior.clip_std.abs_()
    return prior


def told(count, seed=1, **changes):
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(count, 4, dtype=torch.bool)
    mask[:, 3] = False
    return dataclasses.replace(Condition(torch.randn(count, 4, 6, generator=g), torch.randn(count, 6, generator=g),
                                         mask=mask), **changes)


# The transformer


def test_what_hears_what():
    heard = visible(torch.tensor([[True, True, False]]), more=1)[0].int().tolist()
    assert heard == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]  # padding hears itself, nobody hears it


@torch.no_grad()
def test_padding_changes_nothing(prior):
    x, t, condition = torch.randn(2, 6), torch.tensor([5, 900]), told(2)
    before = prior(x, t, **condition.parts())
    context = condition.context.clone()
    context[:, 3] += 10
    assert torch.equal(prior(x, t, condition.embedding, context, condition.mask), before)
    context[:, 2] += 1
    assert (prior(x, t, condition.embedding, context, condition.mask) - before).abs().max() > 0.01


@torch.no_grad()
def test_every_part_of_the_sequence_matters(prior):
    x, t, condition = torch.randn(2, 6), torch.tensor([5, 900]), told(2)
    before = prior(x, t, **condition.parts())
    others = [prior(x + 1, t, **condition.parts()), prior(x, t + 90, **condition.parts()),
              prior(x, t, condition.embedding + 1, condition.context, condition.mask),
              prior(x, t, condition.embedding, condition.context + 1, condition.mask)]
    assert all((other - before).abs().amax(1).min() > 0.01 for other in others)
    assert torch.equal(prior(x[:1], t[:1], **told(1).parts()), prior(x[:1], t[:1], **told(1).parts()))


@torch.no_grad()
def test_without_a_mask_all_words_count(prior):
    x, t, condition = torch.randn(2, 6), torch.tensor([5, 900]), told(2)
    everything = torch.ones(2, 4, dtype=torch.bool)
    assert torch.equal(prior(x, t, condition.embedding, condition.context),
                       prior(x, t, condition.embedding, condition.context, everything))


def test_a_new_prior_guesses_the_mean_and_learns_in_every_tensor():
    prior = DiffusionPrior(CONFIG)
    x, condition = torch.randn(3, 6), told(3)
    assert not prior(x, torch.tensor([1, 2, 3]), **condition.parts()).any()
    torch.nn.init.normal_(prior.proj_to_clip_embeddings.weight)
    diffusion_loss(prior, x, torch.randn(3, 6), torch.tensor([1, 2, 3]), schedule=COSINE, prediction="x0",
                   **condition.parts()).mean().backward()
    silent = [name for name, p in prior.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert silent == [] and prior.clip_mean.grad is None and prior.clip_std.grad is None


def test_standardised_and_back(prior):
    z = 3 + 2 * torch.randn(100, 6) * torch.arange(1, 7)
    prior.measure(z)
    x = prior.standardise(z)
    assert x.mean(0).abs().max() < 1e-5 and (x.std(0) - 1).abs().max() < 1e-5
    torch.testing.assert_close(prior.restore(x), z)
    prior.measure(torch.ones(5, 6))  # a number that never changes must not become infinite
    assert torch.isfinite(prior.standardise(torch.ones(1, 6))).all()
    for wrong in (torch.ones(5, 7), torch.ones(6), torch.ones(1, 6)):
        with pytest.raises(ValueError, match="shape"):
            prior.measure(wrong)
    with pytest.raises(ValueError, match="NaN"):
        prior.measure(torch.full((5, 6), torch.nan))


@pytest.mark.parametrize("name, tensor", [
    ("x", torch.zeros(2, 7)), ("t", torch.zeros(3)), ("embedding", torch.zeros(2, 5)), ("embedding", torch.zeros(1, 6)),
    ("context", torch.zeros(2, 5, 6)), ("mask", torch.ones(2, 3, dtype=torch.bool)), ("mask", torch.ones(2, 4))])
def test_shapes_that_do_not_fit_are_named(prior, name, tensor):
    given = {"x": torch.zeros(2, 6), "t": torch.zeros(2), **told(2).parts()} | {name: tensor}
    with pytest.raises(ValueError, match=f"{name} must"):
        prior(**given)


# Configs and files


@pytest.mark.parametrize("name, count", [("karlo", 1_022_030_080), ("emoji", 2_454_528)])
def test_presets(name, count):
    config = PriorConfig.preset(name)
    assert PriorConfig.from_config(config.to_config()) == config
    with torch.device("meta"):
        assert DiffusionPrior(config).count_parameters() == count


def test_configs_that_make_no_sense():
    with pytest.raises(ValueError, match="karlo, emoji"):
        PriorConfig.preset("dalle")
    with pytest.raises(ValueError, match="multiple of heads"):
        PriorConfig(width=20, heads=8)
    public = PriorConfig.preset("karlo").to_config()
    for key, value in [("added_emb_type", None), ("embedding_proj_norm_type", "layer"), ("clip_embed_dim", 1024)]:
        with pytest.raises(ValueError, match=key):
            PriorConfig.from_config(public | {key: value})


def test_saved_and_loaded(prior, tmp_path):
    prior.save_pretrained(tmp_path)
    again = DiffusionPrior.from_pretrained(tmp_path)
    assert again.config == CONFIG and not again.clip_mean.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(prior.state_dict().values(), again.state_dict().values(), strict=True))


# Texts


def test_the_mask_ends_with_the_text():
    ids = torch.tensor([[7, 1, 9, 0, 0], [7, 9, 9, 9, 9], [7, 1, 2, 3, 9]])
    assert text_mask(ids, end=9).sum(1).tolist() == [3, 2, 5]
    assert text_mask(ids, end=9)[0].tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("pad", ["zero", "eos"])
def test_captions_become_a_condition(pad):
    tokenizer = train_bpe(["red heart", "pizza"], 520, context_length=8, pad=pad)
    encoder = TextEncoder(TextConfig(vocab_size=520, context_length=8, width=16, layers=1, heads=2, projection=6))
    condition = text_condition(encoder, tokenizer, ["red heart", ""])
    ids = tokenizer(["red heart", ""])
    assert torch.equal(condition.context, encoder(ids)) and condition.embedding.shape == (2, 6)
    assert torch.equal(condition.embedding, encoder.pooled(encoder(ids), ids))
    assert condition.mask.sum(1).tolist() == [2 + len(tokenizer.encode("red heart")), 2]
    plain = TextEncoder(TextConfig(vocab_size=520, context_length=8, width=16, layers=1, heads=2))
    with pytest.raises(ValueError, match="projection"):
        text_condition(plain, tokenizer, ["pizza"])


# Drawing


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_samplers_of_chapter_09_take_vectors(prior, sampler):
    denoise = classifier_free(Denoiser(prior, COSINE, "x0", told(3)), told(3, seed=5), scale=2.0)
    x = sample(clamped(denoise, limit=3), (3, 6), sampler=sampler, steps=5, progress=False)
    assert x.shape == (3, 6) and x.abs().max() <= 3.0001


def test_the_clamp_keeps_picture_and_noise_together(prior):
    x, t = 5 * torch.randn(3, 6), 400
    found = clamped(Denoiser(prior, COSINE, "x0", told(3)), limit=0.1)(x, t)
    assert found.x0.abs().max() <= 0.1
    torch.testing.assert_close(COSINE.alpha(t) * found.x0 + COSINE.sigma(t) * found.eps, x, check_dtype=False)
    for limit in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be positive"):
            clamped(Denoiser(prior, COSINE, "x0"), limit=limit)


def draw(prior, condition, **options):
    return sample_embedding(prior, condition, told(1, seed=9), schedule=COSINE, **{"steps": 5} | options)


def test_a_row_depends_on_its_text_and_seed_alone(prior):
    three = told(3)
    whole = draw(prior, three, seed=10)
    for i in range(3):
        alone = Condition(**{name: part[i:i + 1] for name, part in three.parts().items()})
        torch.testing.assert_close(draw(prior, alone, seed=10 + i), whole[i:i + 1], rtol=1e-4, atol=1e-5)
    assert (draw(prior, three, seed=11) - whole).abs().amax(1).min() > 0.01


def test_the_best_of_several_is_the_most_similar_to_the_text(prior):
    condition = told(4)
    one, two, five = (draw(prior, condition, candidates=n) for n in (1, 2, 5))
    likeness = [F.cosine_similarity(z, condition.embedding) for z in (one, two, five)]
    assert (likeness[0] <= likeness[1]).all() and (likeness[1] <= likeness[2]).all()
    assert (likeness[2] > likeness[0]).any()
    with pytest.raises(ValueError, match="at least one"):
        draw(prior, condition, candidates=0)


def test_guidance_of_one_asks_once(prior):
    plain = draw(prior, told(2), guidance=1.0, candidates=1)
    again = sample_embedding(prior, told(2), told(1, seed=77), schedule=COSINE, steps=5, guidance=1.0, candidates=1)
    assert torch.equal(plain, again)  # what the empty text says doesn't matter then
    assert (draw(prior, told(2), guidance=4.0, candidates=1) - plain).abs().max() > 0.01


def test_training_learns_two_answers_to_one_caption():
    """One text, two heaps: a regression would answer their middle; the prior must draw from both."""
    torch.manual_seed(0)
    side = (torch.arange(64) % 2 * 2.0 - 1)[:, None]
    z = side * torch.tensor([[1.0, -1.0]]) + 0.05 * torch.randn(64, 2)
    prior = DiffusionPrior(PriorConfig(embedding=2, words=1, width=32, layers=1, heads=2))
    prior.measure(z)
    text = Condition(torch.ones(64, 1, 2), torch.ones(64, 2), mask=torch.ones(64, 1, dtype=torch.bool))
    data = torch.utils.data.StackDataset(x0=prior.standardise(z), **text.parts())
    train(prior, data, DenoisingLoss(COSINE, "x0"), steps=250, lr=4e-3, warmup=20, ema=0.95, at_start=1.0,
          progress=False).swap(prior)
    drawn = sample_embedding(prior, text, Condition(**{k: v[:1] for k, v in text.parts().items()}), schedule=COSINE,
                             guidance=1.0, candidates=1)
    middle = drawn.norm(dim=1) < 0.7
    assert middle.float().mean() < 0.15 and 0.2 < (drawn[:, 0] > 0).float().mean() < 0.8


def test_everything_runs_on_another_device():
    """On `meta` no tensor has values: a stray one from the CPU would raise."""
    with torch.device("meta"):
        prior = DiffusionPrior(PriorConfig.preset("emoji"))
    config = prior.config
    told, untold = (Condition(torch.empty(n, config.words, config.embedding, device="meta"),
                              torch.empty(n, config.embedding, device="meta"),
                              mask=torch.empty(n, config.words, device="meta", dtype=torch.bool)) for n in (3, 1))
    drawn = sample_embedding(prior, told, untold, schedule=COSINE, steps=3)
    assert drawn.device.type == "meta" and drawn.shape == (3, config.embedding)


def test_heads_may_have_any_width():
    assert PriorConfig(width=96, heads=32).width == 96
    with pytest.raises(ValueError, match="even and a multiple of heads"):
        PriorConfig(width=96, heads=5)
