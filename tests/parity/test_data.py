"""The emoji's Parquet file, read by pandas and by datasets."""

import io

import numpy as np
import pytest
from PIL import Image

from diffusionbook.data import SPLITS, STYLES, emoji, to_pil


@pytest.fixture(scope="module")
def path(root):
    return root / "diffusionbook" / "data" / "emoji.parquet"


def test_pandas_reads_it(path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(path)
    assert frame["split"].value_counts().to_dict() == {split: len(emoji(split)) for split in SPLITS}
    assert set(frame["style"]) == set(STYLES)
    dataset = emoji("object_style")
    held = frame[frame["split"] == "object_style"].reset_index()
    assert held["caption"].tolist() == dataset.captions
    picture = Image.open(io.BytesIO(held["image"][17]["bytes"]))
    assert np.array_equal(np.asarray(picture), np.asarray(to_pil(dataset[17][0][None])[0]))


def test_datasets_reads_it_as_pictures(path, tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path))
    assert isinstance(table.features["image"], datasets.Image)
    assert len(table) == sum(len(emoji(split)) for split in SPLITS)
    train = emoji("train")
    first = next(row for row in table if row["split"] == "train")
    assert isinstance(first["image"], Image.Image) and first["image"].size == (64, 64)
    assert first["caption"] == train.captions[0]
    assert np.array_equal(np.asarray(first["image"]), np.asarray(to_pil(train[0][0][None])[0]))
    assert first["tags"] == train.attributes[0]["tags"]
