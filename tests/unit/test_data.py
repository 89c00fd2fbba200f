"""Chapter 00: pictures as tensors and back, and the emoji as they ship."""

import hashlib
import io
import json
import re
import shutil
from collections import Counter

import build_emoji
import numpy as np
import pytest
import torch
from PIL import Image

from diffusionbook import data
from diffusionbook.data import (
    SPLITS,
    STYLES,
    TONES,
    check_images,
    check_negative,
    compose_caption,
    emoji,
    film,
    from_pil,
    image_grid,
    pick_device,
    to_pil,
)
from diffusionbook.text import TextConfig, clean_text, train_bpe

HELD_OUT = ("object_style", "tone_style")
SIZES = {"train": 9_788, "validation": 282, "object_style": 299, "tone_style": 300}


# Pictures and tensors


def test_all_256_values_survive_the_round_trip():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = np.stack([values, values[::-1], values.T], axis=2)
    tensor = from_pil(Image.fromarray(picture))
    assert tensor.shape == (1, 3, 16, 16) and tensor.dtype == torch.float32
    assert tensor[0, 0, 0, 0] == -1 and tensor[0, 0, 15, 15] == 1
    assert torch.allclose(tensor[0, 0], torch.arange(256.0).reshape(16, 16) / 127.5 - 1, atol=1e-6)
    assert np.array_equal(np.asarray(to_pil(tensor)[0]), picture)


@pytest.mark.parametrize("dtype, off", [(torch.float64, 0), (torch.float16, 0), (torch.bfloat16, 1)])
def test_other_floating_types_become_pictures(dtype, off):
    values = torch.arange(256).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    back = torch.from_numpy(np.asarray(to_pil((values / 127.5 - 1).to(dtype))[0]).copy()).int()
    assert (back - values[0].permute(1, 2, 0)).abs().max() <= off


def test_what_a_network_overshoots_is_cut():
    assert np.asarray(to_pil(torch.full((1, 3, 2, 2), 1.009))[0]).min() == 255
    assert np.asarray(to_pil(torch.full((1, 3, 2, 2), -1.009))[0]).max() == 0


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "palette file"])
def test_transparency_becomes_white(kind):
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    picture.putpixel((1, 2), (0, 0, 0, 255))
    if kind.startswith("palette"):
        picture = picture.quantize(4)
    else:
        picture = picture.convert(kind)
    if kind == "palette file":
        picture.save(file := io.BytesIO(), "PNG")
        picture = Image.open(file)
        assert picture.mode == "P"
    tensor = from_pil(picture)
    expected = torch.ones(1, 3, 4, 4)
    expected[:, :, 2, 1] = -1
    assert torch.equal(tensor, expected)


def test_half_transparent_black_on_white_is_grey():
    assert from_pil(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))[0, 0, 0, 0].item() == pytest.approx(127 / 127.5 - 1)


def test_grey_pictures_get_three_equal_channels():
    tensor = from_pil(Image.new("L", (2, 2), 51))
    assert torch.allclose(tensor, torch.full((1, 3, 2, 2), 51 / 127.5 - 1))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_are_refused_and_not_cut_off(dtype):
    picture = Image.fromarray(np.full((4, 4), 30_000, dtype))
    for use in (from_pil, lambda picture: image_grid([picture])):
        with pytest.raises(ValueError, match="8 bits per colour, got PIL's mode"):
            use(picture)


@pytest.mark.parametrize("other, name", [(np.zeros((2, 4, 3), np.uint8), "ndarray"), ("cat.png", "str"),
                                         (torch.zeros(1, 3, 4, 4), "Tensor")])
def test_other_things_are_not_pictures(other, name):
    with pytest.raises(ValueError, match=f"must be PIL images, got {name}; Image.open or Image.fromarray"):
        from_pil(other)


