"""The command line: `diffusionbook generate "red heart, noto style" --out heart.png`, `diffusionbook train RECIPE`."""

import argparse
import inspect
import io
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path

#: The systems that ship as miniatures: what --model calls them → module and class. A folder is a Stable Diffusion.
SYSTEMS = {
    "emoji": ("stable_diffusion", "StableDiffusion"),
    "glide": ("glide", "Glide"),
    "dalle": ("dalle", "DallE"),
    "dalle2": ("dalle2", "DallE2"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Exit code: 0, 2 with one sentence on stderr for an impossible wish, 130 if interrupted."""
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"diffusionbook: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffusionbook: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="diffusionbook", description="Paint pictures from words, and train what paints them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="paint a picture for a caption")
    generate.add_argument("caption", help='what to paint, such as "red heart, noto style"')
    generate.add_argument("--out", type=Path, default=Path("picture.png"), help="file to write (%(default)s)")
    generate.add_argument("--seed", type=int, default=0, help="another seed, another picture (%(default)s)")
    generate.add_argument("--grid", type=int, default=1, metavar="N", help="paint N pictures on one sheet")
    generate.add_argument("--steps", type=int, help="denoising steps (the model's own number)")
    generate.add_argument("--guidance", type=float, help="how closely to follow the caption (the model's own strength)")
    generate.add_argument("--sampler", help="such as dpmpp_2m, ddim or euler (the model's own)")
    generate.add_argument("--model", default="emoji", help=f"{', '.join(SYSTEMS)}, or a folder (%(default)s)")
    generate.set_defaults(run=_generate)
    train = commands.add_parser("train", help="train what a recipe describes, or go on where it stopped")
    train.add_argument("recipe", type=Path, help="a TOML file such as recipes/digits.toml")
    train.add_argument("--folder", type=Path, help="where log, state and weights go (runs/NAME OF THE RECIPE)")
    train.add_argument("--steps", type=int, help="another number of steps than the recipe's")
    train.add_argument("--device", help='"cpu", "cuda", "cuda:1" or "mps" (the best there is)')
    train.add_argument("--ship", metavar="NAME", help="also put the weights, as float16, among those that ship")
    train.set_defaults(run=_train)
    return parser


def _generate(given: argparse.Namespace) -> None:
    if not given.caption.strip():
        raise ValueError('the caption is empty; say what to paint, such as "red heart, noto style"')
    if any("\ud800" <= letter <= "\udfff" for letter in given.caption):  # how Python keeps bytes that are no letters
        raise ValueError("the caption holds bytes that are no text in UTF-8; type it in a terminal that speaks UTF-8")
    kind = _check_writable(given.out)
    from diffusionbook.checkpoints import write_atomically
    from diffusionbook.data import image_grid, pick_device

    painter = _painter(given.model).to(pick_device())
    wishes = {name: getattr(given, name) for name in ("steps", "guidance", "sampler")}
    wishes = {name: wish for name, wish in wishes.items() if wish is not None}
    if unknown := wishes.keys() - inspect.signature(type(painter).__call__).parameters.keys():
        raise ValueError(f"the model {given.model} has no --{', --'.join(sorted(unknown))}; leave it out")
    pictures = painter(given.caption, n=given.grid, seed=given.seed, **wishes)
    # a picture alone keeps what it says about its making; a sheet of several says nothing
    sheet = pictures[0] if len(pictures) == 1 else image_grid(pictures, columns=round(len(pictures) ** 0.5))
    write_atomically(given.out, lambda path: sheet.save(path, format=kind))
    print(given.out)


def _painter(model: str):
    """The pipeline of a system that ships, or of a folder or file."""
    if model not in SYSTEMS and not Path(model).exists() and "/" not in model:
        raise ValueError(f"there is no model named {model!r}; choose {', '.join(SYSTEMS)}, or give the path of a folder")
    module, name = SYSTEMS[model if model in SYSTEMS else _system(Path(model))]
    pipeline = getattr(import_module(f"diffusionbook.{module}"), name)
    return pipeline.from_pretrained("emoji" if model in SYSTEMS else model)


def _system(folder: Path) -> str:
    """Which system a folder was written by, told by the files that only that one has; else Stable Diffusion."""
    index = folder / "model_index.json"
    if "UnCLIPPipeline" in (index.read_text(encoding="utf8") if index.is_file() else "") or [*folder.glob("prior-ckpt*")]:
        return "dalle2"
    if (folder / "glide.json").is_file() or (folder / "base.pt").is_file():
        return "glide"
    return "dalle" if (folder / "dalle").is_dir() and not index.is_file() else "emoji"


def _train(given: argparse.Namespace) -> None:
    import torch

    from diffusionbook.training import load_denoiser, run_recipe, save_denoiser

    if given.ship is not None and (Path(given.ship).name != given.ship or given.ship == ".."):
        raise ValueError(f"--ship needs a plain name for the weights, got {given.ship!r}")
    folder = given.folder or Path("runs") / given.recipe.stem
    run_recipe(given.recipe, folder=folder, device=_device(given.device), steps=given.steps)
    if int(os.environ.get("RANK", 0)):
        return  # only the first of several processes goes on
    if given.ship:
        denoise, classes = load_denoiser(folder)
        folder = Path(__file__).parent / "weights" / given.ship
        save_denoiser(folder, denoise, classes=classes, dtype=torch.float16)
    print(folder)


def _device(wish: str | None):
    """The device to train on: the one wished for, the best there is, or one for each process of `accelerate launch`."""
    import torch

    from diffusionbook.data import pick_device

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import PartialState

        return PartialState(cpu=wish == "cpu").device
    try:
        device = torch.device(wish) if wish else pick_device()
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {wish!r} here; leave --device out to take the best there is") from error
    return device


def _check_writable(path: Path) -> str:
    """Find out before the work, not after it, whether the picture can be saved, and as what kind of file."""
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), format=kind)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path} doesn't end in a kind of picture that can be saved; call it {path.stem}.png") from error
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise OSError(f"can't write to {path} ({error.strerror or error}); choose another place with --out") from error
    return kind


if __name__ == "__main__":
    sys.exit(main())
