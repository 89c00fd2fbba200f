"""The loop: the average, the rate, resuming after the worst, and finding what went wrong."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import StackDataset, TensorDataset

from diffusionbook.data import emoji
from diffusionbook.denoising import Denoiser, Wrapped, min_snr
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.training import (
    DIGIT_FONTS,
    EMA,
    DenoisingLoss,
    add_gradients,
    balanced_weights,
    digits,
    first_bad_module,
    generator_for,
    load_denoiser,
    mean_loss,
    read_recipe,
    run_recipe,
    save_denoiser,
    train,
    warmup_cosine,
)
from diffusionbook.unet import UNet, UNetConfig

TINY = {"channels": (8, 8), "attention": (None, "self"), "heads": (1, 1), "layers_per_block": 1, "in_channels": 1,
        "out_channels": 1, "context_width": None, "groups": 4, "sample_size": 8}


class Line(nn.Module):
    """y = w x + b with the same start every time."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        nn.init.constant_(self.layer.weight, 0.3)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x):
        return self.layer(x)


POINTS = torch.randn(200, 2, generator=torch.Generator().manual_seed(7))


def line_loss(net, x, generator):
    """Noisy points on y = 3 a - b + 1/2."""
    y = 3 * x[:, :1] - x[:, 1:] + 0.5 + 0.1 * torch.randn(len(x), 1, generator=generator)
    return (net(x) - y).square().mean(), {"spread": x.std().item()}


def run(folder=None, *, net=None, loss=line_loss, steps=30, **options):
    net = net or Line()
    average = train(net, POINTS, loss, steps=steps, folder=folder, progress=False,
                    **{"lr": 0.05, "warmup": 5, "every": 10, "batch": 8, **options})
    return net, average


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a) and a.keys() == b.keys()


def log(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


# --- the average and the rate ------------------------------------------------------------------
def test_ema_by_hand():
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1.0)
    average = EMA(net, decay=0.2)
    net.weight.data.fill_(2.0)
    average.update(net)  # decay (1 + 0) / (10 + 0) = 0.1
    assert average.weights["weight"].item() == pytest.approx(0.1 * 1 + 0.9 * 2)
    net.weight.data.fill_(4.0)
    average.update(net)  # decay 2 / 11
    assert average.weights["weight"].item() == pytest.approx(2 / 11 * 1.9 + 9 / 11 * 4)
    before = average.weights["weight"].item()
    net.weight.data.fill_(0.0)
    average.update(net)  # 3 / 12 is more than 0.2, which holds from here on
    assert average.weights["weight"].item() == pytest.approx(0.2 * before)


def test_swap_exchanges_and_exchanges_back():
    net = nn.Linear(2, 2)
    average = EMA(net)
    kept = {key: p.clone() for key, p in net.state_dict().items()}
    with torch.no_grad():
        net.weight.add_(1)
    assert torch.equal(average.weights["weight"], kept["weight"]), "the average followed by accident"
    average.swap(net)
    assert same(net.state_dict(), kept)
    average.swap(net)
    assert torch.equal(net.weight, kept["weight"] + 1) and torch.equal(average.weights["weight"], kept["weight"])


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_ema_refuses_a_decay(decay):
    with pytest.raises(ValueError, match="decay"):
        EMA(Line(), decay=decay)


