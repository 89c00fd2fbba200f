"""Chapter 08: the training loop, against hand computation and against itself."""

import json
import math

import pytest
import torch
from torch import nn

from diffusionbook.training import EMA, fit, warmup_cosine


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x)


def line_loss(model):
    """Noisy points on y = 3 a - b + 1/2; all chance comes from the generator."""
    def loss(generator):
        x = torch.randn(8, 2, generator=generator)
        y = 3 * x[:, :1] - x[:, 1:] + 0.5 + 0.1 * torch.randn(8, 1, generator=generator)
        return (model(x) - y).square().mean(), {"spread": x.std().item()}
    return loss


def run(folder=None, *, model=None, steps=30, **options):
    model = model or Line()
    average = fit(model, options.pop("loss", None) or line_loss(model), steps=steps, lr=0.05, folder=folder,
                  progress=False, **{"warmup": 5, "every": 10, **options})
    return model, average


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a) and a.keys() == b.keys()


def test_ema_by_hand():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = EMA(model, decay=0.2)
    model.weight.data.fill_(2.0)
    average.update(model)  # decay (1 + 0) / (10 + 0) = 0.1
    assert average.weights["weight"].item() == pytest.approx(0.1 * 1 + 0.9 * 2)
    model.weight.data.fill_(4.0)
    average.update(model)  # decay 2 / 11
    assert average.weights["weight"].item() == pytest.approx(2 / 11 * 1.9 + 9 / 11 * 4)
    before = average.weights["weight"].item()
    model.weight.data.fill_(0.0)
    average.update(model)  # 3 / 12 is more than 0.2, which holds from here on
    assert average.weights["weight"].item() == pytest.approx(0.2 * before)


def test_swap_exchanges_and_exchanges_back():
    model = nn.Linear(2, 2)
    average = EMA(model)
    kept = {key: p.clone() for key, p in model.state_dict().items()}
    with torch.no_grad():
        model.weight.add_(1)
    average.swap(model)
    assert same(model.state_dict(), kept)
    average.swap(model)
    assert torch.equal(model.weight, kept["weight"] + 1) and torch.equal(average.weights["weight"], kept["weight"])


