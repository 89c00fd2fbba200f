"""Chapter 05: the three targets say the same thing, and guidance is plain arithmetic."""

from functools import partial

import pytest
import torch
from torch import nn

from diffusionbook.denoising import (
    TARGETS,
    Condition,
    Denoiser,
    Prediction,
    Wrapped,
    classifier_free,
    diffusion_loss,
    edm,
    exact_denoiser,
    learned_log_variance,
    min_snr,
    p2,
    target,
    target_weight,
    to_prediction,
    variational_bound,
)
from diffusionbook.samplers import rescaled_guidance
from diffusionbook.schedules import NoiseSchedule

SCHEDULE = NoiseSchedule.cosine(100)
FLOW = NoiseSchedule.flow(100, shift=2)


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
@pytest.mark.parametrize("schedule", [SCHEDULE, NoiseSchedule.linear(), NoiseSchedule.scaled_linear(), FLOW], ids=repr)
def test_the_right_answer_gives_back_picture_and_noise(prediction, schedule):
    x0, noise = batch()
    t = torch.tensor([0.0, schedule.steps // 2 + 0.5, 0.7 * schedule.steps], dtype=torch.float64)
    output = target(x0, noise, t, schedule=schedule, prediction=prediction)
    answer = to_prediction(output, schedule.add_noise(x0, noise, t), t, schedule=schedule, prediction=prediction)
    assert torch.allclose(answer.x0, x0, rtol=0, atol=1e-11) and torch.allclose(answer.eps, noise, rtol=0, atol=1e-11)
    assert answer.variance_mix is None


@pytest.mark.parametrize("prediction", TARGETS)
def test_whole_timesteps_are_as_exact_as_fractional_ones(prediction):
    x0, noise = batch()
    t = torch.tensor([3, 50, 90])
    output = target(x0, noise, t, schedule=SCHEDULE, prediction=prediction)
    answer = to_prediction(output, SCHEDULE.add_noise(x0, noise, t), t, schedule=SCHEDULE, prediction=prediction)
    assert torch.allclose(answer.x0, x0, rtol=0, atol=1e-5) and torch.allclose(answer.eps, noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", [SCHEDULE, FLOW], ids=repr)
@pytest.mark.parametrize("prediction", TARGETS)
def test_any_answer_explains_the_noisy_picture(prediction, schedule):
    """Whatever the network says, alpha x0 + sigma eps is the x that it was asked about."""
    output, x = batch()
    t = torch.tensor([1.0, 40.0, 80.0], dtype=torch.float64)
    answer = to_prediction(output, x, t, schedule=schedule, prediction=prediction)
    alpha, sigma = (level.view(-1, 1, 1, 1) for level in (schedule.alpha(t), schedule.sigma(t)))
    assert torch.allclose(alpha * answer.x0 + sigma * answer.eps, x, rtol=0, atol=1e-10)


def test_v_without_signal_is_minus_the_picture():
    schedule = SCHEDULE.zero_terminal_snr()
    v, x = batch()
    answer = to_prediction(v, x, 99, schedule=schedule, prediction="v")
    assert torch.allclose(answer.x0, -v) and torch.allclose(answer.eps, x)


@pytest.mark.parametrize("schedule", [SCHEDULE.zero_terminal_snr(), FLOW], ids=repr)
@pytest.mark.parametrize("prediction", TARGETS)
def test_without_signal_only_noise_prediction_is_refused(prediction, schedule):
    output, x = batch()
    ask = lambda t: to_prediction(output, x, t, schedule=schedule, prediction=prediction)  # noqa: E731
    if prediction == "epsilon":
        with pytest.raises(ValueError, match='can\'t start where no signal is left; train it to predict "v" or "flow"'):
            ask(torch.tensor([3, 50, 99]))
        return
    answer = ask(99)
    assert torch.allclose(answer.eps, x) and torch.isfinite(answer.x0).all()
    if prediction == "flow":
        assert torch.allclose(answer.x0, x - output)


@pytest.mark.parametrize("prediction", TARGETS)
def test_half_precision_rounds_only_the_result(prediction):
    """At t = 90 of the cosine schedule alpha is 0.15: bfloat16 arithmetic would lose a digit."""
    output, x = batch()
    output, x = output.bfloat16(), x.bfloat16()
    answer = to_prediction(output, x, 90, schedule=SCHEDULE, prediction=prediction)
    exact = to_prediction(output.double(), x.double(), 90, schedule=SCHEDULE, prediction=prediction)
    for ours, right in zip(answer[:2], exact[:2], strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, right.bfloat16(), rtol=2**-7, atol=1e-5)


def test_points_of_any_shape_are_pictures_too():
    x0, noise = torch.randn(2, 6, 2, dtype=torch.float64)
    t = torch.arange(6) * 10
    for prediction in TARGETS:
        output = target(x0, noise, t, schedule=FLOW, prediction=prediction)
        answer = to_prediction(output, FLOW.add_noise(x0, noise, t), t, schedule=FLOW, prediction=prediction)
        assert torch.allclose(answer.x0, x0, atol=1e-5)


def test_targets_are_what_their_names_say():
    x0, noise = batch()
    t = torch.tensor([7.0, 50.0, 99.0], dtype=torch.float64)
    alpha, sigma = (level.view(-1, 1, 1, 1) for level in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    assert target(x0, noise, t, schedule=SCHEDULE, prediction="epsilon") is noise
    assert target(x0, noise, t, schedule=SCHEDULE, prediction="x0") is x0
    v = target(x0, noise, t, schedule=SCHEDULE, prediction="v")
    assert torch.allclose(v, alpha * noise - sigma * x0)
    flow = target(x0, noise, t, schedule=FLOW, prediction="flow")
    assert torch.equal(flow, noise - x0)
    slope = (FLOW.add_noise(x0, noise, 60) - FLOW.add_noise(x0, noise, 20)) / (FLOW.sigma(60) - FLOW.sigma(20))
    assert torch.allclose(slope, flow)  # the velocity along the straight line


def test_unknown_targets_are_refused():
    x0, noise = batch()
    for function in (target, to_prediction):
        with pytest.raises(ValueError, match='"epsilon", "x0", "v", "flow", got \'eps\''):
            function(x0, noise, 3, schedule=SCHEDULE, prediction="eps")
    with pytest.raises(ValueError, match="got 'eps'"):
        Denoiser(lambda x, t: x, SCHEDULE, "eps")  # before anybody waits for the network


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
    assert answer.x0.shape == x.shape
    assert torch.allclose(answer.eps, (x - SCHEDULE.alpha(3) * answer.x0) / SCHEDULE.sigma(3), rtol=1e-12)


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


def test_a_mask_goes_to_the_network_and_is_stacked():
    told = Condition(context=torch.ones(1, 2, 5), mask=torch.tensor([[True, False]]))
    empty = Condition(context=torch.zeros(1, 2, 5), mask=torch.tensor([[True, True]]))
    calls = []
    network = lambda x, t, context, mask: calls.append(mask) or torch.zeros_like(x)  # noqa: E731
    classifier_free(Denoiser(network, NoiseSchedule.cosine(), condition=told), empty, scale=2)(torch.randn(1, 7), 3)
    assert calls[0].tolist() == [[True, False], [True, True]] and calls[0].dtype == torch.bool


def test_guidance_keeps_the_variance_of_the_conditional_answer():
    network = lambda x, t, context: torch.cat([x * context, context * torch.ones_like(x)], dim=1)  # noqa: E731
    x, _ = batch(2)
    yes, no = (Condition(context=torch.full((2, 1, 1, 1), level).double()) for level in (0.5, -0.5))
    answer = classifier_free(Denoiser(network, SCHEDULE, condition=yes), no, scale=3.0)(x, 30)
    assert torch.allclose(answer.variance_mix, torch.full_like(x, 0.75))
    assert torch.allclose(answer.eps, -0.5 * x + 3 * x)


# The perfect denoiser


@pytest.mark.parametrize("schedule", [SCHEDULE, FLOW], ids=repr)
def test_the_exact_denoiser_is_bayes_rule(schedule):
    data = torch.randn(7, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    denoise, t = exact_denoiser(data, schedule), torch.tensor([2.0, 40.0, 98.0], dtype=torch.float64)
    x = schedule.add_noise(data[:3], torch.randn(3, 3, 2, 2, dtype=torch.float64), t)
    answer = denoise(x, t)
    for i in range(3):
        gap = x[i] - schedule.alpha(t[i]) * data
        chance = torch.exp(-gap.square().sum((1, 2, 3)) / (2 * schedule.sigma(t[i]) ** 2))
        expected = (chance.view(-1, 1, 1, 1) * data).sum(0) / chance.sum()
        torch.testing.assert_close(answer.x0[i], expected, rtol=1e-8, atol=1e-10)


def test_the_exact_denoiser_knows_nothing_without_signal_and_all_with_little_noise():
    data = torch.randn(5, 2, dtype=torch.float64)
    x = torch.randn(4, 2)
    answer = exact_denoiser(data, FLOW)(x, 99)
    assert answer.x0.dtype == torch.float32
    torch.testing.assert_close(answer.x0, data.mean(0).float().expand(4, 2), rtol=1e-5, atol=1e-6)
    fine = NoiseSchedule.linear()
    near = exact_denoiser(data, fine)(fine.add_noise(data, torch.zeros(5, 2).double(), 0), 0)
    torch.testing.assert_close(near.x0, data)


def test_the_exact_denoiser_takes_half_precision_and_no_bytes():
    data = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).half()
    answer, exact = exact_denoiser(data, SCHEDULE)(data, 50), exact_denoiser(data.double(), SCHEDULE)(data.double(), 50)
    assert answer.x0.dtype == torch.float16
    torch.testing.assert_close(answer.x0.double(), exact.x0, rtol=1e-3, atol=1e-3)
    for bad in (torch.zeros(0, 2), torch.zeros(3, 2, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="floating-point tensor .* of at least one picture"):
            exact_denoiser(bad, SCHEDULE)


def test_no_answer_has_less_error_than_the_exact_one():
    data, generator = torch.tensor([[-1.0], [0.2], [1.5]], dtype=torch.float64), torch.Generator().manual_seed(2)
    x0 = data[torch.randint(3, (20_000,), generator=generator)]
    x = SCHEDULE.add_noise(x0, torch.randn(x0.shape, dtype=torch.float64, generator=generator), 40)
    best = exact_denoiser(data, SCHEDULE)(x, 40).x0
    error = (best - x0).square().mean()
    for other in (x, x / SCHEDULE.alpha(40), best + 0.05, 0.95 * best, data.mean().expand_as(x0)):
        assert (other - x0).square().mean() > error


# Learned variance


@pytest.mark.parametrize("schedule", [SCHEDULE, FLOW, SCHEDULE.zero_terminal_snr()], ids=repr)
@pytest.mark.parametrize("pair", [(60, 59), (99, 40), (30.5, 2)])
def test_the_learned_variance_lies_between_the_two_fixed_ones(schedule, pair):
    mix = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64).view(1, 3, 1, 1)
    low, between, high = learned_log_variance(mix, *pair, schedule=schedule).flatten()
    assert low.exp().item() == pytest.approx(schedule.posterior_variance(*pair).item())
    assert high.exp().item() == pytest.approx(schedule.step_variance(*pair).item())
    assert between.item() == pytest.approx(0.75 * low.item() + 0.25 * high.item())


def test_the_last_step_borrows_its_least_variance_from_the_one_before():
    mix = torch.zeros(2, 1, dtype=torch.float64)
    expected = SCHEDULE.posterior_variance(1, 0).log().item()
    for t_next in (None, -1, torch.tensor([-1, -1])):
        assert learned_log_variance(mix, 0, t_next, schedule=SCHEDULE)[0].item() == pytest.approx(expected)
    assert learned_log_variance(mix + 1, 0, None, schedule=SCHEDULE)[1].item() == pytest.approx(
        SCHEDULE.betas[0].log().item())
    for schedule, t in [(SCHEDULE, 99), (SCHEDULE, 40.5), (NoiseSchedule.linear(1), 0)]:
        assert torch.isfinite(learned_log_variance(mix, t, None, schedule=schedule)).all()


def test_each_picture_has_a_variance_of_its_own():
    t = torch.tensor([5, 50, 95])
    mix = torch.rand(3, 2, 4, 4)
    together = learned_log_variance(mix, t, t - 1, schedule=SCHEDULE)
    for i in range(3):
        alone = learned_log_variance(mix[i:i + 1], int(t[i]), int(t[i]) - 1, schedule=SCHEDULE)
        torch.testing.assert_close(together[i:i + 1], alone)


def test_twice_the_channels_are_prediction_and_variance():
    x, value = batch()
    answer = Denoiser(lambda x, t: torch.cat([2 * x, value], dim=1), SCHEDULE)(x, 5)
    assert torch.allclose(answer.eps, 2 * x) and torch.allclose(answer.variance_mix, (value + 1) / 2)
    with pytest.raises(ValueError, match=r"answer 2 channels with as many, or with twice .* got \(3, 3, 4, 4\)"):
        Denoiser(lambda x, t: torch.cat([x, x[:, :1]], dim=1), SCHEDULE)(x, 5)


@pytest.mark.parametrize("part", [(slice(1),), (..., slice(1), slice(1)), (..., slice(2))])
def test_answers_of_another_size_are_refused_and_not_repeated(part):
    x, noise = batch()
    with pytest.raises(ValueError, match=r"keep the rest of the shape \(3, 2, 4, 4\)"):
        Denoiser(lambda x, t: x[part], SCHEDULE)(x, 5)
    with pytest.raises(ValueError, match=r"keep the rest of the shape \(3, 2, 4, 4\)"):
        diffusion_loss(lambda x, t: x[part], x, noise, torch.tensor([1, 2, 3]), schedule=SCHEDULE)


def test_whole_numbers_are_no_noisy_pictures():
    with pytest.raises(ValueError, match="x must be floating point, got torch.uint8"):
        Denoiser(lambda x, t: x / 2, SCHEDULE)(torch.ones(1, 2, 4, 4, dtype=torch.uint8), 5)


def test_the_bound_wants_whole_times():
    x0, noise = batch()
    with pytest.raises(ValueError, match="t must be whole"):
        variational_bound(Prediction(x0, noise), x0, noise, torch.tensor([1, 2.5, 3]), schedule=SCHEDULE)


@pytest.mark.parametrize("schedule", [SCHEDULE, FLOW], ids=repr)
def test_the_truth_costs_no_bits(schedule):
    x0, noise = batch()
    t = torch.tensor([1, 50, 99])
    x = schedule.add_noise(x0, noise, t)
    bits = variational_bound(Prediction(x0, noise), x0, x, t, schedule=schedule)
    assert torch.allclose(bits, torch.zeros(3, dtype=torch.float64), atol=1e-12)
    worse = variational_bound(Prediction(x0 + 0.1, noise), x0, x, t, schedule=schedule)
    wider = variational_bound(Prediction(x0, noise, torch.ones_like(x)), x0, x, t, schedule=schedule)
    assert (worse > bits).all() and (wider > bits).all()


def test_the_chances_of_all_pixel_values_add_up_to_one():
    values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(256, 1)
    for t, mean, mix in [(0, 0.3, 0.5), (0, -0.998, 1.0), (0, 0.9999, 0.0)]:
        answer = Prediction(torch.full_like(values, mean), values, torch.full_like(values, mix))
        bits = variational_bound(answer, values, values, t, schedule=NoiseSchedule.linear(100))
        assert torch.exp2(-bits).sum().item() == pytest.approx(1, abs=1e-9)


def test_far_off_pixels_still_teach_the_variance():
    """Thirty standard deviations off, where a plain difference of two probabilities is 0 and has no slope."""
    schedule, x0 = NoiseSchedule.linear(), torch.tensor([[-0.9, 0.0, 0.9]])
    mix = torch.full_like(x0, 0.5).requires_grad_()
    answer = Prediction(x0 + 0.3, x0, mix)
    bits = variational_bound(answer, x0, schedule.add_noise(x0, 0 * x0, 0), 0, schedule=schedule)
    bits.backward()
    assert torch.isfinite(bits).all() and bits.item() > 100
    assert torch.isfinite(mix.grad).all() and (mix.grad < 0).all()


# The loss


@pytest.mark.parametrize(("weight", "by_hand"), [
    (min_snr, {"epsilon": lambda snr: snr.clamp(max=5) / snr, "x0": lambda snr: snr.clamp(max=5),
               "v": lambda snr: snr.clamp(max=5) / (snr + 1)}),
    (p2, {"epsilon": lambda snr: 1 / (1 + snr), "x0": lambda snr: snr / (1 + snr)}),
    (partial(p2, k=2, gamma=0.5), {"epsilon": lambda snr: (2 + snr) ** -0.5}),
    (edm, {"x0": lambda snr: (1 / snr + 0.25) / (0.25 / snr), "epsilon": lambda snr: (1 + 4 / snr)}),
    (partial(edm, sigma_data=1), {"v": torch.ones_like}),
])
def test_weights_are_those_of_the_papers(weight, by_hand):
    x0, noise = batch(4)
    t = torch.tensor([2, 30, 60, 97])
    snr = SCHEDULE.snr[t]
    for prediction, expected in by_hand.items():
        call = lambda x, t: x.tanh()  # noqa: E731
        plain, weighted = (diffusion_loss(call, x0, noise, t, schedule=SCHEDULE, prediction=prediction, weight=w)
                           for w in (None, weight))
        torch.testing.assert_close((weighted / plain).double(), expected(snr), rtol=1e-4, atol=0)


@pytest.mark.parametrize("weight", [min_snr, p2, edm])
@pytest.mark.parametrize("schedule", [SCHEDULE, FLOW], ids=repr)
def test_with_a_weight_the_target_no_longer_matters(schedule, weight):
    """The same wrong guess of x0, told in four ways, has the same weighted loss."""
    x0, noise = batch()
    guess, t = x0 + torch.randn_like(x0), torch.tensor([3, 50, 95])
    losses = []
    for prediction in TARGETS:
        x = schedule.add_noise(x0, noise, t)
        alpha, sigma = (level.view(-1, 1, 1, 1) for level in (schedule.alpha(t), schedule.sigma(t)))
        told = target(guess, (x - alpha * guess) / sigma, t, schedule=schedule, prediction=prediction)
        losses.append(diffusion_loss(lambda x, t, told=told: told, x0, noise, t, schedule=schedule,
                                     prediction=prediction, weight=weight))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-4, atol=0)
    error = (guess - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(losses[0].double(), weight(schedule.snr[t]) * error, rtol=1e-4, atol=0)


@pytest.mark.parametrize("weight", [min_snr, p2, edm])
@pytest.mark.parametrize("prediction", TARGETS)
def test_weights_are_finite_without_signal(prediction, weight):
    x0, noise = batch(1, dtype=torch.float32)
    loss = diffusion_loss(lambda x, t: 0 * x, x0, noise, torch.tensor([99]), schedule=FLOW, prediction=prediction,
                          weight=weight)
    assert torch.isfinite(loss).all()


def test_target_weight_is_the_ratio_of_the_errors():
    x0, noise = batch()
    guess, t = x0 + torch.randn_like(x0), torch.tensor([3.5, 50, 95], dtype=torch.float64)
    for schedule in (SCHEDULE, FLOW):
        x = schedule.add_noise(x0, noise, t)
        alpha, sigma = (level.view(-1, 1, 1, 1) for level in (schedule.alpha(t), schedule.sigma(t)))
        for prediction in TARGETS:
            told, right = (target(picture, (x - alpha * picture) / sigma, t, schedule=schedule, prediction=prediction)
                           for picture in (guess, x0))
            ratio = (told - right).square().sum((1, 2, 3)) / (guess - x0).square().sum((1, 2, 3))
            torch.testing.assert_close(target_weight(t, schedule=schedule, prediction=prediction), ratio)


@pytest.mark.parametrize("prediction", TARGETS)
def test_the_hybrid_loss_teaches_the_variance_and_not_the_mean(prediction):
    x0, noise = batch()
    guess = torch.randn(x0.shape, dtype=x0.dtype, generator=torch.Generator().manual_seed(4)).requires_grad_()
    value = torch.zeros_like(x0).requires_grad_()
    t = torch.tensor([0, 50, 95])
    network = lambda x, t: torch.cat([guess, value], dim=1)  # noqa: E731
    loss = diffusion_loss(network, x0, noise, t, schedule=SCHEDULE, prediction=prediction)
    plain = diffusion_loss(lambda x, t: guess, x0, noise, t, schedule=SCHEDULE, prediction=prediction)
    x = SCHEDULE.add_noise(x0, noise, t)
    answer = to_prediction(guess, x, t, schedule=SCHEDULE, prediction=prediction)
    bound = variational_bound(answer._replace(variance_mix=value / 2 + 0.5), x0, x, t, schedule=SCHEDULE)
    torch.testing.assert_close(loss.double(), plain + 0.1 * bound, rtol=1e-5, atol=1e-6)
    on_guess, on_value = torch.autograd.grad(loss.sum(), (guess, value))
    alone, = torch.autograd.grad(plain.sum(), guess)
    assert torch.equal(on_guess, alone) and on_value.abs().amax((1, 2, 3)).min() > 0


def test_the_best_variance_is_that_of_the_reverse_step():
    """For Gaussian data the true reverse step is known: the bound is least at its variance."""
    data_variance, t = 0.25, 60
    generator = torch.Generator().manual_seed(3)
    x0 = 0.5 * torch.randn(200_000, 1, dtype=torch.float64, generator=generator)
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    x = SCHEDULE.add_noise(x0, torch.randn(x0.shape, dtype=torch.float64, generator=generator), t)
    best = x * alpha * data_variance / (alpha**2 * data_variance + sigma**2)
    left = data_variance * sigma**2 / (alpha**2 * data_variance + sigma**2)  # variance of x0 given x_t
    one = torch.ones(1, dtype=torch.float64)
    weight = SCHEDULE.posterior_mean(one, 0 * one, t, t - 1)
    true = (SCHEDULE.posterior_variance(t, t - 1) + weight**2 * left).log()
    least, most = (learned_log_variance(one * end, t, t - 1, schedule=SCHEDULE) for end in (0, 1))
    right = ((true - least) / (most - least)).item()
    assert 0 < right < 1
    bits = {shift: variational_bound(Prediction(best, x, torch.full_like(x, right + shift)), x0, x, t,
                                     schedule=SCHEDULE).mean() for shift in (-0.2, 0, 0.2)}
    assert bits[0] < bits[-0.2] and bits[0] < bits[0.2]


def test_extra_channels_reach_the_network_in_training_too():
    (x0, noise), extra = batch(dtype=torch.float32), torch.ones(3, 1, 4, 4)
    seen = []
    network = lambda x, t: seen.append(x) or x[:, :2]  # noqa: E731
    diffusion_loss(network, x0, noise, torch.tensor([1, 5, 9]), schedule=SCHEDULE, concat=extra)
    assert seen[0].shape == (3, 3, 4, 4) and torch.equal(seen[0][:, 2:], extra)


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
    assert torch.equal(seen[0][0], SCHEDULE.add_noise(x0, noise, t)) and torch.equal(seen[0][1], t)


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


# Devices


@pytest.mark.parametrize("schedule", [SCHEDULE, FLOW], ids=repr)
def test_meta_device(schedule):
    x0, t = torch.empty(2, 3, 4, 4, device="meta"), torch.empty(2, dtype=torch.long, device="meta")
    network = lambda x, t: torch.cat([x, x], dim=1)  # noqa: E731
    loss = diffusion_loss(network, x0, x0, t, schedule=schedule, prediction="v", weight=min_snr)
    assert loss.is_meta and loss.shape == (2,)
    for times in (t, 50):
        answer = Denoiser(network, schedule)(x0, times)
        assert answer.x0.is_meta and answer.variance_mix.shape == x0.shape
        assert learned_log_variance(answer.variance_mix, times, times - 1, schedule=schedule).is_meta
    assert exact_denoiser(torch.empty(9, 3, 4, 4, device="meta"), schedule)(x0, 50).x0.shape == x0.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("prediction", TARGETS)
def test_cuda_gives_the_same_as_the_cpu(prediction):
    x0, noise = batch(dtype=torch.float32)
    t, network = torch.tensor([0, 50, 90]), lambda x, t: torch.cat([x.sin(), x.cos()], dim=1)
    results = []
    for device in ("cpu", "cuda"):
        mine = [v.to(device) for v in (x0, noise, t)]
        loss = diffusion_loss(network, *mine, schedule=SCHEDULE, prediction=prediction, weight=edm)
        answers = [Denoiser(network, SCHEDULE, prediction)(mine[0], time) for time in (mine[2], 50)]
        spread = [learned_log_variance(a.variance_mix, 50, None, schedule=SCHEDULE) for a in answers]
        best = exact_denoiser(mine[1], SCHEDULE)(mine[0], mine[2]).x0
        parts = [loss, best, *spread, *(part for answer in answers for part in answer)]
        assert all(part.device.type == device for part in parts)
        results.append([part.cpu() for part in parts])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


def test_guidance_asks_the_network_itself():
    guided = classifier_free(Denoiser(Recorder(), SCHEDULE, condition=words(1.0)), words(0.0), scale=2.0)
    for again in (partial(classifier_free, scale=2.0), partial(rescaled_guidance, scale=2.0)):
        with pytest.raises(ValueError, match="takes a Denoiser, got Wrapped; guide first, then wrap"):
            again(guided, words(0.0))


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_float64_stays_exact_at_whole_times(prediction):
    g, schedule, t = torch.Generator().manual_seed(0), NoiseSchedule.linear(), torch.tensor([900, 500])
    x0, noise = (torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    output = target(x0, noise, t, schedule=schedule, prediction=prediction)
    answer = to_prediction(output, schedule.add_noise(x0, noise, t), t, schedule=schedule, prediction=prediction)
    assert (answer.x0 - x0).abs().max() < 1e-11 and (answer.eps - noise).abs().max() < 1e-11
    loss = diffusion_loss(lambda x, t: 0.5 * x, x0, noise, t, schedule=schedule, prediction=prediction)
    assert loss.dtype == torch.float64


def test_a_time_for_each_picture():
    with pytest.raises(ValueError, match="t must be one number, or one per picture: got 3 for 1"):
        to_prediction(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([3.0, 4.0, 5.0]),
                      schedule=NoiseSchedule.linear(), prediction="v")


def test_one_row_without_caption_serves_a_batch():
    words = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    say = Denoiser(lambda x, t, context: x * context.mean((1, 2))[:, None], NoiseSchedule.linear(),
                   condition=Condition(context=words))
    x, nothing = torch.ones(3, 5), torch.full((1, 2, 4), 0.5)
    one, many = (classifier_free(say, Condition(context=c), scale=2.0)(x, 10).eps
                 for c in (nothing, nothing.expand(3, -1, -1)))
    assert torch.equal(one, many)
    with pytest.raises(ValueError, match="2 rows of context don't go with 3"):
        classifier_free(say, Condition(context=nothing.expand(2, -1, -1)), scale=2.0)


def test_a_fractional_time_is_told_whatever_the_default_dtype():
    told = []
    say = Denoiser(lambda x, t: told.append(t) or x, NoiseSchedule.linear())
    torch.set_default_dtype(torch.bfloat16)
    try:
        say(torch.zeros(1, 1, 2, 2, dtype=torch.float32), 887.75)
    finally:
        torch.set_default_dtype(torch.float32)
    assert told[0].item() == 887.75


def test_denoisers_and_conditions_can_be_compared():
    condition = Condition(embedding=torch.ones(2, 3))
    say = Denoiser(lambda x, t: x, NoiseSchedule.linear(), condition=condition)
    assert say == say and condition == condition and condition != Condition(embedding=torch.ones(2, 3))
