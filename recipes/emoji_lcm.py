"""Distil the miniature Stable Diffusion into one that paints in four steps: a latent consistency model, as a LoRA.

    python recipes/emoji_lcm.py [--folder runs/emoji_lcm] [--steps 2400] [--batch 32] [--device cuda]

Needs the pipeline of recipes/emoji_stable_diffusion.py. Resumable: the same command goes on where it stopped. At the
end the LoRA goes to diffusionbook/weights/emoji/lcm (or to `--ship`), and the distance of its pictures in four steps
from the teacher's in twenty is printed. Use it with sampler="lcm", spacing="lcm" and guidance=1.
(Luo et al. 2023, section 4; the target network is the student itself, after Song and Dhariwal 2024.)
"""

from pathlib import Path

import torch
from shared import SHIPPED, latents_of, options
from torch.utils.data import StackDataset

from diffusionbook.data import emoji
from diffusionbook.denoising import Condition, Denoiser, classifier_free
from diffusionbook.editing import LoRA
from diffusionbook.samplers import sample
from diffusionbook.stable_diffusion import StableDiffusion
from diffusionbook.training import balanced_weights, has_bf16, train

GUIDANCE = 3.0  # what the teacher's guidance is becomes part of the student
CHANGED = r"^unet\..*(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|conv[12])$"  # attention and residual blocks
RANK = 4
STOPS = 50  # the times between which the student must agree with itself


def main(folder: Path, steps: int, batch: int, device: torch.device, ship: Path, limit: int | None = None) -> None:
    painter = StableDiffusion.from_pretrained(SHIPPED).to(device)
    painter.unet.requires_grad_(False)
    data, schedule, unseen = emoji("train"), painter.schedule, emoji("validation").captions[:limit or 64]
    images, captions = data.images(range(limit) if limit else None), data.captions[:limit]
    latents = latents_of(painter, images)
    pictures = StackDataset(x0=latents, ids=painter.tokenizer(captions))
    empty = painter.encode_text([""])
    torch.manual_seed(0)
    lora = LoRA(painter, rank=RANK, targets=CHANGED).attach()
    stride = schedule.steps // STOPS

    def loss(lora: LoRA, batch: dict, generator: torch.Generator) -> torch.Tensor:
        x0, noise = batch["x0"], torch.randn(batch["x0"].shape, generator=generator).to(device)
        t = (stride * torch.randint(1, STOPS + 1, (len(x0),), generator=generator) - 1).to(device)
        then = t - stride  # -1: the clean point
        x = schedule.add_noise(x0, noise, t)
        with torch.no_grad():
            told = Condition(context=painter.text_encoder(batch["ids"]))
            teacher = Denoiser(painter.unet, schedule, painter.prediction, told)
            lora.scale = 0.0
            nothing = Condition(context=empty.expand(len(x0), -1, -1))
            answer = classifier_free(teacher, nothing, scale=GUIDANCE)(x, t)
            lora.scale = 1.0
            alpha, sigma = (level.to(x).view(-1, 1, 1, 1) for level in schedule.levels(then.clamp(min=0)))
            clean = (then < 0).view(-1, 1, 1, 1)
            before = torch.where(clean, answer.x0, alpha * answer.x0 + sigma * answer.eps)
            target = torch.where(clean, answer.x0, teacher(before, then.clamp(min=0)).x0)
        student = Denoiser(painter.unet, schedule, painter.prediction, told, grad=True)
        difference = (student(x, t).x0 - target).float()
        return ((difference**2 + 0.01**2).sqrt() - 0.01).mean()  # pseudo-Huber: outliers count less

    @torch.no_grad()
    def distance() -> dict[str, float]:
        shape = (len(unseen), *latents.shape[1:])
        options = {"seed": 0, "device": device, "progress": False}
        lora.scale = 0.0
        wanted = sample(painter.denoiser(unseen, guidance=GUIDANCE), shape, steps=20, **options)
        without = sample(painter.denoiser(unseen, guidance=GUIDANCE), shape, steps=4, **options)
        lora.scale = 1.0
        found = sample(painter.denoiser(unseen, guidance=1), shape, steps=4, sampler="lcm", spacing="lcm", **options)
        return {name: (x - wanted).square().mean().item() for name, x in (("lcm", found), ("dpmpp_2m", without))}

    train(lora, pictures, loss, weights=balanced_weights([a["name"] for a in data.attributes[:limit]]), batch=batch,
          steps=steps, lr=1e-3, warmup=min(100, steps), weight_decay=0.0, ema=0.995, bf16=has_bf16(device),
          folder=folder, every=200, evaluate=distance).swap(lora)
    lora.save(ship / "lcm", dtype=torch.float16)
    print("squared distance in four steps from the teacher's twenty:", {k: round(v, 3) for k, v in distance().items()})


if __name__ == "__main__":
    main(**options(__file__, __doc__, steps=2400, batch=32, trial=True))
