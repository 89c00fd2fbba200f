"""benchmarks/systems.py on painters that copy, paint white or paint noise, with a judge that was never trained."""

import importlib.util
from pathlib import Path

import pytest
import torch

from diffusionbook.clip import CLIP
from diffusionbook.data import emoji
from diffusionbook.metrics import Judge, JudgeConfig, extract


@pytest.fixture(scope="module")
def systems():
    path = Path(__file__).parents[2] / "benchmarks" / "systems.py"
    spec = importlib.util.spec_from_file_location("systems", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    attributes = [a for split in ("tone_style", "object_style") for a in emoji(split).attributes]
    known = {key: tuple(sorted({a[key] for a in attributes}, key=str)) for key in ("name", "group", "tone")}
    return Judge(JudgeConfig(known["name"], known["group"], known["tone"], channels=(32, 32, 32, 32))).eval()


@pytest.fixture(scope="module")
def clip():
    return CLIP.from_pretrained("emoji")


def test_a_copyist_is_as_good_as_the_real_pictures(systems, judge, clip):
    data = emoji("object_style")

    def copy(captions, seed):
        return torch.stack([data[data.find(caption)][0] for caption in captions])

    chosen = list(range(40))
    real, attributes = data.images(chosen), [data.attributes[i] for i in chosen]
    captions = [data.captions[i] for i in chosen]
    painted, seconds = systems.paint_all(lambda captions, seed: copy([data_caption(a) for a in attributes[seed:][
        :len(captions)]], seed), captions)
    assert torch.equal(painted, real) and seconds > 0
    train = extract(emoji("train").images(range(50)), judge.features)
    found = systems.scores(painted, real, attributes, captions, judge=judge, clip=clip, train=train)
    assert abs(found["FID"]) < 1e-3 and found["KID"] <= 1e-6 and abs(found["nearer than real"] - 0.5) < 1e-9
    assert all(found[f"{key} / real"] in (1.0, pytest.approx(1.0)) or found[key] == 0 for key in ("style", "group"))
    white = systems.scores(torch.ones_like(real), real, attributes, captions, judge=judge, clip=clip, train=train)
    assert white["FID"] > found["FID"]
    assert found["CLIP score"] == found["CLIP score of real"] == white["CLIP score of real"] > white["CLIP score"]


def data_caption(attributes):
    from diffusionbook.data import compose_caption
    return compose_caption(attributes["name"], tone=attributes["tone"], style=attributes["style"])


def test_the_whole_measurement_runs(systems, judge, clip):
    def noise(captions, seed):
        return torch.cat([torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed + i)) * 2 - 1
                          for i in range(len(captions))])

    train = extract(emoji("train").images(range(50)), judge.features)
    results = systems.measure(noise, pictures=40, judge=judge, clip=clip, train=train)
    assert results.keys() == {"tone_style", "object_style", "variety"}
    assert results["variety"]["distance among seeds"] > 0 and results["variety"]["styles in 8 seeds"] >= 1
    assert all(0 <= results["tone_style"][key] <= 1 for key in ("style", "tone", "name in 5"))
    text = systems.table([{"system": "noise", "parameters": 0, "device": "cpu", "results": results}])
    assert "| object_style | noise |" in text and "KID" in text
    same = systems.variety(lambda captions, seed: torch.zeros(len(captions), 3, 64, 64), ["pizza"], judge)
    assert same == {"styles in 8 seeds": 1, "captions with two styles or more": 0,
                    "distance among seeds": pytest.approx(0, abs=1e-5)}
