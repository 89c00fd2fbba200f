"""Write the pictures on which the book's sliders work: bytes that a page has even when it is opened as a file.

    python tools/slider_pictures.py book/_static/sliders/pictures.js
"""
import argparse
import base64
from pathlib import Path

import numpy as np
from skimage import data

from diffusionbook.data import emoji


def pictures() -> dict[str, np.ndarray]:
    """The cat of chapter 04, (64, 64, 3), and the coins of chapter 02, clean and noisy, (96, 128): 8 bits each."""
    names = emoji("train")
    cat = names[names.find("grinning cat, noto style")][0]  # (3, 64, 64) in [-1, 1]
    coins = data.coins()[15:111, 20:148]
    noisy = coins / 255 + 0.1 * np.random.default_rng(0).standard_normal(coins.shape)
    return {"cat": ((cat + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), "coins": coins,
            "noisyCoins": (255 * noisy.clip(0, 1)).round().astype(np.uint8)}


def script() -> str:
    """A script that gives them to the page, as rows of bytes."""
    lines = [f'  {name}: bytes("{base64.b64encode(picture.tobytes()).decode()}"),'
             for name, picture in pictures().items()]
    return "\n".join(["// Written by tools/slider_pictures.py: do not edit.",
                      "const sliderPictures = (() => {",
                      "  const bytes = (text) => Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));",
                      "  return {", *("  " + line for line in lines), "  };", "})();", ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.parse_args().file.write_text(script(), encoding="utf8")
