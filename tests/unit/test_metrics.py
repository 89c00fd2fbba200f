"""Scores of two clouds of points against values known in advance, and the judge's answers."""

import pytest
import torch

from diffusionbook.metrics import (
    Judge,
    JudgeConfig,
    data_copying,
    extract,
    fid,
    inception_features,
    kid,
    nearest_neighbours,
    precision_recall,
)


def cloud(*shape, seed=0, mean=0.0, std=1.0):
    return mean + std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def standardised(points):
    """Move and turn a cloud so that its mean is exactly 0 and its covariance exactly the unit matrix."""
    points = points - points.mean(0)
    return points @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(points.T))).T


# --- Fréchet distance ----------------------------------------------------------------------------
def test_fid_of_two_gaussians_is_the_closed_form():
    real = standardised(cloud(300, 5))
    stretch = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.5], dtype=torch.float64)
    fake = standardised(cloud(200, 5, seed=1)) * stretch + 2
    expected = 5 * 2**2 + ((stretch - 1) ** 2).sum().item()
    assert fid(real, fake) == pytest.approx(expected, abs=1e-9)
    assert fid(fake, real) == pytest.approx(expected, abs=1e-9)


def test_fid_of_a_cloud_with_itself_is_zero_even_when_its_covariance_is_singular():
    few = cloud(5, 40)
    assert abs(fid(few, few)) < 1e-10


def test_fid_reads_pictures_through_the_extractor():
    pictures = cloud(100, 3, 8, 8)
    means = lambda x: x.mean((2, 3))  # noqa: E731
    assert fid(pictures, pictures + 1, features=means) == pytest.approx(3, abs=1e-9)


# --- kernel distance -----------------------------------------------------------------------------
def test_kid_is_the_unbiased_mean_over_all_pairs():
    real, fake = cloud(60, 3), cloud(44, 3, seed=1, mean=0.3)
    kernel = lambda x, y: (float(x @ y) / 3 + 1) ** 3  # noqa: E731
    within = [sum(kernel(x, y) for i, x in enumerate(points) for j, y in enumerate(points) if i != j)
              / (len(points) * (len(points) - 1)) for points in (real, fake)]
    between = sum(kernel(x, y) for x in real for y in fake) / (len(real) * len(fake))
    assert kid(real, fake).value == pytest.approx(sum(within) - 2 * between, abs=1e-9)


def test_kid_scatters_around_zero_for_one_source_as_its_error_bar_says():
    values = [kid(cloud(80, 4, seed=2 * i), cloud(80, 4, seed=2 * i + 1)) for i in range(200)]
    scores = torch.tensor([v.value for v in values])
    stated = torch.tensor([v.error for v in values]).square().mean().sqrt()
    assert abs(scores.mean()) < 3 * scores.std() / 200**0.5  # no bias
    assert (scores < 0).any()
    assert 0.6 < stated / scores.std() < 2.5  # at equality of the clouds the jackknife errs on the careful side


def test_the_error_bar_of_kid_is_right_for_different_clouds():
    values = [kid(cloud(80, 4, seed=2 * i), cloud(80, 4, seed=2 * i + 1, mean=0.7)) for i in range(200)]
    stated = torch.tensor([v.error for v in values]).square().mean().sqrt()
    assert 0.85 < stated / torch.tensor([v.value for v in values]).std() < 1.2


def test_kid_does_not_depend_on_how_the_rows_are_cut_into_pieces():
    real, fake = cloud(1100, 2), cloud(1500, 2, seed=1, mean=0.2)
    turned = torch.cat([real[20:], real[:20]])  # whole rounds of the 20 groups: membership is unchanged
    assert kid(real, fake).value == pytest.approx(kid(turned, fake).value, abs=1e-10)
    assert kid(real, fake).error == pytest.approx(kid(turned, fake).error, abs=1e-10)


