"""Chapter 16 against transformers' GPT-2, in both directions, and its rules for drawing."""

import pytest
import torch

from diffusionbook.dalle import DalleConfig, DalleTransformer, from_gpt2, keep_likely, sample_codes, to_gpt2

transformers = pytest.importorskip("transformers")

SMALL = DalleConfig(text_vocab=30, text_length=6, codes=12, grid=3, width=24, layers=3, heads=4)


def gpt2_config(config):
    return transformers.GPT2Config(
        vocab_size=config.text_vocab + config.codes, n_positions=config.text_length + config.places,
        n_embd=config.width, n_layer=config.layers, n_head=config.heads, layer_norm_epsilon=config.norm_eps,
        bos_token_id=0, eos_token_id=1)


def randomise(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def a_batch(config=SMALL):
    g = torch.Generator().manual_seed(1)
    return (torch.randint(config.text_vocab, (2, config.text_length), generator=g),
            torch.randint(config.codes, (2, config.places), generator=g))


@torch.no_grad()
def assert_same(ours, theirs):
    ids, codes = a_batch()
    tokens = ours.tokens(ids, codes)[:, :-1]
    logits = theirs(tokens).logits
    text, picture = ours(ids, codes)
    assert logits.std() > 0.5
    torch.testing.assert_close(text, logits[:, :5, :30], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(picture, logits[:, 5:, 30:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.read(tokens)[0], theirs.transformer(tokens).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_ours_is_a_gpt2():
    ours, theirs = randomise(DalleTransformer(SMALL)), transformers.GPT2LMHeadModel(gpt2_config(SMALL)).eval()
    report = theirs.load_state_dict(to_gpt2(ours.state_dict()), strict=True)
    assert not report.missing_keys and not report.unexpected_keys
    assert_same(ours, theirs)


@pytest.mark.parametrize("bare", [False, True])
def test_a_gpt2_is_ours(bare):
    theirs = randomise(transformers.GPT2LMHeadModel(gpt2_config(SMALL)))
    state = (theirs.transformer if bare else theirs).state_dict()
    assert_same(DalleTransformer(SMALL).load(from_gpt2(state)).eval(), theirs)


def test_the_cached_states_are_those_of_gpt2():
    ours = randomise(DalleTransformer(SMALL))
    theirs = transformers.GPT2LMHeadModel(gpt2_config(SMALL)).eval()
    theirs.load_state_dict(to_gpt2(ours.state_dict()))
    tokens = ours.tokens(*a_batch())
    with torch.no_grad():
        memory, cache = None, None
        for piece in tokens.split([6, 1, 1, 7], dim=1):
            states, memory = ours.read(piece, memory)
            answer = theirs.transformer(piece, past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            torch.testing.assert_close(states, answer.last_hidden_state, rtol=1e-4, atol=1e-5)


def test_the_likeliest_picture_is_the_one_that_generate_writes():
    ours = randomise(DalleTransformer(SMALL))
    theirs = transformers.GPT2LMHeadModel(gpt2_config(SMALL)).eval()
    theirs.load_state_dict(to_gpt2(ours.state_dict()))
    ids, _ = a_batch()
    written = theirs.generate(ids, max_new_tokens=9, min_new_tokens=9, do_sample=False, suppress_tokens=list(range(30)),
                              attention_mask=torch.ones_like(ids), pad_token_id=1)
    assert torch.equal(sample_codes(ours, ids, top_k=1, progress=False), written[:, 6:] - 30)


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 8, "top_p": 0.9}])
def test_what_is_kept_is_what_transformers_keeps(options):
    logits = 2 * torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    theirs = logits
    if "top_k" in options:
        theirs = transformers.TopKLogitsWarper(options["top_k"])(None, theirs)
    if "top_p" in options:
        theirs = transformers.TopPLogitsWarper(options["top_p"])(None, theirs)
    assert torch.equal(keep_likely(logits, **options), theirs)


def test_the_public_gpt2_has_the_same_tensors():
    """GPT-2's smallest public model, read as 256 tokens of text and 768 places: names, shapes and count."""
    config = DalleConfig(text_vocab=50_000, text_length=1024 - 768, codes=257, grid=1, width=768, layers=12, heads=12)
    with torch.device("meta"):
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        ours = DalleTransformer(config)
    shapes = {key: tuple(p.shape) for key, p in to_gpt2(ours.state_dict()).items()}
    public = {key: tuple(p.shape) for key, p in theirs.state_dict().items()}
    assert public.pop("transformer.wpe.weight") == (1024, 768) and shapes.pop("transformer.wpe.weight") == (257, 768)
    assert shapes == public
    assert ours.count_parameters() + (1024 - 257) * 768 == 124_439_808
