"""Chapter 16: one row of tokens, the memory, the draws, and the pipeline around them."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffusionbook.dalle import DallE, DalleConfig, DalleTransformer, from_gpt2, keep_likely, sample_codes, to_gpt2
from diffusionbook.data import to_pil
from diffusionbook.dvae import DVAE, DVAEConfig
from diffusionbook.text import train_bpe

SMALL = DalleConfig(text_vocab=540, text_length=8, codes=12, grid=4, width=16, layers=2, heads=2)
WORDS = ["red heart", "pizza", "grinning face"]


def random_codes(count=3, places=16, seed=0):
    return torch.randint(12, (count, places), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pipeline():
    """Random weights, loud enough that every code and every caption makes a difference."""
    torch.manual_seed(0)
    texts = ["red heart, noto style", "pizza, twemoji style", "grinning face, 3d style"]
    tokenizer = train_bpe(texts, 540, context_length=8, pad="eos")
    dvae = DVAE(DVAEConfig(codes=12, width=8, embedding=6, groups=3, blocks=1, sample_size=16)).eval()
    transformer = DalleTransformer(SMALL).eval()
    with torch.no_grad():
        dvae.decoder.blocks.output.conv.w.mul_(10)
        for p in transformer.parameters():
            p.add_(0.1 * torch.randn_like(p))
        transformer.token_embedding.weight.normal_(std=0.3)
    return DallE(dvae=dvae, transformer=transformer, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def net(pipeline):
    return pipeline.transformer


@pytest.fixture(scope="module")
def ids(pipeline):
    return pipeline.tokenizer(WORDS)


# The transformer


@torch.no_grad()
def test_a_token_is_predicted_from_earlier_ones_only(net, ids):
    codes = random_codes()
    text, picture = net(ids, codes)
    assert text.shape == (3, 7, 540) and picture.shape == (3, 16, 12)
    changed = codes.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 12
    text_2, picture_2 = net(ids, changed)
    assert torch.equal(text, text_2) and torch.allclose(picture[:, :10], picture_2[:, :10], atol=1e-6)
    assert (picture[:, 10:] - picture_2[:, 10:]).abs().amax(2).min() > 1e-4
    other = ids.clone()
    other[:, 2] = 300
    assert (net(other, codes)[1] - picture).abs().amax(2).min() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[23], [8, 15], [1] * 23, [8, 1, 5, 9]])
def test_reading_in_pieces_with_a_memory_is_reading_at_once(net, ids, cuts):
    tokens = net.tokens(ids, random_codes(places=15))  # (3, 23)
    whole, memory_whole = net.read(tokens)
    memory, pieces = None, []
    for piece in tokens.split(cuts, dim=1):
        states, memory = net.read(piece, memory)
        pieces.append(states)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)
    for (k, v), (k_whole, v_whole) in zip(memory, memory_whole, strict=True):
        torch.testing.assert_close(k, k_whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(v, v_whole, rtol=1e-5, atol=1e-5)


def test_a_new_network_knows_nothing(ids):
    torch.manual_seed(0)
    value, parts = DalleTransformer(SMALL).loss(ids, random_codes())
    assert parts["text"].item() == pytest.approx(math.log(540), abs=0.1)
    assert parts["picture"].item() == pytest.approx(math.log(12), abs=0.1)
    assert value.item() == pytest.approx((parts["text"].item() + 7 * parts["picture"].item()) / 8, rel=1e-5)


def test_padding_does_not_count(net, ids):
    """The caption's loss is the mean over its tokens, its end included."""
    row = ids[1:2]
    length = (row[0] == 539).int().argmax().item() + 1  # begin, words, end
    assert length < 8
    text, _ = net(row, random_codes(1))
    expected = F.cross_entropy(text[0, : length - 1], row[0, 1:length])
    assert net.loss(row, random_codes(1))[1]["text"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_any_filling_after_the_end_does_not_count(net, ids):
    """Tokenizers fill up with the end (the public ones of Stable Diffusion 1) or with zeros (OpenAI's)."""
    ended = (ids == 539).cumsum(1)
    zeros = ids.masked_fill((ended > 1) | ((ended == 1) & (ids != 539)), 0)
    assert (zeros == 0).any()
    found, expected = (net.loss(row, random_codes(len(ids)))[1]["text"].item() for row in (zeros, ids))
    assert found == pytest.approx(expected, rel=1e-5)


def test_gradients_reach_every_parameter(ids):
    torch.manual_seed(0)
    model = DalleTransformer(SMALL)
    model.loss(ids, random_codes())[0].backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias adds the same to all scores of a query, and softmax doesn't see it.
    assert [name for name in dead if not name.endswith("k_proj.bias")] == []


def test_it_learns_four_pictures_by_heart(ids):
    torch.manual_seed(0)
    model, codes = DalleTransformer(SMALL), random_codes()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(ids, codes)[0].backward()
        optimizer.step()
    written = sample_codes(model.eval(), ids, top_k=1, progress=False)
    assert (written == codes).float().mean() > 0.9


# What is kept of a distribution

SHARES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.parametrize("options, kept", [
    ({}, [0, 1, 2, 3, 4]), ({"top_k": 1}, [1]), ({"top_k": 3}, [1, 3, 4]), ({"top_k": 99}, [0, 1, 2, 3, 4]),
    ({"top_p": 0.3}, [1]), ({"top_p": 0.5}, [1, 3]), ({"top_p": 0.8}, [1, 3, 4]), ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
    ({"top_k": 2, "top_p": 0.5}, [1]),  # of the two left, the first has 0.4 / 0.7
])
def test_what_is_kept_of_a_distribution(options, kept):
    logits = keep_likely(SHARES.log().expand(2, 5), **options)
    assert [i for i in range(5) if logits[0, i].isfinite()] == kept and torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0, kept], SHARES.log()[kept])


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_nothing_to_keep_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        keep_likely(SHARES.log(), **options)