def test_photographs_stand_upright():
    picture = Image.new("RGB", (4, 2))
    picture.putpixel((0, 0), (255, 255, 255))
    exif = picture.getexif()
    exif[0x0112] = 6  # orientation: show it turned by 90 degrees
    picture.save(file := io.BytesIO(), "PNG", exif=exif)
    tensor = from_pil(Image.open(file))
    assert tensor.shape == (1, 3, 4, 2) and tensor[0, 0, 0, 1] == 1 and tensor.sum() == 3 * (1 - 7)


def test_size_keeps_the_middle():
    picture = np.zeros((8, 16, 3), np.uint8)
    picture[:, 4:12] = 255  # a white square between two black margins
    assert from_pil(Image.fromarray(picture), size=8).min() == 1
    shape = from_pil(Image.new("RGB", (30, 50)), size=16).shape
    assert shape == (1, 3, 16, 16)
    strip = Image.new("RGB", (100_000, 2))
    strip.paste((255, 255, 255), (49_990, 0, 50_010, 2))
    assert from_pil(strip, size=np.int64(4)).min() == 1  # the middle alone is enlarged


@pytest.mark.parametrize("size", [0, -3, 7.5, (8, 8), "8"])
def test_the_size_of_a_crop_is_one_whole_number(size):
    with pytest.raises(ValueError, match="size must be a whole number of pixels"):
        from_pil(Image.new("RGB", (8, 8)), size=size)


def test_a_sheet_of_one_picture():
    picture = Image.new("RGB", (3, 2), "red")
    assert image_grid(picture, scale=2).size == (6, 4) and image_grid(picture).getpixel((2, 1)) == (255, 0, 0)
    for options in ({"columns": 0}, {"columns": -1}, {"scale": 0}):
        with pytest.raises(ValueError, match="columns and scale must be at least 1"):
            image_grid([picture], **options)


def test_pictures_of_several_sizes_need_one_size():
    pictures = [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))]
    with pytest.raises(ValueError, match="size="):
        from_pil(pictures)
    assert from_pil(pictures, size=4).shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match="empty"):
        from_pil([])


@pytest.mark.parametrize("images, message", [
    (torch.full((1, 3, 2, 2), 255.0), "divide by 127.5"),
    (torch.full((1, 3, 2, 2), -1.02), r"\[-1, 1\]"),
    (torch.full((1, 3, 2, 2), float("nan")), "NaN"),
    (torch.full((1, 3, 2, 2), float("inf")), r"\[-1, 1\]"),
    (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "uint8"),
    (torch.zeros(3, 2, 2), r"\(3, 2, 2\)"),
    (torch.zeros(1, 4, 2, 2), r"\(1, 4, 2, 2\)"),
    (torch.zeros(1, 2, 2, 3), r"\(1, 2, 2, 3\)"),
])
def test_what_is_not_a_batch_of_pictures_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        to_pil(images)


def test_one_bad_value_among_many_is_found():
    images = torch.zeros(2, 3, 8, 8)
    images[1, 2, 7, 7] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        check_images(images)


def test_sides_must_be_multiples():
    check_images(torch.zeros(1, 3, 8, 16), multiple=8)
    with pytest.raises(ValueError, match="multiples of 8, got 8×12"):
        check_images(torch.zeros(1, 3, 8, 12), multiple=8)


