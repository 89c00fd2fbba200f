"""The loop beside those of PyTorch and diffusers."""

import copy

import pytest
import torch
from diffusers import DDPMPipeline
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import nn

from diffusionbook.denoising import Denoiser
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.training import EMA, generator_for, save_denoiser, train, warmup_cosine
from diffusionbook.unet import UNet, UNetConfig


def test_ema_is_that_of_diffusers():
    """Theirs takes the first weights whole, where ours averages 1 : 9 with the start; here these are equal."""
    torch.manual_seed(0)
    net = nn.Linear(3, 4)
    ours, theirs = EMA(net, decay=0.9), EMAModel(net.parameters(), decay=0.9)
    for _ in range(200):  # the ramp reaches 0.9 after 80
        ours.update(net)
        theirs.step(net.parameters())
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
    for a, b in zip(ours.weights.values(), theirs.shadow_params, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_rate_is_that_of_diffusers_and_of_torch():
    steps, warmup = 50, 8
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup, steps).lr_lambdas[0]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup)
    for step in range(steps):
        ours = warmup_cosine(step, steps=steps, warmup=warmup)
        if step < warmup:  # theirs begins with a step at rate 0, ours doesn't waste it
            assert ours == pytest.approx(theirs(step + 1))
        else:
            assert ours == pytest.approx(theirs(step))
            assert ours == pytest.approx(cosine.get_last_lr()[0])
            optimizer.step()
            cosine.step()


def test_the_loop_is_what_pytorch_does_by_hand():
    """The same batches through a bare loop with AdamW, clipping and two schedulers of PyTorch."""
    data, steps, warmup = torch.randn(100, 3, generator=generator_for(1)), 40, 5

    def loss(net, x, generator):
        return 30 * (net(x) - x.sin()).square().mean()

    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3))
    theirs = copy.deepcopy(ours)
    train(ours, data, loss, steps=steps, lr=0.01, batch=20, warmup=warmup, progress=False)

    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.01)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1, warmup - 1)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup)
    rate = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warmup])
    for step in range(steps):
        index = torch.randint(len(data), (20,), generator=generator_for(0, step, 0))
        optimizer.zero_grad()
        loss(theirs, data[index], None).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        rate.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)  # fused and plain AdamW round differently


@pytest.mark.parametrize("classes, out", [(None, 1), (4, 1), (None, 2)])
def test_diffusers_paints_with_what_a_recipe_saves(tmp_path, classes, out):
    torch.manual_seed(0)
    net = UNet(UNetConfig(channels=(8, 16), attention=(None, "self"), heads=(1, 2), layers_per_block=1, in_channels=1,
                          out_channels=out, context_width=None, groups=4, sample_size=8, classes=classes)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    schedule = NoiseSchedule.cosine(50)
    save_denoiser(tmp_path, Denoiser(net, schedule, "v"), classes=[str(i) for i in range((classes or 1) - 1)])
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert torch.allclose(pipeline.scheduler.alphas_cumprod.double(), schedule.alpha_bar, atol=1e-6)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 40])
    told = torch.tensor([0, 3]) if classes else None
    with torch.no_grad():
        theirs = pipeline.unet(x, t, class_labels=told).sample
        assert torch.allclose(net(x, t, embedding=told), theirs, rtol=1e-4, atol=1e-5)
    if classes is None:
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline(num_inference_steps=3, output_type="np").images.shape == (1, 8, 8, 1)