# Writing codes


def test_codes_are_drawn_as_often_as_the_network_says(pipeline, net):
    ids = pipeline.tokenizer(WORDS[:1]).expand(4000, -1)
    first = sample_codes(dataclass_grid(net, 1), ids, progress=False)[:, 0]
    with torch.no_grad():
        expected = net(ids[:1], random_codes(1))[1][0, 0].softmax(0)
    share = torch.bincount(first, minlength=12) / 4000
    assert expected.max() < 0.9 and (share - expected).abs().max() < 0.03  # four standard errors


def dataclass_grid(net, grid):
    """The same network for pictures of another size: fewer places are a shorter table."""
    smaller = DalleTransformer(dataclasses.replace(net.config, grid=grid))
    state = net.state_dict()
    state["position_embedding.weight"] = state["position_embedding.weight"][: net.config.text_length + grid**2]
    smaller.load_state_dict(state)
    return smaller.eval()


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(net, ids):
    draw = lambda ids, seed, **options: sample_codes(net, ids, seed=seed, progress=False, **options)  # noqa: E731
    together = draw(ids, 5)
    assert not torch.equal(together, draw(ids, 6))
    for i in range(3):
        assert torch.equal(draw(ids[i:i + 1], 5 + i)[0], together[i])
    guided = draw(ids, 5, unconditional=ids[:1], guidance=2.0)
    for i in range(3):
        assert torch.equal(draw(ids[i:i + 1], 5 + i, unconditional=ids[:1], guidance=2.0)[0], guided[i])


def test_going_on_from_ones_own_beginning_gives_the_same_picture(net, ids):
    whole = sample_codes(net, ids, seed=3, progress=False)
    for kept in (1, 8, 15, 16):
        assert torch.equal(sample_codes(net, ids, start=whole[:, :kept], seed=3, progress=False), whole)


@torch.no_grad()
def test_every_code_is_the_likeliest_that_the_whole_row_gives(net, ids):
    """Written with a memory, checked without one."""
    codes = sample_codes(net, ids, top_k=1, progress=False)
    assert torch.equal(net(ids, codes)[1].argmax(2), codes)


@torch.no_grad()
def test_guidance_moves_away_from_the_empty_caption(net, ids):
    codes = sample_codes(net, ids, unconditional=ids[:1], guidance=3.0, top_k=1, progress=False)
    asked, without = net(ids, codes)[1], net(ids[:1].expand(3, -1), codes)[1]
    assert torch.equal((without + 3 * (asked - without)).argmax(2), codes)
    assert not torch.equal(asked.argmax(2), codes)
    same = sample_codes(net, ids, unconditional=ids[:1], guidance=1.0, seed=4, progress=False)
    assert torch.equal(same, sample_codes(net, ids, seed=4, progress=False))


def test_a_low_temperature_takes_the_likeliest(net, ids):
    cold = sample_codes(net, ids, temperature=1e-4, progress=False)
    assert torch.equal(cold, sample_codes(net, ids, top_k=1, progress=False))


# The pipeline


def test_pictures_come_out_and_follow_seed_and_caption(pipeline):
    pictures = pipeline(WORDS[:2], n=2, seed=1, progress=False)
    assert len(pictures) == 4 and {p.size for p in pictures} == {(16, 16)}
    images = pipeline(WORDS[:2], n=2, seed=1, progress=False, output="tensor")
    assert images.shape == (4, 3, 16, 16) and -1 <= images.min() and images.max() <= 1
    assert np.abs(np.asarray(pictures[0]) / 127.5 - 1 - images[0].permute(1, 2, 0).numpy()).max() < 0.01
    alone = pipeline(WORDS[1], n=1, seed=3, progress=False, output="tensor")
    assert torch.allclose(alone[0], images[2], atol=1e-6)
    assert not torch.allclose(images[0], images[1], atol=0.05)