def test_the_average_does_not_follow_the_model_by_accident():
    model = nn.Linear(2, 2)
    average = EMA(model)
    before = average.weights["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(average.weights["weight"], before)


def test_warmup_and_cosine_values():
    rate = [warmup_cosine(step, steps=110, warmup=10) for step in range(110)]
    assert rate[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rate[10] == 1 and rate[60] == pytest.approx(0.5) and rate[35] == pytest.approx(0.5 + math.sqrt(0.5) / 2)
    assert 0 < rate[-1] < 0.001
    assert all(a > b for a, b in zip(rate[10:], rate[11:], strict=False))
    assert warmup_cosine(0, steps=5, warmup=0) == 1
    assert warmup_cosine(3, steps=4, warmup=8) == 0.5


def test_fit_learns_the_line():
    model, average = run(steps=300)
    assert torch.allclose(model.layer.weight, torch.tensor([[3.0, -1.0]]), atol=0.05)
    assert torch.allclose(average.weights["layer.weight"], torch.tensor([[3.0, -1.0]]), atol=0.3)
    assert model.layer.bias.item() == pytest.approx(0.5, abs=0.05)


def test_same_seed_same_weights_other_seed_others():
    states = [run(seed=seed)[0].state_dict() for seed in (1, 1, 2)]
    assert same(states[0], states[1]) and not same(states[0], states[2])


def test_the_first_step_is_adamw_with_warmup():
    """Adam's first step moves each weight by the learning rate, after weight decay."""
    model = Line()
    before = model.layer.weight.detach().clone()
    fit(model, line_loss(model), steps=1, lr=0.5, warmup=5, weight_decay=0.1, progress=False)
    rate = 0.5 / 5
    step = model.layer.weight - before * (1 - rate * 0.1)
    assert torch.allclose(step.abs(), torch.full_like(step, rate), rtol=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, whole_average = run(tmp_path / "whole", steps=30)

    class Interrupted(Exception):
        pass

    model, calls = Line(), 0
    step = line_loss(model)

    def until_step_27(generator):
        nonlocal calls
        calls += 1
        if calls == 27:
            raise Interrupted
        return step(generator)

    with pytest.raises(Interrupted):
        run(tmp_path / "parts", model=model, loss=until_step_27)
    torch.manual_seed(99)
    resumed, average = run(tmp_path / "parts", model=Line())
    assert same(resumed.state_dict(), whole.state_dict())
    assert same(average.weights, whole_average.weights) and average.updates == whole_average.updates == 30
    logs = [[json.loads(line) for line in (tmp_path / part / "log.jsonl").read_text().splitlines()]
            for part in ("whole", "parts")]
    assert [row["step"] for row in logs[1]] == [10, 20, 30]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]


def test_a_finished_run_is_not_run_again(tmp_path):
    model, average = run(tmp_path)
    log = (tmp_path / "log.jsonl").read_text()
    again, average_again = run(tmp_path)
    assert same(again.state_dict(), model.state_dict()) and same(average_again.weights, average.weights)
    assert (tmp_path / "log.jsonl").read_text() == log


def test_log_lines_parse_and_count_the_mean_loss(tmp_path):
    model, losses = Line(), []
    inner = line_loss(model)

    def loss(generator):
        value, numbers = inner(generator)
        losses.append(value.item())
        return value, numbers

    run(tmp_path, model=model, loss=loss, steps=25)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 25]
    assert [row["loss"] for row in rows] == pytest.approx(
        [sum(losses[a:b]) / (b - a) for a, b in ((0, 10), (10, 20), (20, 25))], rel=1e-4)
    assert all(row.keys() == {"step", "seconds", "loss", "spread"} and row["seconds"] >= 0 for row in rows)


def test_evaluate_sees_the_average_and_training_goes_on_with_the_weights(tmp_path):
    plain, average = run()
    model, seen = Line(), []

    def evaluate():
        seen.append(model.layer.weight.detach().clone())
        return {"first": model.layer.weight[0, 0].item()}

    evaluated, _ = run(tmp_path, model=model, evaluate=evaluate)
    assert same(evaluated.state_dict(), plain.state_dict())
    assert torch.equal(seen[-1], average.weights["layer.weight"])
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert row["first"] == pytest.approx(average.weights["layer.weight"][0, 0].item(), rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(tmp_path, bad):
    model, calls = Line(), 0
    inner = line_loss(model)

    def loss(generator):
        nonlocal calls
        calls += 1
        value, _ = inner(generator)
        return value * bad if calls == 18 else value

    with pytest.raises(FloatingPointError, match="at step 17; lower lr=0.05"):
        run(tmp_path, model=model, loss=loss)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 10 and all(torch.isfinite(p).all() for p in state["model"].values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "state.pt"]


def test_large_gradients_are_clipped():
    """One huge outlier would throw Adam's memory off for long; with clipping its size counts no more than 1."""
    def gradient_norms(scale):
        model, norms = Line(), []

        def loss(generator):
            return scale * (model(torch.ones(1, 2)) ** 2).mean()

        step = torch.optim.AdamW.step

        def spy(self, *args, **kwargs):
            norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
            return step(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", spy)
            fit(model, loss, steps=2, lr=1e-3, warmup=1, progress=False)
        return norms

    assert gradient_norms(1e6)[0] == pytest.approx(1, rel=1e-4)
    assert gradient_norms(1e-3)[0] < 0.5


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_refused(steps):
    with pytest.raises(ValueError, match="steps must be at least 1"):
        run(steps=steps)


def test_progress_shows_only_when_asked(capsys):
    run(steps=2)
    assert capsys.readouterr().err == ""
    model = Line()
    fit(model, line_loss(model), steps=2, lr=0.1)
    assert "loss" in capsys.readouterr().err
