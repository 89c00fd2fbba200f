"""Chapter 13 against transformers (text encoder, tokenizer) and open_clip (tokenizer)."""

import dataclasses
import importlib.util
import random
import unicodedata
import warnings
from pathlib import Path

import pytest
import torch

from diffusionbook.text import (
    GPT2Tokenizer,
    TextConfig,
    TextEncoder,
    Tokenizer,
    clean_text,
    clip_tokenizer,
    gpt2_tokenizer,
    train_bpe,
)

transformers = pytest.importorskip("transformers")

TINY = TextConfig(vocab_size=600, context_length=12, width=32, layers=3, heads=4)

CORPUS = [
    "a smiling face with hearts, medium skin tone, noto style",
    "the woman's red heart isn't broken, it's mended",
    "flag: são tomé & príncipe",
    "crème brûlée 42 years ago",
    "猫の顔 と 犬",
    "😀😃😄 grinning faces!!!",
    "they'll say they've won; i'm sure you'd agree",
    "größte straße übermäßig",
    "привет мир, как дела",
]


def without_prefix(state):
    """transformers before 5.6 puts `text_model.` in front of the names."""
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()
            if not name.endswith("position_ids")}


def reference(config, **changes):
    kind = config.to_config()["architectures"][0]
    theirs = transformers.CLIPTextConfig(**config.to_config() | changes)
    return getattr(transformers, kind)(theirs).eval()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("projection", [None, 20])
def test_encoder_equals_transformers(activation, projection):
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, activation=activation, projection=projection, ff_width=72)
    theirs, ours = reference(config), TextEncoder(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.3)
    ours.load_state_dict(without_prefix(theirs.state_dict()))
    ids = torch.randint(0, 598, (3, 12))
    ids[:, 0] = 598
    ids[0, 4:] = ids[1, 11:] = 599
    ids[2, 7], ids[2, 8:] = 599, 0
    with torch.no_grad():
        out = theirs(ids, output_hidden_states=True)
        hidden = ours(ids)
        close = dict(rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(hidden, out.last_hidden_state, **close)
        pooled = out.pooler_output if projection is None else out.text_embeds
        torch.testing.assert_close(ours.pooled(hidden, ids), pooled, **close)
        for skip in (1, 2):
            expected = ours.final_layer_norm(out.hidden_states[-1 - skip])
            torch.testing.assert_close(ours(ids, skip=skip), expected, **close)


def test_pooling_of_old_configs_equals_transformers():
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, eos_id=2)
    theirs, ours = reference(config), TextEncoder(config).eval()
    ours.load_state_dict(without_prefix(theirs.state_dict()))
    ids = torch.randint(0, 600, (4, 12))
    with torch.no_grad():
        pooled = ours.pooled(ours(ids), ids)
        torch.testing.assert_close(pooled, theirs(ids).pooler_output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "sd21", "emoji"])
@pytest.mark.parametrize("projection", [None, 768])
def test_presets_have_the_names_and_shapes_of_transformers(name, projection):
    config = dataclasses.replace(TextConfig.preset(name), projection=projection)
    with torch.device("meta"):
        theirs, ours = reference(config), TextEncoder(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in without_prefix(theirs.state_dict()).items()}
    assert {key: tuple(tensor.shape) for key, tensor in ours.state_dict().items()} == shapes
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_config_goes_to_transformers_and_back(tmp_path):
    config = dataclasses.replace(TINY, ff_width=72, activation="gelu", pad_id=599)
    theirs = transformers.CLIPTextConfig(**config.to_config())
    theirs.save_pretrained(tmp_path)
    assert TextConfig.from_config(theirs.to_dict()) == config
    assert TextConfig.from_config(transformers.CLIPTextConfig.from_pretrained(tmp_path).to_dict()) == config
    assert TextConfig.from_config({}) == TextConfig.from_config(transformers.CLIPTextConfig().to_dict())


PIECES = {
    "plain": ["a", "photo", "of", "the", "cat's", "they'll", "I'M", "RED", "heart,", "smiling", "underwater",
              "!", "?!", "...", "(2", "x", "3)", "2024", "#tag", "rock'n'roll", "_", "by-word", "it''s"],
    "accents": ["crème", "brûlée", "Ångström", "São", "naïve", "e\u0301te\u0301", "ŒUVRE", "straße",
                "İstanbul", "ΣΑΣ"],
    "scripts": ["猫", "红色的心", "低い", "안녕하세요", "привет", "МИР", "שלום", "مرحبا", "नमस्ते", "ไทย",
                "①", "½", "٣"],
    "emoji": ["😀", "❤️", "👩🏽\u200d🚀", "🇸🇹", "👍🏿👍🏻", "☕", "™", "→", "𝔘𝔫𝔦"],
    "entities": ["&amp;", "&amp;lt;3", "&eacute;", "&#128512;", "&#x2764;", "&nbsp;", "&quot;hi&quot;",
                 "&unknown;", "&", "<b>", "</w>", "&amp;amp;amp;"],
    "control": ["\x00", "a\x07b", "\x1b[31mred", "\t", "\n", "\r\n", "\u200b", "\ufeff", "\u00ad",
                "\u2028", "\x85", "\u3000", "\x7f", "\ufffd"],
    "broken": ["cafÃ©", "â€œquoteâ€\x9d", "Ã¼ber", "ðŸ˜€", "ｆｕｌｌ", "ﬁ"],
}
# Greek, Cyrillic, Hebrew, Hiragana, Chinese, pictographs
SCRIPTS = [(0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x3041, 0x3096), (0x4E00, 0x9FA5),
           (0x1F300, 0x1F64F)]


