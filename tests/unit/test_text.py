"""Chapter 13: the tokenizer and the text encoder, against values known by hand."""

import dataclasses
import gzip
import html
import json
import pickle
import random
import warnings
from collections import Counter
from itertools import pairwise

import ftfy
import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusionbook import text
from diffusionbook.text import TextConfig, TextEncoder, Tokenizer, clean_text, clip_tokenizer, train_bpe

TOY = ["low low low lower lowest", "newest newest"]
TINY = TextConfig(vocab_size=600, context_length=12, width=32, layers=3, heads=4)


@pytest.fixture
def tokenizer():
    return train_bpe(TOY, 520, context_length=8)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return TextEncoder(TINY).eval()


# Cleaning and spelling


@pytest.mark.parametrize("raw, clean", [
    ("  Red\t\n  HEART ", "red heart"),
    ("caf&amp;eacute;", "café"),
    ("cafÃ©", "café"),
    ("&lt;3 &amp;amp; more", "<3 & more"),
    ("a\x00b\x1b[31mc", "abc"),
    ("e\u0301", "é"),
    ("”curly’", "\"curly'"),
    ("", ""),
    (" \u3000\u00a0 ", ""),
])
def test_clean_text(raw, clean):
    assert clean_text(raw) == clean


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(min_codepoint=0, max_codepoint=300), max_size=20))
def test_the_short_cut_for_plain_text_changes_nothing(raw):
    slow = html.unescape(html.unescape(ftfy.fix_text(raw))).strip()
    assert clean_text(raw) == regex.sub(r"\s+", " ", slow).strip().lower()


def test_byte_symbols_are_clips():
    table = text.byte_symbols()
    assert sorted(table) == list(range(256)) and len(set(table.values())) == 256
    assert next(iter(table.values())) == "!" and table[ord("a")] == "a"
    assert table[0] == chr(256) and table[ord(" ")] == "Ġ" and table[0xAD] == chr(323)
    assert not any(symbol.isspace() for symbol in table.values())


def test_words_are_cut_as_clip_cuts_them():
    words = text.WORD_PATTERN.findall("it's 42 crème, they'll <|endoftext|>!?")
    assert words == ["it", "'s", "4", "2", "crème", ",", "they", "'ll", "<|endoftext|>", "!?"]


# Learning the merges


def test_merge_pair():
    assert text.merge_pair(("a", "a", "a", "a</w>"), ("a", "a")) == ("aa", "a", "a</w>")
    assert text.merge_pair(("b", "a"), ("a", "b")) == ("b", "a")


def test_merges_known_by_hand():
    # lo 5; we 4; then three pairs occur 3 times (lo w</w>, s t</w>, we s): the first in text order wins; …
    assert text.learn_merges(TOY, 6) == [
        ("l", "o"), ("w", "e"), ("lo", "w</w>"), ("s", "t</w>"), ("we", "st</w>"), ("e", "west</w>"),
    ]


def merges_by_recounting(texts, count):
    words = Counter(text.spell(w) for t in texts for w in text.WORD_PATTERN.findall(clean_text(t)))
    merges = []
    for _ in range(count):
        pairs = Counter()
        for symbols, n in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += n
        if not pairs:
            break
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        merged = Counter()
        for symbols, n in words.items():
            merged[text.merge_pair(symbols, merges[-1])] += n
        words = merged
    return merges


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab c", max_size=12), max_size=6), st.randoms())
def test_incremental_counts_equal_a_full_recount(texts, rng):
    expected = merges_by_recounting(texts, 30)
    assert text.learn_merges(texts, 30) == expected
    rng.shuffle(texts)
    assert text.learn_merges(texts, 30) == expected
    assert len(text.clip_vocabulary(expected)) == 514 + len(expected)  # no two merges make the same symbol