def test_warmup_and_cosine_values():
    rate = [warmup_cosine(step, steps=110, warmup=10) for step in range(110)]
    assert rate[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rate[10] == 1 and rate[60] == pytest.approx(0.5) and rate[35] == pytest.approx(0.5 + math.sqrt(0.5) / 2)
    assert 0 < rate[-1] < 0.001
    assert all(a > b for a, b in zip(rate[10:], rate[11:], strict=False))
    assert warmup_cosine(0, steps=5, warmup=0) == 1
    assert warmup_cosine(3, steps=4, warmup=8) == 0.5
    assert warmup_cosine(110, steps=110, warmup=10) == warmup_cosine(200, steps=110, warmup=10) == 0  # and no rise


# --- the loop ----------------------------------------------------------------------------------
def test_train_learns_the_line():
    net, average = run(steps=300)
    assert torch.allclose(net.layer.weight, torch.tensor([[3.0, -1.0]]), atol=0.05)
    assert torch.allclose(average.weights["layer.weight"], torch.tensor([[3.0, -1.0]]), atol=0.3)
    assert net.layer.bias.item() == pytest.approx(0.5, abs=0.05)


def test_same_seed_same_weights_other_seed_others():
    states = [run(seed=seed)[0].state_dict() for seed in (1, 1, 2)]
    assert same(states[0], states[1]) and not same(states[0], states[2])


def test_training_leaves_the_callers_chance_alone():
    net = Line()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    run(net=net)
    assert torch.equal(torch.rand(2), expected)


def test_the_first_step_is_adamw_with_warmup():
    """Adam's first step moves each weight by the learning rate, after weight decay."""
    net = Line()
    before = net.layer.weight.detach().clone()
    train(net, POINTS, line_loss, steps=1, lr=0.5, warmup=5, weight_decay=0.1, progress=False)
    rate = 0.5 / 5
    step = net.layer.weight - before * (1 - rate * 0.1)
    assert torch.allclose(step.abs(), torch.full_like(step, rate), rtol=1e-4)


def test_weights_say_how_often_a_picture_is_drawn():
    drawn = []

    def loss(net, x, generator):
        drawn.extend(x[:, 0].tolist())
        return net(x).square().mean()

    train(Line(), torch.arange(4.0).view(4, 1).expand(4, 2), loss, steps=50, lr=0.01, batch=40, progress=False,
          weights=torch.tensor([0.0, 1.0, 1.0, 2.0]))
    share = [drawn.count(value) / len(drawn) for value in range(4)]
    assert share == pytest.approx([0, 0.25, 0.25, 0.5], abs=0.04)  # 2000 draws: four standard deviations


@pytest.mark.parametrize("weights", [torch.ones(4, 1), torch.zeros(4), torch.tensor([1.0, -1, 1, 1]),
                                     [1.0, math.nan, 1, 1], torch.ones(3)])
def test_weights_that_make_no_sense(weights):
    with pytest.raises(ValueError, match="weights must be one number for each of the 4 pictures"):
        train(Line(), torch.ones(4, 2), line_loss, steps=1, lr=0.01, batch=2, weights=weights, progress=False)


def test_weights_may_be_counts():
    found = [train(Line(), torch.arange(8.0).view(4, 2), line_loss, steps=5, lr=0.01, batch=2, progress=False,
                   weights=weights).weights for weights in (torch.tensor([1, 2, 3, 4]), [1.0, 2.0, 3.0, 4.0])]
    assert same(*found)


def test_balanced_weights():
    weights = balanced_weights(["cat", "hand", "hand", "hand", "hand"])
    assert weights.tolist() == [1, 0.5, 0.5, 0.5, 0.5]


def test_parts_of_a_batch_give_the_gradient_of_the_whole():
    def loss(net, x, generator):
        return (net(x) - x[:, :1] ** 2).square().mean()

    gradients = []
    for accumulate in (1, 2, 8):
        net = Line()
        value, _ = add_gradients(net, POINTS, loss, seed=0, step=5, batch=16, accumulate=accumulate)
        gradients.append(torch.cat([value.view(1), *(p.grad.flatten() for p in net.parameters())]))
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
    assert torch.allclose(gradients[0], gradients[2], rtol=1e-5, atol=1e-6)


def test_bf16_runs_the_network_in_bfloat16_and_keeps_the_weights():
    seen = []

    def loss(net, x, generator):
        y = net(x)
        seen.append(y.dtype)
        return y.float().square().mean()

    net, _ = run(loss=loss, bf16=True, steps=2)
    assert set(seen) == {torch.bfloat16} and net.layer.weight.dtype == torch.float32


def test_dropout_belongs_to_the_step():
    class Dropping(Line):
        def forward(self, x):
            return self.layer(nn.functional.dropout(x, training=self.training))

    nets = []
    for other in (0, 1):
        torch.manual_seed(other)
        nets.append(run(net=Dropping())[0].state_dict())
    assert same(*nets)


def test_large_gradients_are_clipped():
    """One huge outlier would throw Adam's memory off for long; with clipping its size counts no more than 1."""
    def gradient_norms(scale):
        norms, step = [], torch.optim.AdamW.step

        def spy(self, *args, **kwargs):
            norms.append(torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm())
            return step(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", spy)
            train(Line(), torch.ones(4, 2), lambda net, x, generator: scale * net(x).square().mean(), steps=2, lr=1e-3,
                  warmup=1, progress=False)
        return norms

    assert gradient_norms(1e6)[0] == pytest.approx(1, rel=1e-4)
    assert gradient_norms(1e-3)[0] < 0.5


def test_evaluate_sees_the_average_in_evaluation_mode_and_training_goes_on(tmp_path):
    plain, average = run()
    net, seen = Line(), []

    def evaluate():
        seen.append((net.layer.weight.detach().clone(), net.training))
        return {"first": net.layer.weight[0, 0].item()}

    evaluated, _ = run(tmp_path, net=net, evaluate=evaluate)
    assert same(evaluated.state_dict(), plain.state_dict()) and not evaluated.training
    assert torch.equal(seen[-1][0], average.weights["layer.weight"]) and not seen[-1][1]
    assert log(tmp_path)[-1]["first"] == pytest.approx(average.weights["layer.weight"][0, 0].item(), rel=1e-4)


@pytest.mark.parametrize("options, word", [
    ({"steps": 0}, "steps must be at least 1"),
    ({"steps": -3}, "steps must be at least 1"),
    ({"batch": 0}, "batch must be at least 1"),
    ({"every": 0}, "every must be at least 1"),
    ({"accumulate": 0}, "accumulate must be at least 1"),
    ({"accumulate": 3}, "batch of 8 can't be cut into 3 equal parts"),
    ({"lr": 0.0}, "lr must be above 0 and warmup not below, got 0.0"),
    ({"warmup": -1}, "warmup not below, got .* and -1"),
    ({"net": Line().to("meta")}, "has shapes and no weights"),
    ({"clip": 0}, "clip must be above 0, got 0"),
    ({"clip": -1.0}, "clip must be above 0"),
    ({"clip": float("nan")}, "clip must be above 0"),
    ({"weights": torch.ones(3)}, "one number for each of the 200 pictures, .*got shape \\(3,\\)"),
    ({"weights": torch.ones(300)}, "one number for each of the 200 pictures, .*got shape \\(300,\\)"),
    ({"net": Line().half()}, "lost on weights in torch.float16; train in float32"),
    ({"net": Line().bfloat16()}, "lost on weights in torch.bfloat16; train in float32"),
])
def test_options_that_make_no_sense(options, word, tmp_path):
    with pytest.raises(ValueError, match=word):
        run(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_frozen_weights_may_have_any_type():
    net = nn.Sequential(nn.Linear(2, 2).half().requires_grad_(False), Line())
    train(net, POINTS, lambda net, x, generator: line_loss(net[1], x, generator), steps=1, lr=0.1, progress=False)


@pytest.mark.parametrize("make, name", [
    (lambda: emoji("validation"), "EmojiDataset"), (lambda: TensorDataset(POINTS), "TensorDataset"),
    (lambda: StackDataset(POINTS), "StackDataset"), (lambda: POINTS.numpy(), "ndarray"), (lambda: list(POINTS), "list"),
])
def test_a_data_set_that_gives_no_batches(make, name):
    with pytest.raises(ValueError, match=f"{name} can't; use a tensor of pictures"):
        train(Line(), make(), line_loss, steps=1, lr=0.1, progress=False)


def test_an_empty_data_set():
    with pytest.raises(ValueError, match="pictures must be at least 1, got 0"):
        train(Line(), POINTS[:0], line_loss, steps=1, lr=0.1, progress=False)
    with pytest.raises(ValueError, match="at least one picture"):
        mean_loss(Line(), POINTS[:0], line_loss)


def test_progress_shows_only_when_asked(capsys):
    run(steps=2)
    assert capsys.readouterr().err == ""
    train(Line(), POINTS, line_loss, steps=2, lr=0.1)
    assert "loss" in capsys.readouterr().err


# --- log, state, resume ------------------------------------------------------------------------
def test_log_lines_parse_and_count_the_mean_loss(tmp_path):
    losses = []

    def loss(net, x, generator):
        value, numbers = line_loss(net, x, generator)
        losses.append(value.item())
        return value, numbers

    run(tmp_path, loss=loss, steps=25)
    rows = log(tmp_path)
    assert [row["step"] for row in rows] == [10, 20, 25]
    assert [row["loss"] for row in rows] == pytest.approx(
        [sum(losses[a:b]) / (b - a) for a, b in ((0, 10), (10, 20), (20, 25))], rel=1e-4)
    assert all(row.keys() == {"step", "loss", "gradient", "spread"} for row in rows)


def test_a_finished_run_is_not_run_again(tmp_path):
    net, average = run(tmp_path)
    before = (tmp_path / "log.jsonl").read_text()
    again, average_again = run(tmp_path)
    assert same(again.state_dict(), net.state_dict()) and same(average_again.weights, average.weights)
    assert (tmp_path / "log.jsonl").read_text() == before


def test_a_resumed_run_obeys_its_own_options(tmp_path):
    """Not those that were saved with the optimizer."""
    weights = []
    for decay in (0.0, 1.0):
        run(tmp_path / str(decay), steps=10, weight_decay=0.0)
        weights.append(run(tmp_path / str(decay), steps=20, weight_decay=decay)[0].layer.weight)
    assert (weights[0] - weights[1]).abs().max() > 1e-3


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, whole_average = run(tmp_path / "whole", steps=30)
    calls = 0

    def until_step_27(net, x, generator):
        nonlocal calls
        calls += 1
        if calls == 27:
            raise KeyboardInterrupt
        return line_loss(net, x, generator)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", loss=until_step_27)
    assert [row["step"] for row in log(tmp_path / "parts")] == [10, 20]
    torch.manual_seed(99)
    resumed, average = run(tmp_path / "parts")
    assert same(resumed.state_dict(), whole.state_dict())
    assert same(average.weights, whole_average.weights) and average.updates == whole_average.updates == 30
    assert log(tmp_path / "parts") == log(tmp_path / "whole")


KILLED = """
import os, signal, sys, torch
from diffusionbook import training
sys.path.insert(0, sys.argv[3])
from test_training import line_loss, run

calls, saves = 0, 0

def loss(net, x, generator):
    global calls
    calls += 1
    if sys.argv[2] == "computing" and calls == 27:
        os.kill(os.getpid(), signal.SIGKILL)
    return line_loss(net, x, generator)

def save(state, path):
    global saves
    saves += 1
    if sys.argv[2] == "saving" and saves == 3:  # the log has its third line, the state is half written
        open(path, "wb").write(b"PK" + bytes(999))
        os.kill(os.getpid(), signal.SIGKILL)
    really(state, path)

really, torch.save = torch.save, save
run(sys.argv[1], loss=loss, net=None)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("moment", ["computing", "saving"])
def test_kill_9_costs_no_more_than_the_steps_since_the_last_state(tmp_path, moment, root):
    whole, whole_average = run(tmp_path / "whole")
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "parts", moment, root / "tests" / "unit"])
    assert killed.returncode == -9
    assert len(log(tmp_path / "parts")) == (2 if moment == "computing" else 3)
    resumed, average = run(tmp_path / "parts")
    assert same(resumed.state_dict(), whole.state_dict()) and same(average.weights, whole_average.weights)
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["log.jsonl", "state.pt"]


def test_a_log_without_a_state_is_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 10, "loss": 1}\n{"step": 20, "lo')
    run(tmp_path, steps=10)
    assert [row["step"] for row in log(tmp_path)] == [10] and log(tmp_path)[0]["loss"] != 1


def test_a_state_of_the_first_loop_goes_on(tmp_path):
    """What version 0.1 wrote: without fused AdamW, and with the state of a running generator."""
    net = Line()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, betas=(0.9, 0.99))
    net(POINTS).sum().backward()
    optimizer.step()
    torch.save({"step": 20, "seconds": 7, "model": net.state_dict(), "average": EMA(net).weights, "updates": 20,
                "optimizer": optimizer.state_dict(), "generator": torch.Generator().get_state()}, tmp_path / "state.pt")
    resumed, average = run(tmp_path)
    assert average.updates == 30 and [row["step"] for row in log(tmp_path)] == [30]
    assert not same(resumed.state_dict(), net.state_dict())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"", b"\x80\x02.", b"PK\x03\x04", b"nothing of the kind"])
def test_a_damaged_state_is_refused(tmp_path, content):
    run(tmp_path, steps=10)
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match="state.pt is damaged or belongs to another network"):
        run(tmp_path, steps=20)


@pytest.mark.parametrize("number", [torch.tensor(0.5), np.float32(0.5), 1234567])
def test_numbers_of_every_kind_go_to_the_log(tmp_path, number):
    run(tmp_path, steps=10, evaluate=lambda: {"score": number})
    assert log(tmp_path)[-1]["score"] == number


def test_a_state_that_does_not_fit_is_refused(tmp_path):
    run(tmp_path)
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(ValueError, match="belongs to another network; choose another folder"):
        train(nn.Linear(3, 3), torch.ones(4, 3), line_loss, steps=40, lr=0.1, folder=tmp_path, progress=False)
    assert (tmp_path / "state.pt").read_bytes() == before
    other = nn.ModuleDict({"weight": nn.Linear(1, 1)})
    kept = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match="its tensors have other names or shapes"):
        train(other, torch.ones(4, 1), line_loss, steps=40, lr=0.1, folder=tmp_path, progress=False)
    assert same(other.state_dict(), kept)
    (tmp_path / "state.pt").write_bytes(before[:-200])
    with pytest.raises(ValueError, match="is damaged or belongs"):
        run(tmp_path, steps=40)


# --- when it goes wrong ------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(tmp_path, bad):
    net, calls = Line(), 0

    def loss(net, x, generator):
        nonlocal calls
        calls += 1
        return line_loss(net, x, generator)[0] * (bad if calls >= 18 else 1)

    with pytest.raises(FloatingPointError, match=r"at step 17: the first .* is the gradient at the output of layer "):
        run(tmp_path, net=net, loss=loss)
    assert all(torch.isfinite(p).all() for p in net.parameters())
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 10 and all(torch.isfinite(p).all() for p in state["model"].values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "state.pt"]


class Log(nn.Module):
    def forward(self, x):
        return x.log()


class Root(nn.Module):
    def forward(self, x):
        return x.clamp(min=0).sqrt()  # at 0: finite, with an infinite slope


def stack(*modules):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), *modules, nn.Linear(4, 1))


@pytest.mark.parametrize("net, expected", [
    (stack(nn.Tanh()), None),
    (stack(nn.Tanh(), Log()), "the output of 2 (Log)"),
    (stack(nn.ReLU(), Root()), "the gradient at the output of 1 (ReLU)"),
])
def test_the_first_bad_module_is_named(net, expected):
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    assert first_bad_module(net, lambda: net(x).square().mean().backward()) == expected
    assert not any(module._forward_hooks for module in net.modules())


def test_bad_data_and_bad_weights_are_named():
    net = stack(nn.Tanh())
    found = first_bad_module(net, lambda: net(torch.full((1, 2), float("nan"))).sum().backward())
    assert found == "the input of 0 (Linear)"
    with torch.no_grad():
        net[2].bias.fill_(float("inf"))
    assert first_bad_module(net, lambda: None) == "the weights 2.bias, before the pass began"


def test_a_nan_in_a_unet_names_the_module():
    torch.manual_seed(0)
    net = UNet(UNetConfig(**TINY))
    net.mid_block.resnets[0].register_forward_hook(lambda module, inputs, output: output / 0)
    with pytest.raises(FloatingPointError, match=r"the output of mid_block\.resnets\.0 \(ResidualBlock\)"):
        train(net, torch.zeros(4, 1, 8, 8), NoiseSchedule.linear(), steps=1, lr=1e-3, batch=4, progress=False)


def test_the_loss_at_the_start_is_checked():
    pictures = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    net = UNet(UNetConfig(**TINY))
    value, _ = add_gradients(net, pictures, DenoisingLoss(NoiseSchedule.linear()), seed=0, step=0, batch=64)
    assert value.item() == pytest.approx(1, abs=0.1)  # 4096 squared normal numbers: 1 ± 0.02
    with torch.no_grad():
        net.conv_out.bias.fill_(3.0)
    with pytest.raises(ValueError, match="the first loss is 9.*where 1 was expected"):
        train(net, pictures, NoiseSchedule.linear(), steps=1, lr=1e-3, progress=False)
    train(net, pictures, DenoisingLoss(NoiseSchedule.linear()), steps=1, lr=1e-3, progress=False)


# --- the loss of a diffusion model -------------------------------------------------------------
def test_denoising_loss_is_what_its_parts_say():
    schedule, x0 = NoiseSchedule.cosine(), torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    g = generator_for(4)
    noise, t = torch.randn(5, 2, generator=g), torch.randint(1000, (5,), generator=g)
    net = Line()

    def tell(x, t):
        return net(x).expand(-1, 2)

    wanted = schedule.velocity(x0, noise, t)
    plain = (tell(schedule.add_noise(x0, noise, t), t) - wanted).square().mean(1)
    weight = schedule.snr[t].clamp(max=5) / (schedule.snr[t] + 1)
    for option, expected in ((None, plain), (min_snr, plain * weight)):
        loss = DenoisingLoss(schedule, prediction="v", weight=option)(tell, x0, generator_for(4))
        assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_what_a_network_is_told_is_dropped_together():
    told = []

    def net(x, t, context, embedding):
        told.append((context, embedding))
        return x

    batch = {"x0": torch.zeros(2000, 1), "context": torch.ones(2000, 3, 2), "embedding": torch.full((2000,), 7)}
    loss = DenoisingLoss(NoiseSchedule.linear(), drop=0.1, empty={"embedding": 0, "context": torch.zeros(3, 2)})
    loss(net, batch, generator_for(0))
    context, embedding = told[0]
    assert set(embedding.tolist()) == {0, 7} and torch.equal(context.amax((1, 2)) == 0, embedding == 0)
    assert (embedding == 0).float().mean().item() == pytest.approx(0.1, abs=0.03)  # four standard deviations
    assert batch["embedding"].min() == 7, "the data were changed"


def test_pictures_that_are_not_scaled_are_refused():
    loss = DenoisingLoss(NoiseSchedule.linear())
    for shape, value, reach in [((2, 2), 255.0, "255, and 50"), ((2, 3, 4, 4), 1.5, "1.5, and 1"),
                                ((2, 1, 4, 4), -2.0, "2, and 1"), ((2, 4, 4, 4), math.nan, "nan, and 50")]:
        with pytest.raises(ValueError, match=rf"x0 reaches {reach} is allowed; bring pictures to \[-1, 1\]"):
            loss(Line(), torch.full(shape, value), generator_for(0))
    latents = torch.full((2, 3, 4, 4), 1.5)  # three channels, as pictures have
    assert replace(loss, limit=50)(lambda x, t: torch.zeros_like(x), latents, generator_for(0)).isfinite()


def test_who_is_told_nothing_must_be_told_something_else():
    loss, told = DenoisingLoss(NoiseSchedule.linear(), drop=0.1), {"x0": torch.zeros(2, 2), "embedding": torch.ones(2)}
    with pytest.raises(ValueError, match="drop=0.1 needs empty, what is told instead of embedding"):
        loss(lambda x, t, embedding: x, told, generator_for(0))
    assert loss(lambda x, t: x, told["x0"], generator_for(0)) > 0  # told nothing anyway


@pytest.mark.parametrize("batch, words", [
    (torch.zeros(2, 2), "must hold embedding, and it has x0"),
    ({"images": torch.zeros(2, 2), "embedding": torch.zeros(2)}, "must hold x0, and it has images, embedding"),
])
def test_a_batch_that_lacks_something_is_refused(batch, words):
    with pytest.raises(ValueError, match=words):
        DenoisingLoss(NoiseSchedule.linear(), drop=0.1, empty={"embedding": 0})(Line(), batch, generator_for(0))


def test_mean_loss_judges_and_leaves_the_network_as_it_was():
    """In training mode dropout would answer otherwise each time, and other networks would learn from the pictures."""
    net = nn.Sequential(nn.Dropout(0.5), Line())
    wanted = mean_loss(Line(), POINTS, line_loss)
    assert mean_loss(net, POINTS, line_loss) == mean_loss(net, POINTS, line_loss) == wanted
    assert net.training and not net.eval().training and mean_loss(net, POINTS, line_loss) and not net[0].training


def test_mean_loss_is_the_mean_over_all_with_the_same_noise():
    net, seen = Line(), []

    def loss(net, x, generator):
        seen.append((x, torch.rand(1, generator=generator).item()))
        return net(x).mean()

    value = mean_loss(net, POINTS, loss, batch=64)
    assert value == pytest.approx(net(POINTS).mean().item(), rel=1e-5)
    assert torch.equal(torch.cat([x for x, _ in seen]), POINTS) and len({chance for _, chance in seen}) == 4
    assert mean_loss(net, POINTS, line_loss) == mean_loss(net, POINTS, line_loss)


def test_generators_follow_from_their_numbers():
    draws = [torch.rand(4, generator=generator_for(*numbers)) for numbers in ((0, 1), (0, 1), (1, 0), (0, 1, 0), (0,))]
    assert torch.equal(draws[0], draws[1])
    assert len({tuple(draw.tolist()) for draw in draws}) == 4


def test_a_folder_that_cannot_be_is_found_out_before_the_first_step(tmp_path):
    def never(*given):
        raise AssertionError("a step was taken")

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        run(tmp_path / "file" / "run", loss=never)


# --- digits ------------------------------------------------------------------------------------
def test_digits():
    pictures, which = digits(60)
    assert pictures.shape == (60, 1, 32, 32) and which.tolist() == [i % 10 for i in range(60)]
    assert pictures.min() == -1 and 0.5 < pictures.amax((1, 2, 3)).min()
    assert torch.equal(pictures[:20], digits(60)[0][:20]) and not torch.equal(pictures, digits(60, seed=1)[0])
    border = torch.cat([pictures[..., :2, :], pictures[..., -2:, :]], -2).amax()
    assert border < 0, "a digit is cut off"
    assert digits(3, size=8)[0].shape == (3, 1, 8, 8)


def test_every_font_draws_ten_different_digits():
    import matplotlib
    from PIL import ImageFont

    for name in DIGIT_FONTS:
        font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", 40)
        assert len({bytes(font.getmask(digit)) for digit in "0123456789"}) == 10, name


@pytest.mark.parametrize("options", [{"count": 0}, {"size": 0}])
def test_digits_refuse(options):
    with pytest.raises(ValueError, match="at least 1"):
        digits(**options)


# --- recipes -----------------------------------------------------------------------------------
RECIPE = """
[data]
name = "digits"
count = 40
size = 8
classes = ["digit"]
[network]
channels = [8, 8]
attention = ["", "self"]
heads = [1, 1]
layers_per_block = 1
in_channels = 1
out_channels = 1
groups = 4
sample_size = 8
context_width = 0
[schedule]
name = "cosine"
steps = 100
[loss]
prediction = "v"
drop = 0.1
[train]
steps = 4
lr = 1e-3
batch = 8
every = 2
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_trains_saves_and_loads(recipe, tmp_path):
    denoise = run_recipe(recipe, folder=tmp_path / "run", progress=False)
    assert [row["step"] for row in log(tmp_path / "run")] == [2, 4]
    assert all(0.3 < row["validation"] < 3 for row in log(tmp_path / "run"))
    again, classes = load_denoiser(tmp_path / "run")
    assert load_denoiser(tmp_path / "run", dtype=torch.bfloat16)[0].network.dtype == torch.bfloat16
    assert classes == list("0123456789") and again.prediction == "v" and again.schedule.steps == 100
    assert same(again.network.state_dict(), denoise.network.state_dict())
    average = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["average"]
    assert all(torch.equal(average[name], p) for name, p in again.network.named_parameters())
    x = torch.randn(2, 1, 8, 8, generator=generator_for(0))
    told = [again.network(x, torch.tensor([50, 50]), embedding=torch.tensor([k, k])) for k in (0, 3)]
    assert torch.isfinite(told[0]).all() and not torch.equal(*told)


@pytest.mark.parametrize("old, new, table", [
    ('prediction = "v"', 'prediction = "epsilon"', "loss"), ('"cosine"', '"linear"', "schedule"),
    ("groups = 4", "groups = 2", "network"),
])
def test_a_folder_belongs_to_its_recipe(recipe, tmp_path, old, new, table):
    """Else a network would be saved under another recipe's prediction and schedule."""
    run_recipe(recipe, folder=tmp_path / "run", steps=2, progress=False)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    recipe.write_text(RECIPE.replace(old, new))
    with pytest.raises(ValueError, match=rf"another table \[{table}\]; choose another folder"):
        run_recipe(recipe, folder=tmp_path / "run", progress=False)
    assert all(path.read_bytes() == content for path, content in before.items())
    recipe.write_text(RECIPE.replace("lr = 1e-3", "lr = 1e-4"))
    run_recipe(recipe, folder=tmp_path / "run", progress=False)  # how to train may change
    assert [row["step"] for row in log(tmp_path / "run")] == [2, 4]


def test_a_recipe_without_classes(recipe, tmp_path):
    recipe.write_text(RECIPE.replace('classes = ["digit"]\n', ""))
    denoise = run_recipe(recipe, folder=tmp_path / "run", steps=1, progress=False)
    assert denoise.network.config.classes is None and load_denoiser(tmp_path / "run")[1] == []


def test_a_recipe_names_the_weight_of_its_loss(recipe, tmp_path):
    plain, weighed = tmp_path / "plain", tmp_path / "weighed"
    run_recipe(recipe, folder=plain, steps=1, progress=False)
    recipe.write_text(RECIPE.replace("drop = 0.1", 'drop = 0.1\nweight = "min_snr"'))
    run_recipe(recipe, folder=weighed, steps=1, progress=False)
    assert log(weighed)[0]["loss"] < 0.9 * log(plain)[0]["loss"], "min-SNR weighs no time more than the plain loss"


@pytest.mark.parametrize("old, new, words", [
    ("[loss]", "[lost]", "must have the tables data, loss"),
    ("[loss]", "[loss", "not valid TOML"),
    ('"digits"', '"cats"', r"\[data\]: no data named 'cats'; choose one of emoji, digits"),
    ('"cosine"', '"cosin"', r"\[schedule\]: no schedule named 'cosin'"),
    ("steps = 100", "stops = 100", r"\[schedule\]: .*stops"),
    ("groups = 4", "troops = 4", r"\[network\]: .*troops"),
    ("context_width = 0", "context_width = 8", r"\[network\]: this network reads words, which recipes don't have"),
    ("lr = 1e-3", "rate = 1e-3", r"\[train\]: .*rate"),
    ('prediction = "v"', 'predict = "v"', r"\[loss\]: .*predict"),
    ("drop = 0.1", 'weight = "snr"', r"\[loss\]: no weight named 'snr'; choose one of min_snr, p2, edm"),
])
def test_recipes_that_are_wrong(recipe, tmp_path, old, new, words):
    recipe.write_text(RECIPE.replace(old, new))
    with pytest.raises(ValueError, match=words):
        run_recipe(recipe, folder=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recipe at nowhere.toml"):
        read_recipe("nowhere.toml")
    (tmp_path / "recipe.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="recipe.toml is not valid TOML"):
        read_recipe(tmp_path / "recipe.toml")


def test_guidance_is_not_saved(tmp_path):
    denoise = Denoiser(UNet(UNetConfig(**TINY)), NoiseSchedule.linear(), "epsilon")
    with pytest.raises(ValueError, match="save the Denoiser inside"):
        save_denoiser(tmp_path / "x", Wrapped(denoise, denoise))
    assert not (tmp_path / "x").exists()


def test_what_is_saved_can_be_read_again(tmp_path):
    for prediction, schedule in (("epsilon", NoiseSchedule.linear(500)), ("flow", NoiseSchedule.flow(50, shift=2.0))):
        folder = tmp_path / prediction
        save_denoiser(folder, Denoiser(UNet(UNetConfig(**TINY)), schedule, prediction))
        again, classes = load_denoiser(folder)
        assert again.prediction == prediction and torch.equal(again.schedule.betas, schedule.betas) and classes == []
    config = folder / "scheduler" / "scheduler_config.json"
    assert "FlowMatchEulerDiscreteScheduler" in config.read_text(), "DDPM's would read a flow as linear betas"
    config.write_text(config.read_text().replace("flow_prediction", "guess"))
    with pytest.raises(ValueError, match="prediction_type='guess' in flow/scheduler; expected one of"):
        load_denoiser(folder)


def test_a_recipe_checks_its_first_loss(recipe, tmp_path, monkeypatch):
    """A network that predicts noise and doesn't start at 0 is not what the recipe says it is."""
    from diffusionbook import training

    text = recipe.read_text()
    assert 'prediction = "v"' in text
    recipe.write_text(text.replace('prediction = "v"', 'prediction = "epsilon"'))
    build = training._unet

    def biased(**options):
        net = build(**options)
        torch.nn.init.constant_(net.conv_out.bias, 2.0)
        return net

    monkeypatch.setattr(training, "_unet", biased)
    with pytest.raises(ValueError, match="the first loss is .* where 1 was expected"):
        run_recipe(recipe, folder=tmp_path / "run", steps=1, progress=False)


def test_the_recipes_of_the_book_can_be_built(root):
    """Each names a preset and options that exist; nothing is trained."""
    from diffusionbook.training import _schedule, _unet

    paths = sorted((root / "recipes").glob("*.toml"))
    recipes = {path.name: read_recipe(path) for path in paths if path.name != "budget.toml"}
    assert {"digits.toml", "emoji_pixels.toml"} <= recipes.keys()
    for name, recipe in recipes.items():
        loss = DenoisingLoss(_schedule(**recipe["schedule"]), **recipe["loss"])
        with torch.device("meta"):
            net = _unet(**recipe["network"], classes=5)
            side, channels = recipe["data"]["size"], 1 if recipe["data"]["name"] == "digits" else 3
            assert net.config.sample_size == side, name
            x0 = torch.zeros(2, channels, side, side)
            wanted = net(x0, torch.zeros(2), embedding=torch.zeros(2, dtype=torch.long))
        assert wanted.shape == x0.shape and loss.prediction in ("epsilon", "v", "flow")


def test_stacked_data_can_be_batches():
    data = StackDataset(x0=torch.zeros(6, 2), embedding=torch.arange(6))
    seen = []

    def loss(net, batch, generator):
        seen.append(batch["embedding"])
        return net(batch["x0"]).square().mean()

    train(Line(), data, loss, steps=1, lr=0.1, batch=4, progress=False)
    assert seen[0].shape == (4,)


TWO = """
import sys, torch
from accelerate import PartialState
from diffusionbook.__main__ import main
from diffusionbook.training import add_gradients
sys.path.insert(0, sys.argv[3])
from test_training import POINTS, Line, line_loss

state = PartialState(cpu=True)
assert state.num_processes == 2 and state.backend == "gloo"
net = Line()
value, _ = add_gradients(net, POINTS, line_loss, seed=0, step=3, batch=8)
torch.save([value, *(p.grad for p in net.parameters())], f"{sys.argv[2]}/gradients{state.process_index}.pt")
torch.manual_seed(state.process_index)  # the second process starts from other weights, and must not keep them
sys.exit(main(["train", sys.argv[1], "--folder", f"{sys.argv[2]}/two", "--device", "cpu"]))
"""


def test_two_processes_do_together_what_one_does_alone(recipe, tmp_path, root):
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [tmp_path / "two.py", recipe, tmp_path, root / "tests" / "unit"]
    done = subprocess.run([*command, *script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1:] == [f"{tmp_path / 'two'}"], "only the first process speaks"

    net = Line()
    value, _ = add_gradients(net, POINTS, line_loss, seed=0, step=3, batch=8, accumulate=2)
    for rank in (0, 1):
        theirs = torch.load(tmp_path / f"gradients{rank}.pt", weights_only=True)
        for ours, other in zip([value, *(p.grad for p in net.parameters())], theirs, strict=True):
            assert torch.allclose(ours, other, rtol=1e-6, atol=1e-7)

    recipe.write_text(RECIPE + "accumulate = 2")
    denoise = run_recipe(recipe, folder=tmp_path / "one", progress=False)
    assert log(tmp_path / "two") == log(tmp_path / "one")
    together, _ = load_denoiser(tmp_path / "two")
    for name, p in denoise.network.state_dict().items():
        assert torch.allclose(together.network.state_dict()[name], p, rtol=1e-5, atol=1e-6), name


@pytest.mark.gpu
def test_a_gpu_draws_the_same_and_learns_the_same():
    nets = {device: Line().to(device) for device in ("cpu", "cuda")}
    for net in nets.values():
        train(net, POINTS, lambda net, x, generator: (net(x) - x[:, :1]).square().mean(), steps=20, lr=0.05,
              batch=8, warmup=5, progress=False)
    assert torch.allclose(nets["cpu"].layer.weight, nets["cuda"].layer.weight.cpu(), rtol=1e-4)


@pytest.mark.parametrize("schedule", [NoiseSchedule.flow(), NoiseSchedule.linear().zero_terminal_snr()])
def test_noise_can_t_be_the_target_where_no_signal_is_left(schedule):
    with pytest.raises(ValueError, match='ends without signal.*prediction="v"'):
        DenoisingLoss(schedule)
    DenoisingLoss(schedule, "v")


def test_who_is_told_nothing_hears_nothing():
    loss = DenoisingLoss(NoiseSchedule.linear(), drop=0.1, empty={"context": torch.zeros(3, 2)})
    batch = {"x0": torch.zeros(2, 2), "context": torch.ones(2, 3, 2), "embedding": torch.ones(2)}
    with pytest.raises(ValueError, match="empty says nothing about embedding"):
        loss(nn.Identity(), batch, generator_for(0))


# What the log says, and what a folder belongs to


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_losss_own_numbers_are_means_like_the_loss(tmp_path, accumulate):
    def loss(net, x, generator):
        value = (net(x) - 1).square().mean()
        return value, {"same": value.item()}

    train(Line(), POINTS, loss, steps=6, lr=1e-2, batch=8, accumulate=accumulate, every=3, folder=tmp_path,
          progress=False)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["same"] == pytest.approx(row["loss"], rel=1e-4) for row in rows)


def test_a_finished_folder_is_not_mistaken_for_another_training(tmp_path):
    first, _ = run(tmp_path, steps=4)
    again, _ = run(tmp_path, steps=4)
    assert torch.equal(first.layer.weight, again.layer.weight)
    for change in ({"weight_decay": 0.5}, {"seed": 5}, {"steps": 2}):
        with pytest.raises(ValueError, match=f"was trained with another {next(iter(change))}: .* choose another"):
            run(tmp_path, **{"steps": 4} | change)


def test_a_folder_goes_on_towards_its_own_goal_only(tmp_path):
    torch.manual_seed(0)
    net, pictures = UNet(UNetConfig(**TINY)), torch.zeros(8, 1, 8, 8)
    go = lambda loss, **options: train(net, options.pop("x", pictures), loss, lr=1e-3, batch=2,  # noqa: E731
                                       folder=tmp_path, progress=False, **options)
    go(NoiseSchedule.linear(), steps=2)
    before = {name: p.clone() for name, p in net.named_parameters()}
    for loss, options, other in [(DenoisingLoss(NoiseSchedule.linear(), "v"), {}, "prediction"),
                                 (DenoisingLoss(NoiseSchedule.cosine()), {}, "schedule"),
                                 (NoiseSchedule.linear(), {"x": pictures[:4]}, "number of pictures")]:
        with pytest.raises(ValueError, match=f"was trained with another {other}"):
            go(loss, steps=4, **options)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    go(NoiseSchedule.linear(), steps=4)


def test_data_that_carry_gradients_are_data():
    x = (POINTS * torch.ones(2, requires_grad=True))
    train(Line(), x, lambda net, x, generator: net(x).square().mean(), steps=3, lr=1e-2, batch=8, progress=False)


def test_a_recipe_leaves_folder_and_progress_to_its_caller(recipe, tmp_path):
    recipe.write_text(RECIPE.replace("[train]", '[train]\nfolder = "elsewhere"'))
    with pytest.raises(ValueError, match=r"table \[train\].*folder"):
        run_recipe(recipe, folder=tmp_path / "run", steps=2, progress=False)


def test_a_recipe_leaves_the_global_generator_alone(recipe, tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run_recipe(recipe, folder=tmp_path / "run", steps=2, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_mean_loss_does_not_depend_on_the_default_dtype():
    torch.manual_seed(0)
    net, pictures = UNet(UNetConfig(**TINY)), torch.zeros(8, 1, 8, 8)
    usual = mean_loss(net, pictures, DenoisingLoss(NoiseSchedule.linear()))
    torch.set_default_dtype(torch.float64)
    try:
        assert mean_loss(net, pictures, DenoisingLoss(NoiseSchedule.linear())) == pytest.approx(usual, rel=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)