def strings(count, seed=0):
    """Texts of many kinds, in a fixed order: single pieces, mixtures, random characters, empty, over-long."""
    rng = random.Random(seed)
    pieces = [piece for group in PIECES.values() for piece in group]
    texts = ["", " ", "\n", *pieces, *map(" ".join, PIECES.values())]
    texts += ["long " * 200, "猫" * 150, "x" * 500, "😀" * 90]
    while len(texts) < count:
        kind = rng.random()
        if kind < 0.75:
            joiner = rng.choice([" ", " ", "  ", "", ", "])
            texts.append(joiner.join(rng.choices(pieces, k=rng.randint(1, 12))))
        elif kind < 0.9:
            texts.append("".join(chr(rng.randint(1, 0x24F)) for _ in range(rng.randint(1, 20))))
        else:
            length = rng.randint(1, 20)
            texts.append("".join(chr(rng.randint(*rng.choice(SCRIPTS))) for _ in range(length)))
    return texts


def quiet(tokenizer, texts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenizer(texts)


def public_clip(pad):
    try:
        return clip_tokenizer(pad=pad)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("pad", ["zero", "eos"])
@pytest.mark.parametrize("vocabulary", ["learned", "public"])
def test_tokenizer_equals_transformers(tmp_path, pad, vocabulary):
    ours = train_bpe(CORPUS, 690, pad=pad) if vocabulary == "learned" else public_clip(pad)
    ours.save_pretrained(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    # transformers repairs nothing and composes accents instead: it is given the cleaned text.
    texts = [text for text in strings(3200) if unicodedata.is_normalized("NFC", clean_text(text))]
    assert len(texts) >= 2000 and theirs.model_max_length == 77
    batch = theirs([clean_text(text) for text in texts], padding="max_length", truncation=True, max_length=77)
    rows = quiet(ours, texts).tolist()
    wrong = [text for text, a, b in zip(texts, rows, batch["input_ids"], strict=True) if a != b]
    assert not wrong, (len(wrong), wrong[:5])
    assert len(theirs) == ours.vocab_size and theirs.pad_token_id == ours.pad_id


@pytest.mark.parametrize("pad", ["zero", "eos"])
def test_a_tokenizer_saved_by_transformers_is_read(tmp_path, pad):
    ours = train_bpe(CORPUS, 690, pad=pad, context_length=20)
    ours.save_pretrained(tmp_path / "ours")
    transformers.CLIPTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = Tokenizer.from_pretrained(tmp_path / "theirs")
    assert (again.vocab, again.merges, again.pad) == (ours.vocab, ours.merges, pad)
    assert again.context_length == 20


def test_tokenizer_equals_open_clip():
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip_torch is not installed (pip install --no-deps open_clip_torch)")
    # The package wants torchvision, its tokenizer does not: load that file alone.
    file = Path(spec.submodule_search_locations[0]) / "tokenizer.py"
    file_spec = importlib.util.spec_from_file_location("open_clip_tokenizer", file)
    module = importlib.util.module_from_spec(file_spec)
    file_spec.loader.exec_module(module)
    theirs, ours = module.SimpleTokenizer(), clip_tokenizer()
    texts = strings(10_000, seed=1)
    rows, expected = quiet(ours, texts), theirs(texts)
    wrong = [text for text, a, b in zip(texts, rows, expected, strict=True) if not torch.equal(a, b)]
    assert not wrong, (len(wrong), wrong[:5])
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (49_406, 49_407, 49_408)


def test_gpt2_tokenizer_equals_transformers(tmp_path):
    ours = gpt2_tokenizer(context_length=40)
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path / "ours")
    texts = [*strings(10_000, seed=2), "two  spaces", "trailing ", "line\n\n  break", "it's<|endoftext|> over"]
    expected = theirs(texts, padding="max_length", truncation=True, max_length=40)["input_ids"]
    rows = quiet(ours, texts).tolist()
    wrong = [text for text, a, b in zip(texts, rows, expected, strict=True) if a != b]
    assert not wrong, (len(wrong), wrong[:5])
    assert len(theirs) == ours.vocab_size == 50_257 and theirs.eos_token_id == ours.eos_id == 50_256
    theirs.save_pretrained(tmp_path / "theirs")
    again = GPT2Tokenizer.from_pretrained(tmp_path / "theirs")
    assert again.vocab == ours.vocab and again.merges == ours.merges and again.context_length == 40