def test_image_grid_puts_each_picture_in_its_place():
    levels = [0, 40, 80, 120, 160]
    pictures = [Image.new("RGB", (3, 2), (level, level, level)) for level in levels]
    sheet = np.asarray(image_grid(pictures, columns=2, gap=1, scale=2))[..., 0]
    assert sheet.shape == (2 * (3 * 2 + 2), 2 * (2 * 3 + 1))
    expected = np.full((8, 7), 255)
    for i, level in enumerate(levels):
        top, left = 3 * (i // 2), 4 * (i % 2)
        expected[top:top + 2, left:left + 3] = level
    assert np.array_equal(sheet, expected.repeat(2, axis=0).repeat(2, axis=1))


def test_image_grid_takes_tensors_and_starts_a_new_row_after_eight():
    images = torch.linspace(-1, 1, 9).view(9, 1, 1, 1).expand(9, 3, 4, 4)
    sheet = image_grid(images, gap=0)
    assert sheet.size == (32, 8)
    assert sheet.getpixel((0, 4)) == (255,) * 3 and sheet.getpixel((31, 0)) == (223,) * 3
    with pytest.raises(ValueError, match="at least one"):
        image_grid([])
    with pytest.raises(ValueError, match=r"one size, got \[\(4, 4\), \(8, 4\)\]"):
        image_grid([Image.new("RGB", (8, 4)), Image.new("RGB", (4, 4))])


def test_image_grid_shows_transparency_as_white():
    assert image_grid([Image.new("RGBA", (1, 1), (0, 0, 0, 0))]).getpixel((0, 0)) == (255, 255, 255)


def test_film_plays_its_pictures_in_order_and_rests_on_the_last():
    levels = [0, 60, 120, 240]
    pictures = [Image.new("RGB", (3, 2), (level, 0, level)) for level in levels]
    shown = film(pictures, seconds=2, scale=3)
    with Image.open(io.BytesIO(shown)) as opened:
        assert opened.format == "PNG" and opened.n_frames == 4 and opened.size == (9, 6) and opened.info["loop"] == 0
        for i, level in enumerate(levels):
            opened.seek(i)
            assert opened.convert("RGB").getcolors() == [(54, (level, 0, level))]
            assert opened.info["duration"] == (1500 if i == 3 else 500)
    assert shown._repr_png_() == bytes(shown) and repr(shown) == f"<film of {len(shown):,} bytes>"


def test_film_takes_tensors_and_needs_a_picture():
    noise = torch.rand(5, 3, 8, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with Image.open(io.BytesIO(film(noise, colors=8))) as opened:
        assert opened.n_frames == 5 and opened.size == (6, 8)
        seen = set()
        for i in range(5):
            opened.seek(i)
            seen |= {color for _, color in opened.convert("RGB").getcolors()}
        assert len(seen) <= 8  # one palette for all
    assert film(noise) == film(noise)
    with pytest.raises(ValueError, match="at least one"):
        film([])


def test_pick_device_follows_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device().type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device().type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device().type == "cpu"


# The emoji


@pytest.fixture(scope="module")
def rows():
    """What the file says about every picture, and the picture's bytes."""
    table = data._emoji_table()
    rows = table.drop_columns("image").to_pylist()
    for row, image in zip(rows, table["image"].to_pylist(), strict=True):
        row["bytes"] = image["bytes"]
    return rows


def of(rows, *splits):
    return [row for row in rows if row["split"] in splits]


def test_the_splits_have_their_sizes(rows):
    assert Counter(row["split"] for row in rows) == SIZES
    for split in HELD_OUT:
        assert SIZES[split] >= 256
        of_style = Counter(row["style"] for row in of(rows, split))
        assert all(95 <= of_style[style] <= 100 for style in STYLES)


@pytest.mark.parametrize("split", SPLITS)
def test_emoji_gives_each_split_with_its_captions(split):
    dataset = emoji(split)
    assert len(dataset) == SIZES[split]
    image, caption, attributes = dataset[-1]
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32 and caption == dataset.captions[-1]
    assert -1 <= image.min() < image.max() <= 1
    assert caption.startswith(attributes["name"])
    assert {"name", "tone", "style", "gender", "group", "subgroup", "tags", "hexcode"} <= set(attributes)


def test_items_are_the_pictures_of_the_file(rows):
    dataset, row = emoji("train"), of(rows, "train")[1234]
    image, caption, attributes = dataset[1234]
    assert caption == row["caption"] and attributes["hexcode"] == row["hexcode"]
    with Image.open(io.BytesIO(row["bytes"])) as picture:
        assert torch.equal(image, from_pil(picture)[0])
    assert torch.equal(dataset.images([5, 1234])[1], image)


def test_every_combination_appears_once(rows):
    assert len({(row["name"], row["tone"], row["style"]) for row in rows}) == len(rows) == sum(SIZES.values())


def test_no_held_out_combination_is_trained_on(rows):
    trained = {(row["name"], row["tone"], row["style"]) for row in of(rows, "train", "validation")}
    captions = {row["caption"] for row in of(rows, "train")}
    for row in of(rows, *HELD_OUT, "validation"):
        if row["split"] in HELD_OUT:
            assert (row["name"], row["tone"], row["style"]) not in trained
        assert row["caption"] not in captions


def test_no_held_out_picture_is_trained_on_under_another_name(rows):
    def pixels(row):
        with Image.open(io.BytesIO(row["bytes"])) as picture:
            return hashlib.sha256(picture.convert("RGB").tobytes()).digest()

    trained = {pixels(row): row for row in of(rows, "train")}
    assert not [row["caption"] for row in of(rows, *HELD_OUT, "validation") if pixels(row) in trained]


def test_an_object_held_out_in_one_style_is_trained_in_the_other_two(rows):
    trained = {(row["name"], row["style"]) for row in of(rows, "train")}
    for row in of(rows, "object_style"):
        assert row["tone"] is None
        others = set(STYLES) - {row["style"]}
        assert {style for style in STYLES if (row["name"], style) in trained} == others


def test_every_pair_of_parts_of_a_held_out_person_is_trained(rows):
    train = of(rows, "train")
    known = [{tuple(row[part] for part in pair) for row in train}
             for pair in (("name", "tone"), ("name", "style"), ("tone", "style"))]
    for row in of(rows, "tone_style"):
        assert row["tone"] in TONES
        assert (row["name"], row["tone"]) in known[0], row["caption"]
        assert (row["name"], row["style"]) in known[1], row["caption"]
        assert (row["tone"], row["style"]) in known[2], row["caption"]


def test_running_examples_are_never_held_out(rows):
    held = {row["name"] for row in of(rows, "validation", *HELD_OUT)}
    assert not held & {"red heart", "pizza", "grinning face", "cat face"}
    assert not [row for row in of(rows, "object_style") if row["group"] == "flags"]


def test_captions_follow_the_grammar(rows):
    tone = f"({'|'.join(TONES)})( and ({'|'.join(TONES)}))?"
    for row in rows:
        rest = row["caption"].removeprefix(row["name"])
        assert re.fullmatch(f"(, {tone} skin tone)?(, ({'|'.join(STYLES)}) style)?", rest), row["caption"]
        full = compose_caption(row["name"], tone=row["tone"], style=row["style"])
        assert row["caption"] in (full, full.removesuffix(f", {row['style']} style"))


def test_a_fifth_of_the_training_captions_leaves_the_style_out(rows):
    train = of(rows, "train")
    silent = [row for row in train if not row["caption"].endswith(" style")]
    assert 0.18 < len(silent) / len(train) < 0.22
    for style in STYLES:
        of_style = sum(row["style"] == style for row in train)
        assert 0.17 < sum(row["style"] == style for row in silent) / of_style < 0.23
    assert all(row["caption"].endswith(f", {row['style']} style") for row in of(rows, "validation", *HELD_OUT))


def test_captions_survive_the_tokenizer_and_fit(rows):
    config = TextConfig.preset("emoji")
    captions = sorted({row["caption"] for row in rows})
    tokenizer = train_bpe(captions, config.vocab_size, context_length=config.context_length)
    for caption in captions:
        ids = tokenizer.encode(caption)
        assert len(ids) <= config.context_length - 2, caption
        assert tokenizer.decode(ids).replace(" ", "") == clean_text(caption).replace(" ", "")


def test_compose_caption():
    assert compose_caption("pizza") == "pizza"
    assert compose_caption("pizza", style="3d") == "pizza, 3d style"
    assert compose_caption("man", tone="dark", style="noto") == "man, dark skin tone, noto style"


def test_find_gives_the_picture_of_a_full_caption():
    dataset = emoji("train")
    for caption in ("red heart, noto style", "pizza, 3d style"):
        attributes = dataset[dataset.find(caption)][2]
        assert compose_caption(attributes["name"], style=attributes["style"]) == caption
    with pytest.raises(ValueError, match="red heart, noto style"):
        dataset.find("red hart, noto style")


def test_smaller_pictures_are_averages_of_the_large_ones():
    index = emoji("train").find("pizza, noto style")
    large, small = emoji("train")[index][0], emoji("train", size=16)[index][0]
    assert small.shape == (3, 16, 16)
    assert (torch.nn.functional.avg_pool2d(large, 4) - small).abs().mean() < 0.06


def test_unknown_splits_and_sizes_are_refused():
    with pytest.raises(ValueError, match="train, validation, object_style, tone_style"):
        emoji("test")
    for size in (0, 65, 32.0):
        with pytest.raises(ValueError, match="1…64"):
            emoji(size=size)


# A file that isn't what it was


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the package's data that a test may spoil."""
    source = data.files("diffusionbook") / "data"
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("emoji.parquet", "emoji.json"):
        shutil.copy(source / name, folder / name)
    monkeypatch.setattr(data, "files", lambda package: tmp_path)
    data._emoji_table.cache_clear()
    yield folder
    data._emoji_table.cache_clear()


def test_a_whole_copy_is_read(copied):
    assert len(emoji("validation")) == SIZES["validation"]


@pytest.mark.parametrize("name", ["emoji.parquet", "emoji.json"])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing.*install diffusionbook again"):
        emoji()


def test_a_truncated_file_is_named(copied):
    path = copied / "emoji.parquet"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="emoji.parquet is truncated or altered"):
        emoji()


def test_an_altered_file_is_named(copied):
    path = copied / "emoji.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="emoji.parquet is truncated or altered"):
        emoji()


def test_the_card_tells_the_truth(root, rows):
    folder = root / "diffusionbook" / "data"
    card = json.loads((folder / "emoji.json").read_text())
    assert card["sha256"] == hashlib.sha256((folder / "emoji.parquet").read_bytes()).hexdigest()
    assert card["pictures"] == len(rows)
    assert card["names"] == len({row["name"] for row in rows})
    assert card["splits"] == SIZES
    assert card["styles"] == Counter(row["style"] for row in rows)
    assert card["sources"] == {key: f"{name}@{version}" for key, (name, version, _) in build_emoji.PACKAGES.items()}


def test_the_licence_notices_ship_beside_the_pictures(root):
    text = (root / "diffusionbook" / "data" / "LICENSES.md").read_text()
    for needed in ("Fluent", "MIT", "Noto", "Apache", "OFL", "Twemoji", "CC BY 4.0", "emojibase", "Unicode"):
        assert needed in text, f"{needed} is not named"


# The script that built it


@pytest.mark.parametrize("base, expected", [
    ({"label": "woman: red hair"}, "woman"),
    ({"label": "man, beard"}, "man"),
    ({"label": "boy"}, "man"),
    ({"label": "mermaid", "gender": 0}, "woman"),
    ({"label": "merman", "gender": 1}, "man"),
    ({"label": "person: beard"}, "person"),
    ({"label": "couple with heart: woman, man"}, None),
    ({"label": "pizza"}, None),
    ({"label": "mango"}, None),
])
def test_gender_is_what_the_name_states(base, expected):
    assert build_emoji.gender(base) == expected


def test_pictures_that_no_licence_covers_are_left_out(rows):
    for name in ("flag: Italy", "technologist", "woman technologist", "video game", "paperclip"):
        assert not build_emoji.is_free({"name": name, "style": "3d"})
        assert build_emoji.is_free({"name": name, "style": "noto"})
    for name in ("triangular flag", "linked paperclips", "pizza"):
        assert build_emoji.is_free({"name": name, "style": "3d"})
    assert all(build_emoji.is_free(row) for row in rows)


def test_lot_is_fair_and_depends_only_on_its_key():
    assert build_emoji.lot("style", "1F355", "3d") == build_emoji.lot("style", "1F355", "3d")
    drawn = np.array([build_emoji.lot("any", str(i)) for i in range(4000)])
    assert 0 <= drawn.min() and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.02 and abs((drawn < 0.2).mean() - 0.2) < 0.02
    assert build_emoji.lot("a", "bc") != build_emoji.lot("ab", "c")


def test_caption_is_silent_about_the_style_only_in_training():
    row = {"name": "man", "tone": "dark", "hexcode": "1F468-1F3FF", "style": "noto", "split": "validation"}
    assert build_emoji.caption(row) == "man, dark skin tone, noto style"
    trained = [build_emoji.caption({**row, "hexcode": str(i), "split": "train"}) for i in range(999)]
    named = [caption.endswith("noto style") for caption in trained]
    assert 0.75 < np.mean(named) < 0.85
    assert all(build_emoji.caption({**row, "hexcode": str(i)}).endswith("noto style") for i in range(99))


def test_look_alikes_finds_near_twins_and_nothing_else():
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    pictures[3] = np.clip(pictures[1].astype(int) + 2, 0, 255)  # a little brighter: 2 < LOOK_ALIKE
    pictures[4] = np.clip(pictures[2].astype(int) + 9, 0, 255)  # much brighter: not a twin
    assert build_emoji.look_alikes(pictures).tolist() == [False, True, False, True, False]


def test_split_keeps_the_promises_on_a_small_set(monkeypatch):
    monkeypatch.setattr(build_emoji, "HELD_OUT", 6)
    rows = [{"name": f"thing {i}", "tone": None, "group": "objects", "hexcode": str(i), "style": style}
            for i in range(20) for style in STYLES]
    rows += [{"name": f"person {i}", "tone": tone, "group": "people & body", "hexcode": f"{i}{tone}", "style": style}
             for i in range(9) for tone in (None, *TONES) for style in STYLES]
    twin = np.zeros(len(rows), bool)
    twin[:30] = True  # ten things with a look-alike: never held out
    build_emoji.split(rows, twin)
    counts = Counter((row["split"], row["style"]) for row in rows)
    assert all(counts[split, style] == 2 for split in SPLITS[1:] for style in STYLES)
    assert {row["split"] for row in rows[:30]} == {"train"}
    assert all(row["tone"] is None for row in rows if row["split"] == "object_style")
    assert all(row["tone"] in TONES for row in rows if row["split"] == "tone_style")
    held = Counter(row["name"] for row in rows if row["split"] in SPLITS[1:])
    assert max(held.values()) == 1  # at most one picture of each name, so that all pairs of parts stay


def test_pictures_are_stored_as_the_script_writes_them(rows):
    """The same Pillow gives the same bytes; another one at least the same pixels."""
    for row in rows[::2000]:
        with Image.open(io.BytesIO(row["bytes"])) as picture:
            assert picture.format == "WEBP" and picture.size == (64, 64) and picture.mode == "RGB"
            pixels = np.asarray(picture)
        again = build_emoji.webp(pixels)
        with Image.open(io.BytesIO(again)) as picture:
            assert np.array_equal(np.asarray(picture), pixels)
        if Image.__version__ == "13.0.0":
            assert again == row["bytes"], row["caption"]


def test_the_table_is_written_twice_with_the_same_bytes(rows, tmp_path):
    some = [row | {"image": {"bytes": row["bytes"], "path": None}} for row in rows[::100]]
    for name in ("once", "twice"):
        build_emoji.write_table([dict(row) for row in some], tmp_path / name)
    once, twice = ((tmp_path / name).read_bytes() for name in ("once", "twice"))
    assert once == twice and len(once) > 100_000


@pytest.mark.parametrize("seconds", [-3, 0, 400])
def test_a_film_that_no_file_can_hold(seconds):
    with pytest.raises(ValueError, match="can't be shared by 3 pictures: each needs from 0.001 to 60"):
        film(torch.zeros(3, 3, 8, 8), seconds=seconds)


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(ValueError, match="at least one pixel, got one of 0×4"):
        from_pil(Image.new("RGB", (0, 4)), size=4)


def test_negative_is_one_string():
    with pytest.raises(ValueError, match="negative is one string for all pictures, got list"):
        check_negative(["blue", "green"], 3.0)