class LikesBright:
    """Stands for CLIP: the brighter a picture, the better it fits any caption."""

    def score(self, images, texts):
        assert len(images) == len(texts)
        self.texts = texts
        return images.mean((1, 2, 3))


def test_reranking_keeps_the_best_of_each_caption(pipeline):
    judge = LikesBright()
    best = pipeline(WORDS[:2], n=2, rerank=judge, candidates=5, progress=False, output="tensor")
    assert judge.texts == [WORDS[0]] * 5 + [WORDS[1]] * 5
    everything = pipeline(WORDS[:2], n=5, progress=False, output="tensor").view(2, 5, 3, 16, 16)
    for i in range(2):
        expected = everything[i].mean((1, 2, 3)).sort(descending=True).values[:2]
        assert torch.allclose(best.view(2, 2, 3, 16, 16)[i].mean((1, 2, 3)), expected, atol=1e-6)


def test_a_completed_picture_keeps_its_upper_rows(pipeline):
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = pipeline.dvae.encode(image)
    halves = [pipeline.dvae.encode(x[None]) for x in
              pipeline.complete(image, WORDS[0], rows=4, n=2, progress=False, output="tensor")]
    untouched = pipeline.dvae.decode(codes)
    assert len(halves) == 2
    kept = pipeline.complete(image, WORDS[0], rows=4, progress=False, output="tensor")
    assert torch.allclose(kept, untouched, atol=1e-6)
    done = pipeline.complete(image, WORDS[0], n=2, seed=7, progress=False, output="tensor")
    assert done.shape == (2, 3, 16, 16) and not torch.allclose(done[0], done[1], atol=0.05)
    same = pipeline.complete(to_pil(image)[0], WORDS[0], n=2, seed=7, progress=False)
    assert len(same) == 2 and same[0].size == (16, 16)
    start = codes.flatten(1)[:, :8].expand(2, -1)
    ids, empty = pipeline.tokenizer([WORDS[0]] * 2), pipeline.tokenizer([""])
    expected = sample_codes(pipeline.transformer, ids, start=start, unconditional=empty, guidance=3.0, seed=7,
                            progress=False)
    assert torch.equal(expected[:, :8], start)
    assert torch.allclose(done, pipeline.dvae.decode(expected.unflatten(1, (4, 4))), atol=1e-6)


