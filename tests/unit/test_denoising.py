"""Chapter 05: the three targets say the same thing, and guidance is plain arithmetic."""

import pytest
import torch
from torch import nn

from diffusionbook.denoising import (
    Condition,
    Denoiser,
    Prediction,
    Wrapped,
    classifier_free,
    diffusion_loss,
    target,
    to_prediction,
)
from diffusionbook.schedules import NoiseSchedule

SCHEDULE = NoiseSchedule.cosine(100)
TARGETS = ("epsilon", "x0", "v")


class Recorder:
    """A network that keeps what it was given and answers with its context's first number."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, **condition):
        self.calls.append((x, t, condition))
        context = condition.get("context")
        level = torch.zeros(len(x)) if context is None else context[:, 0, 0]
        return level.view(-1, 1, 1, 1) * torch.ones_like(x[:, :2])


def batch(count=3, *, dtype=torch.float64, channels=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, count, channels, 4, 4, generator=generator, dtype=dtype)


def words(*levels):
    return Condition(context=torch.tensor(levels).view(-1, 1, 1).expand(-1, 2, 5))


@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize("schedule", [SCHEDULE, NoiseSchedule.linear(), NoiseSchedule.scaled_linear()])
def test_the_right_answer_gives_back_picture_and_noise(prediction, schedule):
    x0, noise = batch()
    t = torch.tensor([0.0, schedule.steps // 2 + 0.5, 0.7 * schedule.steps], dtype=torch.float64)
    output = target(x0, noise, t, schedule=schedule, prediction=prediction)
    answer = to_prediction(output, schedule.add_noise(x0, noise, t), t, schedule=schedule, prediction=prediction)
    assert torch.allclose(answer.x0, x0, rtol=0, atol=1e-11) and torch.allclose(answer.eps, noise, rtol=0, atol=1e-11)
    assert answer.log_variance is None


@pytest.mark.parametrize("prediction", TARGETS)
def test_whole_timesteps_are_as_exact_as_fractional_ones(prediction):
    x0, noise = batch()
    t = torch.tensor([3, 50, 90])
    output = target(x0, noise, t, schedule=SCHEDULE, prediction=prediction)
    answer = to_prediction(output, SCHEDULE.add_noise(x0, noise, t), t, schedule=SCHEDULE, prediction=prediction)
    assert torch.allclose(answer.x0, x0, rtol=0, atol=1e-5) and torch.allclose(answer.eps, noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", TARGETS)
def test_any_answer_explains_the_noisy_picture(prediction):
    """Whatever the network says, alpha x0 + sigma eps is the x that it was asked about."""
    output, x = batch()
    t = torch.tensor([1.0, 40.0, 80.0], dtype=torch.float64)
    answer = to_prediction(output, x, t, schedule=SCHEDULE, prediction=prediction)
    alpha, sigma = (level.view(-1, 1, 1, 1) for level in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    assert torch.allclose(alpha * answer.x0 + sigma * answer.eps, x, rtol=0, atol=1e-10)


def test_v_without_signal_is_minus_the_picture():
    schedule = SCHEDULE.zero_terminal_snr()
    v, x = batch()
    answer = to_prediction(v, x, 99, schedule=schedule, prediction="v")
    assert torch.allclose(answer.x0, -v) and torch.allclose(answer.eps, x)


def test_targets_are_what_their_names_say():
    x0, noise = batch()
    t = torch.tensor([7.0, 50.0, 99.0], dtype=torch.float64)
    alpha, sigma = (level.view(-1, 1, 1, 1) for level in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    assert target(x0, noise, t, schedule=SCHEDULE, prediction="epsilon") is noise
    assert target(x0, noise, t, schedule=SCHEDULE, prediction="x0") is x0
    v = target(x0, noise, t, schedule=SCHEDULE, prediction="v")
    assert torch.allclose(v, alpha * noise - sigma * x0)


def test_unknown_targets_are_refused():
    x0, noise = batch()
    for function in (target, to_prediction):
        with pytest.raises(ValueError, match='"epsilon", "x0" or "v", got \'eps\''):
            function(x0, noise, 3, schedule=SCHEDULE, prediction="eps")


# The denoiser


@pytest.mark.parametrize("t", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7, 7])])
def test_the_network_sees_one_timestep_per_picture(t):
    network, (x, _) = Recorder(), batch()
    Denoiser(network, SCHEDULE)(x, t)
    seen, seen_t, condition = network.calls[0]
    assert seen is x and seen_t.shape == (3,) and (seen_t == 7).all() and condition == {}


def test_pictures_may_have_timesteps_of_their_own():
    x, _ = batch()
    t = torch.tensor([5, 50, 95])
    together = Denoiser(lambda x, t: x.tanh(), SCHEDULE)(x, t)
    for i in range(3):
        alone = Denoiser(lambda x, t: x.tanh(), SCHEDULE)(x[i:i + 1], int(t[i]))
        assert torch.allclose(alone.x0[0], together.x0[i])


def test_every_part_of_the_condition_reaches_the_network():
    network, (x, extra) = Recorder(), batch()
    condition = Condition(context=torch.ones(3, 2, 5), embedding=torch.ones(3, 8), concat=extra)
    answer = Denoiser(network, SCHEDULE, "x0", condition)(x, 3)
    seen, _, parts = network.calls[0]
    assert torch.equal(seen, torch.cat([x, extra], dim=1)) and parts.keys() == {"context", "embedding"}
    assert answer.x0.shape == x.shape and torch.equal(answer.eps, (x - SCHEDULE.alpha(torch.tensor(3)) * answer.x0)
                                                      / SCHEDULE.sigma(torch.tensor(3)))


def test_gradients_only_when_asked():
    network, x = nn.Conv2d(2, 2, 1).double(), batch()[0].requires_grad_()
    call = lambda x, t: network(x)  # noqa: E731
    assert not Denoiser(call, SCHEDULE)(x.detach(), 3).eps.requires_grad
    Denoiser(call, SCHEDULE)(x, 3).x0.sum().backward()  # x itself is in the formula, the network is not
    assert network.weight.grad is None
    Denoiser(call, SCHEDULE, grad=True)(x, 3).x0.sum().backward()
    assert network.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert not Denoiser(call, SCHEDULE, grad=True)(x, 3).eps.requires_grad


def test_no_answer_is_an_inference_tensor():
    assert not Denoiser(Recorder(), SCHEDULE)(batch()[0], 3).eps.is_inference()


def test_wrapping_changes_the_answer_and_keeps_the_schedule():
    inner = Denoiser(Recorder(), SCHEDULE)
    outer = Wrapped(Wrapped(inner, inner), lambda x, t: Prediction(x * 0, x))
    x, _ = batch()
    assert outer.schedule is SCHEDULE and outer(x, 3).eps is x


# Guidance


def test_classifier_free_arithmetic():
    network, (x, _) = Recorder(), batch(2, dtype=torch.float32)
    denoise = Denoiser(network, SCHEDULE, "epsilon", words(2.0, 5.0))
    guided = classifier_free(denoise, words(1.0, -1.0), scale=3.0)
    answer = guided(x, 30)
    assert torch.allclose(answer.eps[:, 0, 0, 0], torch.tensor([1 + 3 * (2.0 - 1), -1 + 3 * (5.0 + 1)]))
    alpha, sigma = SCHEDULE.alpha(30).float(), SCHEDULE.sigma(30).float()
    assert torch.allclose(answer.x0, (x - sigma * answer.eps) / alpha, atol=1e-4)
    assert guided.schedule is SCHEDULE


@pytest.mark.parametrize("prediction", TARGETS)
def test_guiding_before_or_after_the_conversion_is_the_same(prediction):
    x, _ = batch(2)
    levels = [torch.tensor(pair, dtype=torch.float64).view(2, 1, 1) for pair in ((2.0, 5.0), (1.0, -1.0))]
    denoise = Denoiser(Recorder(), SCHEDULE, prediction, Condition(context=levels[0]))
    answer = classifier_free(denoise, Condition(context=levels[1]), scale=2.5)(x, 30)
    output = (levels[1] + 2.5 * (levels[0] - levels[1])).view(2, 1, 1, 1) * torch.ones_like(x)
    expected = to_prediction(output, x, 30, schedule=SCHEDULE, prediction=prediction)
    assert torch.allclose(answer.x0, expected.x0) and torch.allclose(answer.eps, expected.eps)


def test_both_questions_go_through_in_one_batch():
    network, (x, extra) = Recorder(), batch(2, dtype=torch.float32)
    condition = Condition(context=words(2.0, 5.0).context, concat=extra)
    classifier_free(Denoiser(network, SCHEDULE, condition=condition), condition, scale=3.0)(x, torch.tensor([4, 9]))
    (seen, t, parts), = network.calls
    assert torch.equal(seen, torch.cat([x, extra], 1).repeat(2, 1, 1, 1)) and t.tolist() == [4, 9, 4, 9]
    assert parts["context"].shape == (4, 2, 5)


def test_scale_one_asks_only_once_and_scale_zero_forgets_the_words():
    network, (x, _) = Recorder(), batch(2, dtype=torch.float32)
    denoise = Denoiser(network, SCHEDULE, "epsilon", words(2.0, 5.0))
    unguided = classifier_free(denoise, words(1.0, 1.0), scale=1)
    assert unguided is denoise
    unguided(x, 30)
    assert len(network.calls) == 1 and len(network.calls[0][0]) == 2
    assert classifier_free(denoise, words(1.0, -1.0), scale=0)(x, 30).eps[:, 0, 0, 0].tolist() == [1.0, -1.0]


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
def test_scales_must_be_finite(scale):
    with pytest.raises(ValueError, match="finite"):
        classifier_free(Denoiser(Recorder(), SCHEDULE, condition=words(1.0)), words(0.0), scale=scale)


def test_conditions_with_other_parts_do_not_stack():
    stacked = words(1.0).stack(words(2.0))
    assert stacked.context[:, 0, 0].tolist() == [1.0, 2.0] and stacked.concat is None and stacked.embedding is None
    with pytest.raises(ValueError, match=r"\['context'\] and \['embedding'\]"):
        words(1.0).stack(Condition(embedding=torch.ones(1, 5)))


# The loss


@pytest.mark.parametrize("prediction", TARGETS)
def test_the_loss_of_a_known_mistake(prediction):
    """A network that is off by 0.5 everywhere loses 0.25, one that is right loses nothing."""
    x0, noise = batch(dtype=torch.float32)
    t = torch.tensor([1, 50, 90])
    right = target(x0, noise, t, schedule=SCHEDULE, prediction=prediction)
    off = torch.tensor([0.0, 0.5, -1.0]).view(3, 1, 1, 1)
    seen = []
    network = lambda x, t: seen.append((x, t)) or right + off  # noqa: E731
    loss = diffusion_loss(network, x0, noise, t, schedule=SCHEDULE, prediction=prediction)
    assert torch.allclose(loss, torch.tensor([0.0, 0.25, 1.0]), atol=1e-6)
    assert torch.equal(seen[0][0], SCHEDULE.add_noise(x0, noise, t)) and seen[0][1] is t


def test_the_loss_of_saying_nothing_is_the_mean_square_of_the_noise():
    x0, noise = batch(dtype=torch.float32)
    loss = diffusion_loss(lambda x, t: 0 * x, x0, noise, torch.tensor([1, 5, 9]), schedule=SCHEDULE)
    assert torch.allclose(loss, noise.square().mean((1, 2, 3)))


def test_the_loss_passes_the_condition_on_and_reaches_the_network():
    x0, noise = batch(dtype=torch.float32)
    network, seen = nn.Conv2d(2, 2, 1), {}

    def call(x, t, **condition):
        seen.update(condition)
        return network(x)

    context = torch.ones(3, 2, 5)
    diffusion_loss(call, x0, noise, torch.tensor([1, 5, 9]), schedule=SCHEDULE, context=context).mean().backward()
    assert seen["context"] is context and network.weight.grad.abs().sum() > 0