def test_train_bpe_has_clips_layout():
    tokenizer = train_bpe(TOY, 520)
    assert tokenizer.vocab_size == len(tokenizer.vocab) == 520
    symbols = sorted(tokenizer.vocab, key=tokenizer.vocab.get)
    assert symbols[:3] == ["!", '"', "#"] and symbols[256:258] == ["!</w>", '"</w>']
    assert symbols[512:] == ["lo", "we", "low</w>", "st</w>", "west</w>", "ewest</w>", text.BOS, text.EOS]
    assert tokenizer.encode("low lowest") == [514, 512, 516]


@pytest.mark.parametrize("texts, size, error, match", [
    ("one string", 600, TypeError, "put it in a list"),
    (TOY, 513, ValueError, "at least 514"),
    (["ab"], 600, ValueError, "at most 515"),
    ([3], 514, TypeError, "must be a string"),
])
def test_train_bpe_refuses(texts, size, error, match):
    with pytest.raises(error, match=match):
        train_bpe(texts, size)


# The tokenizer


@pytest.mark.parametrize("pad, filler", [("zero", 0), ("eos", 519)])
def test_rows_begin_end_and_padding(pad, filler):
    tokenizer = train_bpe(TOY, 520, context_length=6, pad=pad)
    ids = tokenizer(["low", ""])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[518, 514, 519, *[filler] * 3], [518, 519, *[filler] * 4]]
    assert torch.equal(tokenizer("low"), ids[:1])
    assert tokenizer.decode(ids[0]) == "low" and tokenizer.decode(ids[1].tolist()) == ""


def test_over_long_text_is_cut_with_one_warning_for_each(tokenizer):
    text = "low low low low low lowest low"
    with pytest.warns(UserWarning, match="room for 6; this part was cut: 'west low'"):
        ids = tokenizer(text)
    with pytest.warns(UserWarning, match="has 8 tokens.*this part was cut: 'low low'"):
        tokenizer("low " * 8)
    assert ids[0].tolist() == [518, 514, 514, 514, 514, 514, 512, 519]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer([text, "low " * 6])
    with pytest.raises(ValueError, match="7 tokens and there is room for 6"):
        tokenizer("low " * 7, truncate=False)
    assert tokenizer("low " * 6, truncate=False)[0].tolist() == [518, *[514] * 6, 519]


@pytest.mark.parametrize("bad, error, match", [
    (None, TypeError, "NoneType"), (3, TypeError, "int"), (b"low", TypeError, "bytes"),
    ([None], TypeError, "NoneType"), (["low", 3.5], TypeError, "float"), ([["low"]], TypeError, "list"),
    ([], ValueError, "empty"),
])
def test_what_is_not_text_is_refused(tokenizer, bad, error, match):
    with pytest.raises(error, match=match):
        tokenizer(bad)


def test_tokenizer_refuses_what_does_not_fit():
    good = train_bpe(TOY, 520)
    with pytest.raises(ValueError, match="pad must be"):
        Tokenizer(good.vocab, good.merges, pad="max")
    with pytest.raises(ValueError, match="context_length"):
        Tokenizer(good.vocab, good.merges, context_length=1)
    with pytest.raises(ValueError, match="lacks 1 of the symbols.*'xy'"):
        Tokenizer(good.vocab, [*good.merges, ("x", "y")])
    with pytest.raises(ValueError, match="id 520 is not"):
        good.decode([520])


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_decoding_gives_the_text_back_but_for_spaces(raw):
    tokenizer = train_bpe(TOY, 520)
    ids = tokenizer.encode(raw)
    assert all(0 <= i < 518 for i in ids)
    assert tokenizer.decode(ids).replace(" ", "") == clean_text(raw).replace(" ", "")


@pytest.mark.parametrize("raw", ["</w>", "a</w>b", "</w></w> 猫 😀 é", "low newest"])
def test_decoding_awkward_text(tokenizer, raw):
    assert tokenizer.decode(tokenizer.encode(raw)).replace(" ", "") == raw.replace(" ", "")


def test_special_tokens_in_a_text_keep_their_ids(tokenizer):
    assert tokenizer.encode("low <|endoftext|> <|startoftext|>") == [514, 519, 518]