def test_a_saved_pipeline_paints_as_before(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = DallE.from_pretrained(tmp_path).to("cpu")
    options = dict(seed=2, guidance=2.0, top_p=0.9, progress=False, output="tensor")
    assert torch.equal(again(WORDS[0], **options), pipeline(WORDS[0], **options))


# Refusals


def test_a_folder_without_a_transformer_is_refused(pipeline, tmp_path):
    pipeline.dvae.save_pretrained(tmp_path / "dvae")
    with pytest.raises(FileNotFoundError, match="lacks dalle, tokenizer"):
        DallE.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model named"):
        DallE.from_pretrained("imagen")


@pytest.mark.parametrize("options, message", [
    ({"prompt": ["pizza", 3]}, "string or a list of strings"), ({"prompt": []}, "string or a list of strings"),
    ({"n": 0}, "at least 1"), ({"output": "png"}, '"pil" or "tensor"'), ({"temperature": 0}, "positive"),
    ({"guidance": math.nan}, "finite"), ({"top_k": 0}, "top_k"), ({"candidates": 3}, "needs rerank"),
    ({"n": 4, "rerank": LikesBright(), "candidates": 3}, "at least n=4"),
    ({"rerank": LikesBright(), "candidates": 0}, "at least n=1"),
    ({"seed": -1}, "the seed must lie in"), ({"seed": 2**70}, "the seed must lie in"),
    ({"seed": 1.5}, "be a whole number, got 1.5"), ({"seed": "a"}, "be a whole number, got 'a'"),
])
def test_impossible_wishes_are_refused(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**{"prompt": "pizza", "progress": False} | options)


@pytest.mark.parametrize("image, rows", [
    (torch.zeros(1, 3, 8, 8), 2), (torch.zeros(2, 3, 16, 16), 2), (torch.zeros(1, 3, 16, 16), 5)])
def test_what_cannot_be_completed_is_refused(pipeline, image, rows):
    with pytest.raises(ValueError, match=r"one picture \(1, 3, 16, 16\)"):
        pipeline.complete(image, "pizza", rows=rows, progress=False)


def test_images_of_the_wrong_range_are_refused(pipeline):
    with pytest.raises(ValueError, match="divide by 127.5"):
        pipeline.complete(torch.full((1, 3, 16, 16), 9.0), "pizza", progress=False)
    with pytest.raises(ValueError, match="pictures must be PIL images"):
        pipeline.complete(torch.zeros(1, 3, 16, 16).numpy(), "pizza", progress=False)


def test_a_list_of_one_picture_is_completed(pipeline):
    picture, options = Image.new("RGB", (16, 16), "red"), {"seed": 1, "progress": False, "output": "tensor"}
    assert torch.equal(pipeline.complete([picture], "pizza", **options), pipeline.complete(picture, "pizza", **options))


@pytest.mark.parametrize("change", [
    lambda ids, codes: (ids[:, :5], codes), lambda ids, codes: (ids.int(), codes),
    lambda ids, codes: (ids, codes[:2]), lambda ids, codes: (ids, torch.cat([codes, codes], 1)),
    lambda ids, codes: (ids, codes + 12), lambda ids, codes: (ids + 540, codes),
])
def test_tokens_that_do_not_fit_are_refused(net, ids, change):
    with pytest.raises(ValueError, match="int64 of shape|must lie in"):
        net(*change(ids, random_codes()))


def test_guidance_without_an_empty_caption_is_refused(net, ids):
    with pytest.raises(ValueError, match="unconditional"):
        sample_codes(net, ids, guidance=2.0, progress=False)


def test_parts_of_two_models_are_refused(pipeline):
    other = DalleTransformer(dataclasses.replace(SMALL, codes=13))
    with pytest.raises(ValueError, match="kinds of tile: 13, not 12"):
        DallE(dvae=pipeline.dvae, transformer=other, tokenizer=pipeline.tokenizer)


def test_unknown_presets_and_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="choose one of dalle, emoji"):
        DalleConfig.preset("parti")
    with pytest.raises(ValueError, match="multiple of heads"):
        dataclasses.replace(SMALL, heads=3)
    with pytest.raises(ValueError, match="not the config"):
        DalleConfig.from_config({"_class_name": "GPT2LMHeadModel"})


# Configs and names


@pytest.mark.parametrize("config", [SMALL, DalleConfig.preset("dalle"), DalleConfig.preset("emoji")])
def test_configs_survive_the_file(config):
    assert DalleConfig.from_config(config.to_config()) == config


@pytest.mark.parametrize("preset, low, high", [("dalle", 12e9, 12.3e9), ("emoji", 1.38e6, 1.39e6)])
def test_sizes(preset, low, high):
    with torch.device("meta"):
        assert low < DalleTransformer(DalleConfig.preset(preset)).count_parameters() < high


def test_names_of_gpt2_and_back(net):
    state = net.state_dict()
    theirs = to_gpt2(state)
    assert theirs["transformer.h.1.attn.c_attn.weight"].shape == (16, 48)
    assert theirs["transformer.h.0.mlp.c_fc.weight"].shape == (16, 64)
    assert theirs["lm_head.weight"] is theirs["transformer.wte.weight"]
    back = from_gpt2(theirs)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


def test_nan_is_no_code(pipeline):
    broken = DallE(dvae=pipeline.dvae, transformer=DalleTransformer(SMALL).eval(), tokenizer=pipeline.tokenizer)
    with torch.no_grad():
        next(broken.transformer.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="answers NaN"):
        broken("pizza", progress=False)


def test_a_text_of_one_token_costs_nothing():
    net = DalleTransformer(dataclasses.replace(SMALL, text_length=1))
    loss, parts = net.loss(torch.tensor([[3]]), random_codes(1))
    assert parts["text"] == 0 and loss.item() == pytest.approx(parts["picture"].item() * 7 / 8)


def test_who_ranks_pictures_must_read(pipeline):
    class Mute:
        tokenizer = None

    with pytest.raises(ValueError, match="rerank needs a tokenizer"):
        pipeline("pizza", rerank=Mute(), progress=False)


def test_pictures_are_ranked_at_the_size_that_the_judge_reads(pipeline):
    class Reader:
        """Prefers dark pictures, of 8×8 pixels."""

        config = SimpleNamespace(vision=SimpleNamespace(image_size=8))
        tokenizer = pipeline.tokenizer

        def score(self, images, captions):
            assert images.shape[2:] == (8, 8) and images.abs().max() <= 1
            return -images.mean((1, 2, 3))

    options = {"seed": 3, "output": "tensor", "progress": False}
    best, many = pipeline("pizza", rerank=Reader(), candidates=4, **options), pipeline("pizza", n=4, **options)
    assert best.shape == (1, 3, 16, 16) and torch.equal(best[0], min(many, key=lambda x: x.mean()))
