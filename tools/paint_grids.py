"""Paint the pictures of the README and of the first page, and held-out captions beside real pictures for a model card.

    python tools/paint_grids.py

Writes book/_static/emoji-grid.png, book/_static/four-machines.png and recipes/emoji_stable_diffusion.png.
"""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from diffusionbook.dalle import DallE
from diffusionbook.dalle2 import DallE2
from diffusionbook.data import emoji
from diffusionbook.glide import Glide
from diffusionbook.stable_diffusion import StableDiffusion

ROOT = Path(__file__).parent.parent
CAPTIONS = [
    f"{name}, {style} style"
    for style in ("noto", "twemoji", "3d")
    for name in ("red heart", "pizza", "grinning face", "cat face", "blue heart", "woman astronaut", "flag: Japan",
                 "sunflower")
    if not (name.startswith("flag") and style == "3d")
] + ["man firefighter, dark skin tone, 3d style"]
MACHINES = {"GLIDE": Glide, "DALL·E": DallE, "DALL·E 2": DallE2, "Stable Diffusion": StableDiffusion}
COMPARED = ["red heart", "grinning face", "woman firefighter, dark skin tone", "raised hand, light skin tone",
            "cat face", "man student, medium skin tone", "green book", "pizza"]
HELD_OUT_ROWS = {"object_style": 2, "tone_style": 2}  # rows of eight captions


def label(axes, caption: str) -> None:
    axes.set_title(textwrap.fill(caption, 17), fontsize=6, y=-0.1, va="top")
    axes.axis("off")


def show(axes, image: torch.Tensor) -> None:
    axes.imshow(image.permute(1, 2, 0) / 2 + 0.5, interpolation="nearest")


def save(figure, path: Path) -> None:
    """Write a figure with 256 colours: a third of the room, and the eye hardly sees it."""
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def paint_captions(painter: StableDiffusion, path: Path) -> None:
    images = painter(CAPTIONS, output="tensor", seed=0)
    figure, grid = plt.subplots(3, 8, figsize=(8, 4.1), dpi=120)
    for axes, caption, image in zip(grid.flat, CAPTIONS, images, strict=True):
        show(axes, image)
        label(axes, caption)
    figure.subplots_adjust(0.005, 0.09, 0.995, 0.995, wspace=0.08, hspace=0.42)
    save(figure, path)


def paint_machines(path: Path) -> None:
    figure, grid = plt.subplots(len(MACHINES), len(COMPARED), figsize=(8.6, 4.7), dpi=110)
    for line, (name, machine) in zip(grid, MACHINES.items(), strict=True):
        for axes, image in zip(line, machine.from_pretrained("emoji")(COMPARED, output="tensor", seed=0), strict=True):
            show(axes, image)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=8)
    for axes, caption in zip(grid[-1], COMPARED, strict=True):
        axes.set_xlabel(textwrap.fill(caption, 17), fontsize=7)
    figure.subplots_adjust(0.03, 0.09, 0.995, 0.995, wspace=0.06, hspace=0.06)
    save(figure, path)


def paint_held_out(painter: StableDiffusion, path: Path) -> None:
    figure, grid = plt.subplots(4, 8, figsize=(12, 5.2), dpi=100)
    rows = iter(grid)
    for split, count in HELD_OUT_ROWS.items():
        data = emoji(split)
        index = range(0, len(data), len(data) // (8 * count))[: 8 * count]
        captions = [data.captions[i] for i in index]
        pairs = torch.cat([data.images(index), painter(captions, output="tensor", seed=0)], dim=3)  # (B, 3, 64, 128)
        for row in range(count):
            for k, axes in enumerate(next(rows), start=8 * row):
                show(axes, pairs[k])
                label(axes, captions[k])
    figure.subplots_adjust(0.005, 0.07, 0.995, 0.995, wspace=0.08, hspace=0.3)
    save(figure, path)


if __name__ == "__main__":
    model = StableDiffusion.from_pretrained("emoji")
    paint_captions(model, ROOT / "book" / "_static" / "emoji-grid.png")
    paint_machines(ROOT / "book" / "_static" / "four-machines.png")
    paint_held_out(model, ROOT / "recipes" / "emoji_stable_diffusion.png")