def test_the_memory_of_words_is_bounded(tokenizer):
    tokenizer.cache_size = 10
    for i in range(100):
        tokenizer.encode("a" * (i + 1))
    assert len(tokenizer._cache) <= 10
    assert tokenizer.encode("lowest") == [512, 516]


def test_pickle(tokenizer):
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))("lower"), tokenizer("lower"))


@pytest.mark.parametrize("pad", ["zero", "eos"])
def test_save_and_load(tmp_path, pad):
    tokenizer = train_bpe(TOY, 520, context_length=9, pad=pad)
    tokenizer.save_pretrained(tmp_path / "new" / "folder")
    again = Tokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert (again.vocab, again.merges) == (tokenizer.vocab, tokenizer.merges)
    assert (again.context_length, again.pad) == (9, pad)
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}


@pytest.mark.parametrize("join", [" ".join, list])
def test_load_the_single_file_form_and_old_special_tokens(tmp_path, join):
    tokenizer = train_bpe(TOY, 520)
    model = {"vocab": tokenizer.vocab, "merges": [join(pair) for pair in tokenizer.merges]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}), encoding="utf-8")
    special = {"pad_token": {"content": text.EOS, "lstrip": False}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": int(1e30)}))
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.merges == tokenizer.merges and again.pad == "eos" and again.context_length == 77


@pytest.mark.parametrize("spoil", [
    lambda folder, lines: (folder / "merges.txt").write_text("\n".join(lines[:-2])),
    lambda folder, lines: (folder / "merges.txt").write_text("\n".join(lines)[:-8]),  # in the middle of a line
    lambda folder, lines: (folder / "merges.txt").unlink() or (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "WordLevel", "vocab": {"low": 0}}})),
])
def test_a_truncated_tokenizer_or_another_kind_is_refused(tmp_path, spoil):
    """With fewer merges the same text would silently become other ids."""
    train_bpe(TOY, 520).save_pretrained(tmp_path)
    spoil(tmp_path, (tmp_path / "merges.txt").read_text().splitlines())
    with pytest.raises(ValueError, match="truncated or of another kind: no merge makes .* of its symbols"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token"')
    with pytest.raises(ValueError, match="tokenizer_config.json is not valid JSON"):
        Tokenizer.from_pretrained(tmp_path)


def test_saving_leaves_no_half_written_file(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "vocab.json").write_text("old")

    def fail(path, text, encoding):
        path.open("w").write(text[:5])
        raise OSError("the disk is full")

    monkeypatch.setattr(text.Path, "write_text", fail)
    with pytest.raises(OSError, match="full"):
        tokenizer.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["vocab.json"]
    assert (tmp_path / "vocab.json").read_text() == "old"


def test_load_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected vocab.json and merges.txt"):
        Tokenizer.from_pretrained(tmp_path)


def test_clip_tokenizer_says_where_to_get_the_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps open_clip_torch"):
        clip_tokenizer()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        clip_tokenizer(tmp_path / "nowhere.gz")
    with gzip.open(tmp_path / "short.gz", "wt") as file:
        file.write("#version\na b\n")
    with pytest.raises(ValueError, match="48,894"):
        clip_tokenizer(tmp_path / "short.gz")


# GPT-2's tokenizer


@pytest.fixture(scope="module")
def gpt2():
    return text.gpt2_tokenizer(context_length=8)


def test_gpt2_keeps_capitals_and_spaces(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995] and gpt2.encode("hello world") != gpt2.encode("Hello world")
    assert gpt2("Hello world").tolist() == [[15496, 995, *[50_256] * 6]]
    assert gpt2("").tolist() == [[50_256] * 8]
    for raw in ("  two  spaces\n", "caf\u00e9 \u732b \U0001f600", "it's &amp; <b>", "</w>", "\t\x00"):
        assert gpt2.decode(gpt2.encode(raw)) == raw  # nothing is lost, unlike in CLIP's


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_gpt2_gives_every_text_back(raw):
    tokenizer = text.GPT2Tokenizer({s: i for i, s in enumerate([*text.byte_symbols().values(), text.EOS])}, [])
    assert tokenizer.decode(tokenizer.encode(raw)) == raw


def test_gpt2_refuses(gpt2, tmp_path):
    with pytest.raises(TypeError, match="must be a string, got int"):
        gpt2([3])
    with pytest.raises(ValueError, match="room for 8"):
        gpt2("word " * 9, truncate=False)
    with pytest.warns(UserWarning, match="room for 8"):
        assert gpt2("word " * 20)[0, -1] != 50_256
    (tmp_path / "short.bpe").write_text("#version: 0.2\na b\n")
    with pytest.raises(ValueError, match="50,000"):
        text.gpt2_tokenizer(tmp_path / "short.bpe")
    with pytest.raises(FileNotFoundError, match="vocab.bpe"):
        text.gpt2_tokenizer(tmp_path / "nowhere")


# The encoder


@pytest.mark.parametrize("name, parameters, tensors", [
    ("sd15", 123_060_480, 196), ("sd21", 340_387_840, 372), ("emoji", 1_734_336, 52),
])
def test_presets(name, parameters, tensors):
    config = TextConfig.preset(name)
    with torch.device("meta"):
        encoder = TextEncoder(config)
        ids = torch.zeros(2, config.context_length, dtype=torch.int64)
        out = encoder(ids)
        assert encoder.pooled(out, ids).shape == (2, config.width)
    assert out.shape == (2, config.context_length, config.width)
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert len(encoder.state_dict()) == tensors == len(list(encoder.parameters()))


def test_config():
    with pytest.raises(ValueError, match="sd15, sd21, emoji"):
        TextConfig.preset("sdxl")
    with pytest.raises(ValueError, match="multiple of heads"):
        TextConfig(width=30, heads=4)
    with pytest.raises(ValueError, match="quick_gelu"):
        TextConfig(activation="relu")
    config = TextConfig(vocab_size=100, width=16, heads=2)
    assert (config.ff_width, config.bos_id, config.eos_id) == (64, 98, 99)
    for config in [TINY, TextConfig.preset("sd15"), TextConfig.preset("sd21"),
                   dataclasses.replace(TINY, causal=False, projection=7, ff_width=50, activation="gelu")]:
        assert TextConfig.from_config(json.loads(json.dumps(config.to_config()))) == config


@pytest.mark.parametrize("place", [0, 4, 11])
def test_a_later_token_changes_nothing_before_it(encoder, place):
    ids = torch.randint(0, 600, (2, 12))
    other = ids.clone()
    other[:, place] = (other[:, place] + 1) % 600
    change = (encoder(ids) - encoder(other)).abs().amax((0, 2))
    assert (change[:place] < 1e-6).all() and (change[place:] > 1e-4).all()


def test_a_bidirectional_encoder_sees_both_ways():
    torch.manual_seed(0)
    encoder = TextEncoder(dataclasses.replace(TINY, causal=False))
    ids = torch.randint(0, 599, (1, 12))
    other = ids.clone()
    other[:, -1] += 1
    assert ((encoder(ids) - encoder(other)).abs().amax((0, 2)) > 1e-6).all()


def test_short_rows_and_batches(encoder):
    ids = torch.randint(0, 600, (3, 12))
    hidden = encoder(ids)
    assert hidden.shape == (3, 12, 32)
    torch.testing.assert_close(encoder(ids[:, :5]), hidden[:, :5])
    torch.testing.assert_close(encoder(ids[1:2]), hidden[1:2])


def test_skip_leaves_out_the_last_blocks(encoder):
    ids = torch.randint(0, 600, (2, 12))
    x = encoder.embed(ids)
    for skip in (2, 1, 0):
        x = encoder.encoder["layers"][2 - skip](x)
        torch.testing.assert_close(encoder(ids, skip=skip), encoder.final_layer_norm(x))
    for skip in (-1, 3):
        with pytest.raises(ValueError, match="skip must lie in"):
            encoder(ids, skip=skip)


def test_pooled_takes_the_first_end_token(encoder):
    ids = torch.tensor([[598, 5, 599, 599, 599], [598, 599, 0, 0, 0]])
    hidden = torch.arange(2 * 5 * 32.0).view(2, 5, 32)
    assert torch.equal(encoder.pooled(hidden, ids), torch.stack([hidden[0, 2], hidden[1, 1]]))
    legacy = TextEncoder(dataclasses.replace(TINY, eos_id=2))
    assert torch.equal(legacy.pooled(hidden, ids), torch.stack([hidden[0, 2], hidden[1, 1]]))
    with pytest.raises(ValueError, match="every row needs an end token, id 599"):
        encoder.pooled(hidden[:, :2], ids[:, :2])


def test_projection():
    encoder = TextEncoder(dataclasses.replace(TINY, projection=7))
    ids = torch.tensor([[598, 5, 599]])
    hidden = encoder(ids)
    torch.testing.assert_close(encoder.pooled(hidden, ids), hidden[:, 2] @ encoder.text_projection.weight.T)


@pytest.mark.parametrize("ids, match", [
    (torch.zeros(2, 13, dtype=torch.int64), "L ≤ 12.*shape \\(2, 13\\)"),
    (torch.zeros(12, dtype=torch.int64), "shape \\(12,\\)"),
    (torch.zeros(2, 12), "float32"),
    (torch.zeros(0, 12, dtype=torch.int64), "shape \\(0, 12\\)"),
    (torch.zeros(1, 0, dtype=torch.int64), "shape \\(1, 0\\)"),
    (torch.full((1, 3), 600), "\\[0, 599\\], got \\[600, 600\\]"),
    (torch.full((1, 3), -1), "got \\[-1, -1\\]"),
])
def test_bad_ids(encoder, ids, match):
    with pytest.raises(ValueError, match=match):
        encoder(ids)


def test_initial_weights_are_clips():
    torch.manual_seed(0)
    encoder = TextEncoder(TextConfig(vocab_size=2000, width=256, heads=4, layers=4))
    block = encoder.encoder["layers"][0]
    for weight, std in [
        (encoder.embeddings["token_embedding"].weight, 0.02),
        (encoder.embeddings["position_embedding"].weight, 0.01),
        (block.self_attn.q_proj.weight, 256**-0.5), (block.self_attn.out_proj.weight, (256 * 8) ** -0.5),
        (block.mlp.fc1.weight, 512**-0.5), (block.mlp.fc2.weight, (256 * 8) ** -0.5),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert not list(encoder.buffers()) and not block.mlp.fc1.bias.any()


def test_every_weight_gets_a_gradient_and_learning_works():
    torch.manual_seed(0)
    encoder = TextEncoder(TextConfig(vocab_size=30, context_length=6, width=16, layers=2, heads=2))
    ids, target = torch.randint(0, 30, (8, 6)), torch.randn(8, 6, 16)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (encoder(ids) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in encoder.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_half_precision(encoder):
    ids = torch.randint(0, 600, (1, 12))
    full = encoder(ids)
    half = encoder.to(torch.bfloat16)(ids)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().mean() < 0.05


def test_vocabulary_is_the_same_in_any_order_of_texts():
    words = ["red", "heart", "cat", "face", "smiling"]
    lines = [" ".join(random.Random(i).choices(words, k=4)) for i in range(50)]
    first = train_bpe(lines, 525)
    random.Random(1).shuffle(lines)
    assert train_bpe(lines, 525).merges == first.merges


def test_a_word_that_was_forgotten_does_not_come_back(tmp_path):
    tokenizer = train_bpe(["red heart", "pizza"], 520, context_length=10)
    tokenizer.add("zorb", 520)
    tokenizer.save_pretrained(tmp_path)
    tokenizer.forget("zorb")
    tokenizer.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).encode("zorb") == tokenizer.encode("zorb")


def test_another_kind_of_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": [["a", -1.0]]}}))
    with pytest.raises(ValueError, match="no byte-pair encoding"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_length_that_is_not_told_is_the_usual_one(tmp_path):
    train_bpe(["red heart", "pizza"], 520, context_length=10).save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": None}))
    assert Tokenizer.from_pretrained(tmp_path).context_length == 77