# --- precision, recall, copies -------------------------------------------------------------------
def test_a_painter_who_leaves_out_half_of_the_world_is_precise_but_recalls_half():
    left, right = cloud(200, 2), cloud(200, 2, seed=1, mean=100)
    result = precision_recall(torch.cat([left, right]), left[:150])
    assert result.precision == 1 and 0.4 < result.recall <= 0.5


def test_clouds_far_apart_share_nothing():
    assert precision_recall(cloud(50, 3), cloud(50, 3, mean=1000)) == (0, 0)


def test_recitation_honest_painting_and_straying_are_told_apart():
    train, unseen = cloud(2000, 3), cloud(300, 3, seed=1)
    assert data_copying(train, unseen, train[:300]).value == 1
    honest = data_copying(train, unseen, cloud(300, 3, seed=2))
    assert abs(honest.value - 0.5) < 3 * honest.error
    assert data_copying(train, unseen, cloud(300, 3, seed=3, mean=30)).value == 0


def test_ties_count_half():
    train, points = torch.zeros(5, 1), torch.ones(4, 1)
    assert data_copying(train, points, points).value == 0.5


def test_a_copy_is_found_at_distance_exactly_zero():
    pool = cloud(300, 20) * 1e3
    distances, indices = nearest_neighbours(pool[[7, 250]], pool, k=2)
    assert distances[:, 0].tolist() == [0, 0] and indices[:, 0].tolist() == [7, 250]
    assert (distances[:, 1] > 0).all()


def test_one_picture_has_neighbours_too():
    pool = cloud(20, 3)
    distances, indices = nearest_neighbours(pool[[7]], pool, k=2)
    assert distances[0, 0] == 0 and indices[0, 0] == 7 and distances.shape == indices.shape == (1, 2)
    assert nearest_neighbours(pool, pool[[7]])[1].max() == 0
    assert data_copying(pool, cloud(20, 3) + 1, pool[[7]]) == (1, pytest.approx((22 / 240) ** 0.5))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: fid(cloud(10, 3, 8, 8), cloud(10, 3, 8, 8)), "pictures need features="),
    (lambda: fid(cloud(10, 3), cloud(10, 4)), "got 3 and 4"),
    (lambda: fid(cloud(1, 3), cloud(10, 3)), "two or more points, got 1 and 10"),
    (lambda: nearest_neighbours(cloud(0, 3), cloud(9, 3)), r"points \(N, D\), not \(0, 3\)"),
    (lambda: extract(torch.full((4, 2), float("nan"))), "NaN"),
    (lambda: kid(cloud(30, 3), cloud(50, 3)), "fewer groups"),
    (lambda: precision_recall(cloud(5, 3), cloud(9, 3), k=5), "1…4"),
    (lambda: nearest_neighbours(cloud(5, 3), cloud(9, 3), k=0), "1…9"),
])
def test_impossible_questions_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- somebody else's network ---------------------------------------------------------------------
class LikeInception(torch.nn.Module):
    """The outside of torchvision's Inception v3."""

    def __init__(self):
        super().__init__()
        self.transform_input, self.dropout, self.fc = True, torch.nn.Dropout(), torch.nn.Linear(12, 1000)

    def forward(self, images):
        assert images.shape[1:] == (3, 299, 299) and not self.transform_input
        return self.fc(self.dropout(torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)))


def test_inception_gives_its_last_hidden_layer_for_pictures_of_any_size():
    features = inception_features(LikeInception())
    pictures = cloud(6, 3, 32, 40).clamp(-1, 1).float()
    points = extract(pictures, features)
    assert points.shape == (6, 12)
    flat = torch.full((2, 3, 16, 16), 0.25)
    assert torch.allclose(extract(flat, features), torch.full((2, 12), 0.25, dtype=torch.float64), atol=1e-6)
    assert fid(pictures, pictures, features=features) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="divide by 127.5"):
        features(pictures * 255)


