"""The command line: `diffusionbook generate "red heart, noto style" --seed 0 --out heart.png`."""

import argparse
import sys
import tempfile
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 with one sentence on stderr for an impossible wish."""
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"diffusionbook: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="diffusionbook", description="Paint pictures from words.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="paint a picture for a caption")
    generate.add_argument("caption", help='what to paint, such as "red heart, noto style"')
    generate.add_argument("--out", type=Path, default=Path("picture.png"), help="file to write (%(default)s)")
    generate.add_argument("--seed", type=int, default=0, help="another seed, another picture (%(default)s)")
    generate.add_argument("--grid", type=int, default=1, metavar="N", help="paint N pictures on one sheet")
    generate.add_argument("--steps", type=int, default=20, help="denoising steps (%(default)s)")
    generate.add_argument("--guidance", type=float, default=3.0, help="how closely to follow the caption (%(default)s)")
    generate.add_argument("--sampler", default="dpmpp_2m", help="dpmpp_2m or ddim (%(default)s)")
    generate.add_argument("--model", default="emoji", help="a model that ships, or a folder (%(default)s)")
    generate.set_defaults(run=_generate)
    return parser


def _generate(given: argparse.Namespace) -> None:
    if not given.caption.strip():
        raise ValueError('the caption is empty; say what to paint, such as "red heart, noto style"')
    _check_writable(given.out)
    from diffusionbook.data import image_grid, pick_device
    from diffusionbook.stable_diffusion import StableDiffusion

    painter = StableDiffusion.from_pretrained(given.model).to(pick_device())
    pictures = painter(given.caption, n=given.grid, steps=given.steps, guidance=given.guidance,
                       sampler=given.sampler, seed=given.seed)
    image_grid(pictures, columns=max(1, round(len(pictures) ** 0.5))).save(given.out)
    print(given.out)


def _check_writable(path: Path) -> None:
    """Find out before the work, not after it, whether the picture can be saved."""
    from PIL import Image

    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path} doesn't end in a kind of picture; call it {path.stem}.png")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise OSError(f"can't write to {path} ({error.strerror or error}); choose another place with --out") from error


if __name__ == "__main__":
    sys.exit(main())
