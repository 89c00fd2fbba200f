"""Train a ControlNet for the miniature Stable Diffusion: it draws along edges.

    python recipes/emoji_controlnet.py [--folder runs/emoji_controlnet] [--steps 4000] [--batch 64] [--device cuda]

Needs the pipeline of recipes/emoji_stable_diffusion.py, which stays frozen, and so does the copy of its way down: what
learns is how the hint enters, and the zero convolutions, 0.5M of 8.2M parameters. The copy then needs no place in the
file. Resumable: the same command goes on where it stopped. At the end what was learned goes to
diffusionbook/weights/emoji/controlnet (or to `--ship`).
"""

from pathlib import Path

import torch
from shared import SHIPPED, latents_of, options
from torch.utils.data import StackDataset

from diffusionbook.data import emoji
from diffusionbook.editing import Controlled, ControlNet, edge_map
from diffusionbook.stable_diffusion import StableDiffusion
from diffusionbook.training import DenoisingLoss, balanced_weights, has_bf16, mean_loss, train

HINT_CHANNELS = (16, 32, 64, 128)  # the copy is frozen, so the hint must be made ready for it
WITHOUT_CAPTION = 0.5  # captions left out, so that the lines must say it all (Zhang et al. 2023, section 3.3)


def encoded(painter: StableDiffusion, split: str, limit: int | None) -> tuple[StackDataset, list[str]]:
    """Latents, edges and captions of one split, encoded once; and the names."""
    data = emoji(split)
    images, captions = data.images(range(limit) if limit else None), data.captions[:limit]
    edges = torch.cat([edge_map(part)[:, :1] for part in images.split(256)]).bool()
    return (StackDataset(x0=latents_of(painter, images), edges=edges, ids=painter.tokenizer(captions)),
            [a["name"] for a in data.attributes[:limit]])


def main(folder: Path, steps: int, batch: int, device: torch.device, ship: Path, limit: int | None = None) -> None:
    painter = StableDiffusion.from_pretrained(SHIPPED).to(device)
    for network in (painter.unet, painter.text_encoder):
        network.requires_grad_(False)
    (pictures, names), (unseen, _) = (encoded(painter, split, limit) for split in ("train", "validation"))
    control = ControlNet.beside(painter.unet, hint_channels=HINT_CHANNELS)
    for name, p in control.named_parameters():
        p.requires_grad_(not name.startswith(ControlNet.copied))
    learning = sum(p.numel() for p in control.parameters() if p.requires_grad)
    print(f"{learning:,} of {control.count_parameters():,} parameters learn")
    empty = painter.tokenizer([""])[0].to(device)
    error = DenoisingLoss(painter.schedule, painter.prediction)

    def loss(control: ControlNet, batch: dict, generator: torch.Generator, drop: float = WITHOUT_CAPTION):
        dropped = (torch.rand(len(batch["ids"]), 1, generator=generator) < drop).to(device)
        context = painter.text_encoder(torch.where(dropped, empty, batch["ids"]))
        network = Controlled(painter.unet, control, batch["edges"].float().expand(-1, 3, -1, -1))
        return error(network, {"x0": batch["x0"], "context": context}, generator)

    def unseen_error() -> float:
        return mean_loss(control, unseen, lambda *told: loss(*told, drop=0.0), seed=1, bf16=has_bf16(device))

    print(f"validation before: {unseen_error():.3f}")
    train(control, pictures, loss, weights=balanced_weights(names), batch=batch, steps=steps, lr=3e-4,
          warmup=min(100, steps), ema=0.998, bf16=has_bf16(device), folder=folder,
          evaluate=lambda: {"validation": unseen_error()}).swap(control)
    control.save_pretrained(ship / "controlnet", dtype=torch.float16, beside=painter.unet)
    print(f"validation after: {unseen_error():.3f}")


if __name__ == "__main__":
    main(**options(__file__, __doc__, steps=4000, batch=64, trial=True))