def test_inception_of_torchvision_has_the_parts_that_are_changed():
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        network = models.inception_v3(weights=None, init_weights=False)
        points = inception_features(network)(torch.empty(2, 3, 64, 64))
    assert points.shape == (2, 2048)


# --- the judge -----------------------------------------------------------------------------------
CONFIG = JudgeConfig(names=("cat", "pizza", "waving hand"), groups=("animals", "food", "people"),
                     tones=(None, "dark"), patch=4, channels=(32, 32))


@pytest.fixture
def judge():
    torch.manual_seed(0)
    return Judge(CONFIG).eval()


def test_the_report_counts_right_answers(judge):
    images = cloud(4, 3, 16, 16).clamp(-1, 1).float()
    best = {part: logits.argmax(1) for part, logits in judge(images).items()}
    right = [{"name": CONFIG.names[n], "group": CONFIG.groups[g], "tone": CONFIG.tones[t], "style": CONFIG.styles[s]}
             for n, g, t, s in zip(*(best[part] for part in ("name", "group", "tone", "style")), strict=True)]
    assert judge.report(images, right, batch=3) == dict.fromkeys(("style", "group", "tone", "name", "name in 5"), 1.0)
    other = {tone: CONFIG.tones[1 - i] for i, tone in enumerate(CONFIG.tones)}
    wrong = [right[0] | {"tone": other[right[0]["tone"]]}, *right[1:]]
    assert judge.report(images, wrong) == judge.report(images, right) | {"tone": 0.75}


def test_the_judge_goes_to_disk_and_back(judge, tmp_path):
    judge.save_pretrained(tmp_path)
    again = Judge.from_pretrained(tmp_path)
    assert again.config == CONFIG
    images = torch.zeros(1, 3, 16, 16)
    assert torch.equal(again(images)["name"], judge(images)["name"])


def test_the_judge_runs_on_the_meta_device():
    with torch.device("meta"):
        answers = Judge(CONFIG)(torch.empty(2, 3, 64, 64))
    assert {part: tuple(a.shape) for part, a in answers.items()} == {
        "name": (2, 3), "group": (2, 3), "tone": (2, 2), "style": (2, 3), "style at large": (2, 3)}


def test_the_eye_for_strokes_sees_21_pixels_at_a_time(judge):
    images = cloud(1, 3, 64, 64).clamp(-1, 1).float()
    assert torch.equal(judge.style(images), judge(images)["style"])
    assert not torch.equal(judge.style(images), judge(images)["style at large"])
    for block in judge.strokes.children():
        if isinstance(block, torch.nn.Sequential):
            block[1] = torch.nn.Identity()  # a group norm's mean and deviation are those of the whole picture
    images.requires_grad_()
    judge.strokes(images)[0, :, 8, 8].sum().backward()
    seen = images.grad[0].abs().amax(0) > 0
    assert seen.any(0).sum() == seen.any(1).sum() == 21 and seen[22:43, 22:43].all()


def test_the_judge_says_what_it_does_not_know(judge):
    attributes = [{"name": "dragon", "group": "food", "tone": None, "style": "noto"}]
    with pytest.raises(ValueError, match="no name 'dragon'"):
        judge.report(torch.full((1, 3, 16, 16), 9.0), attributes)  # before it looks at a picture
    with pytest.raises(ValueError, match="needs its attributes"):
        judge.report(torch.zeros(2, 3, 16, 16), attributes)
    with pytest.raises(ValueError, match="multiples of 8"):
        judge(torch.zeros(1, 3, 18, 16))


def test_what_is_no_tensor_is_refused_with_the_way_to_one():
    points = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="needs a tensor of pictures or points, got list; from_pil"):
        fid([points], points)
    with pytest.raises(ValueError, match=r"features must give a tensor \(B, D\), got dict"):
        fid(points, points, features=lambda x: {"name": x})
    with pytest.raises(ValueError, match="whole number"):
        precision_recall(points, points, k=1.5)
    with pytest.raises(ValueError, match="groups"):
        kid(points, points, groups=2.5)
