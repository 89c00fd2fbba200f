"""benchmarks/systems.py on painters that copy, paint white or paint noise, with a judge that was never trained."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from diffusionbook.data import emoji
from diffusionbook.metrics import Judge, JudgeConfig


@pytest.fixture(scope="module")
def systems():
    path = Path(__file__).parents[2] / "benchmarks" / "systems.py"
    spec = importlib.util.spec_from_file_location("systems", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # as for a script
    spec.loader.exec_module(module)
    sys.path.pop(0)
    return module


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    attributes = [a for split in ("tone_style", "object_style") for a in emoji(split).attributes]
    known = {key: tuple(sorted({a[key] for a in attributes}, key=str)) for key in ("name", "group", "tone")}
    return Judge(JudgeConfig(known["name"], known["group"], known["tone"], channels=(32, 32, 32, 32))).eval()


@pytest.fixture(scope="module")
def critic(systems, judge):
    torch.manual_seed(0)
    return systems.Critic(judge).eval()


def test_a_copyist_is_as_good_as_the_real_pictures(systems, judge, critic, tmp_path):
    data = emoji("object_style")

    def copy(captions, seed):
        return torch.stack([data[data.find(caption)][0] for caption in captions])

    chosen = list(range(40))
    real, attributes = data.images(chosen), [data.attributes[i] for i in chosen]
    captions = [data.captions[i] for i in chosen]
    painted = systems.paint_all(lambda captions, seed: copy([data_caption(a) for a in attributes[seed:][
        :len(captions)]], seed), captions, tmp_path)
    assert (painted - real).abs().max() < 1e-6  # real pictures are whole 255ths, so nothing is rounded
    train = systems.features_of(judge, emoji("train").images(range(50))).double()
    told = {"others": data.images(range(40, 120)), "judge": judge, "critic": critic, "train": train}
    found = systems.scores(painted, real, attributes, captions, **told)
    assert found["FID"] == pytest.approx(found["FID of real"], rel=1e-4) and found["FID"] > 0
    assert found["KID"] == pytest.approx(found["KID of real"], abs=1e-6) and abs(found["nearer than real"] - 0.5) < 1e-9
    assert all(found[f"{key} / real"] in (1.0, pytest.approx(1.0)) or found[key] == 0 for key in ("style", "group"))
    white = systems.scores(torch.ones_like(real), real, attributes, captions, **told)
    assert white["FID"] > found["FID"]
    assert found["CLIP score"] == pytest.approx(found["CLIP score of real"], abs=1e-6)
    assert white["CLIP score of real"] == found["CLIP score of real"] != white["CLIP score"]


def data_caption(attributes):
    from diffusionbook.data import compose_caption
    return compose_caption(attributes["name"], tone=attributes["tone"], style=attributes["style"])


def test_the_whole_measurement_runs(systems, judge, critic, tmp_path):
    def noise(captions, seed):
        return torch.cat([torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed + i)) * 2 - 1
                          for i in range(len(captions))])

    train = systems.features_of(judge, emoji("train").images(range(50))).double()
    results = systems.measure(noise, tmp_path, pictures=40, judge=judge, critic=critic, train=train)
    assert results.keys() == {"tone_style", "object_style", "variety"}
    assert results["variety"]["distance among seeds"] > 0 and results["variety"]["styles in 8 seeds"] >= 1
    assert all(0 <= results["tone_style"][key] <= 1 for key in ("style", "tone", "name in 5"))
    text = systems.table([{"system": "noise", "parameters": 0, "device": "cpu", "results": results}])
    assert "| object_style | noise |" in text and "KID" in text
    same = systems.variety(torch.zeros(systems.SEEDS, 3, 64, 64), judge)
    assert same == {"styles in 8 seeds": 1, "captions with two styles or more": 0,
                    "distance among seeds": pytest.approx(0, abs=1e-5)}


def test_what_was_painted_is_not_painted_again(systems, tmp_path):
    calls = []

    def paint(captions, seed):
        calls.append((len(captions), seed))
        return torch.full((len(captions), 3, 64, 64), 0.5)

    captions = ["pizza"] * (systems.BATCH + 3)
    first = systems.paint_all(paint, captions, tmp_path)
    assert calls == [(systems.BATCH, 0), (3, systems.BATCH)] and (first - 0.5).abs().max() < 1 / 255
    again = systems.paint_all(paint, captions, tmp_path)
    assert len(calls) == 2 and torch.equal(first, again)
    systems.paint_all(paint, captions * 2, tmp_path)  # the batch of three is of no use now
    assert calls[2:] == [(systems.BATCH, systems.BATCH), (6, 2 * systems.BATCH)]


def test_a_critic_is_trained_once(systems, judge, tmp_path):
    images, captions = emoji("train").images(range(4)), emoji("train").captions[:4]
    scores = [systems.trained_critic(judge, tmp_path, steps=3).score(images, captions) for _ in range(2)]
    assert scores[0].shape == (4,) and scores[0].abs().max() <= 1
    assert torch.equal(*scores) and len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
    assert (systems.Critic(judge).eval().score(images, captions) - scores[0]).abs().max() > 1e-4


def test_the_clock_takes_the_median_for_a_picture(systems, monkeypatch):
    asked = {"a": [], "b": []}
    paints = {name: lambda captions, seed, name=name: asked[name].append((tuple(captions), seed)) for name in asked}

    def in_turns(calls, rounds, *, cuda):
        for call in calls:
            call()
        return [[800.0, 1600.0, 80_000.0], [8.0, 16.0, 24.0]]  # milliseconds

    monkeypatch.setattr(systems, "in_turns", in_turns)
    found = systems.clock(paints, torch.device("cpu"))
    assert found["seconds"] == {"a": 0.2, "b": 0.002} and found["threads"] == torch.get_num_threads()
    assert asked["a"] == asked["b"] and len(asked["a"][0][0]) == 8
