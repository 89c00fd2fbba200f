"""CLIP's towers beside transformers' with the same weights, and its tokenizer beside open_clip's, in interleaved pairs.

    python benchmarks/text_and_clip.py            # on the CPU, or on a GPU where there is one
    python benchmarks/text_and_clip.py --smoke    # seconds: does everything still run?

Prints Markdown tables. A ratio below 1 means that ours is faster.
"""
import argparse
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from timing import in_turns, row, setting

from diffusionbook.clip import CLIP, CLIPConfig
from diffusionbook.data import emoji
from diffusionbook.text import clip_tokenizer

with warnings.catch_warnings():  # some of its parts warn about optional packages while they load
    warnings.simplefilter("ignore")
    import transformers

ODD = ["crème brûlée &amp; café", "猫の顔 と 犬 😀", "don't   SHOUT!!! 24/7", "привет, мир"]  # what has to be repaired


def configs(cuda: bool, smoke: bool) -> dict[str, CLIPConfig]:
    """The miniature and the public CLIP, with a sixth of its layers on a CPU so that the table takes minutes."""
    emoji_sized, large = CLIPConfig.preset("emoji"), CLIPConfig.preset("vit-l-14")
    if smoke:
        return {"emoji": emoji_sized}
    if cuda:
        return {"emoji": emoji_sized, "vit-l-14": large}
    return {"emoji": emoji_sized, "vit-l-14, a sixth of the layers": replace(
        large, text=replace(large.text, layers=2), vision=replace(large.vision, layers=4))}


def towers(config: CLIPConfig, batch: int, device: torch.device) -> dict[str, tuple[Callable, Callable]]:
    """For each piece of work two functions that do it, ours first; their answers are compared once."""
    torch.manual_seed(0)
    ours = CLIP(config).to(device).eval()
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**config.to_config())).to(device).eval()
    theirs.load_state_dict(ours.state_dict())
    size, length, end = config.vision.image_size, config.text.context_length, config.text.eos_id
    images = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    pixels = ours.pixels(images)
    ids = torch.randint(1, end - 1, (batch, length), device=device)
    long, short = ids.clone(), ids.clone()
    long[:, -1], short[:, length // 4:] = end, end

    def vectors(output):
        return output if isinstance(output, torch.Tensor) else output.pooler_output

    work = {
        "images": (lambda: ours.encode_image(images), lambda: vectors(theirs.get_image_features(pixel_values=pixels))),
        "texts that fill the row": (lambda: ours.encode_text(long),
                                    lambda: vectors(theirs.get_text_features(input_ids=long))),
        "texts that fill a quarter": (lambda: ours.encode_text(short),
                                      lambda: vectors(theirs.get_text_features(input_ids=short))),
    }
    for first, second in work.values():
        torch.testing.assert_close(first(), second(), rtol=1e-3, atol=1e-3)
    return work


def open_clip_tokenizer():
    """A new one of open_clip's Python tokenizers, without the rest of the package, which wants torchvision."""
    spec = importlib.util.find_spec("open_clip")
    file = Path(spec.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the miniature alone and few pairs")
    parser.add_argument("--pairs", type=int, default=15, help="timed pairs per row (default 15)")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda, pairs = device.type == "cuda", 2 if options.smoke else options.pairs
    print(setting(transformers, pairs, cuda=cuda))
    print("| tower | ours, ms | transformers, ms | ratio |\n|---|---|---|---|")
    with torch.no_grad():
        for name, config in configs(cuda, options.smoke).items():
            batch = 256 if cuda else 4 if options.smoke or name != "emoji" else 64
            for work, functions in towers(config, batch, device).items():
                for function in functions:  # warm up; the comparison was the first call
                    function()
                print(row(in_turns(functions, pairs, cuda=cuda), f"{name}, {batch} {work}"), flush=True)
    captions = emoji("train").captions[:: 20 if options.smoke else 1]
    odd = ODD * (len(captions) // 8)
    print("\n| tokenizing | ours, ms | open_clip, ms | ratio |\n|---|---|---|---|")
    for name, texts in [(f"{len(captions)} captions", captions), (f"{len(odd)} texts to repair", odd)]:
        for state in ("words seen before", "first time"):
            makers = clip_tokenizer, open_clip_tokenizer
            if state == "words seen before":
                tokenizers = [make() for make in makers]
                assert torch.equal(*(tokenizer(texts) for tokenizer in tokenizers))
                times = in_turns([partial(tokenizer, texts) for tokenizer in tokenizers], pairs)
            else:  # new ones each time, made before the clock starts
                rounds = min(pairs, 5)
                shelves = [[make() for _ in range(rounds)] for make in makers]
                times = in_turns([lambda shelf=shelf, texts=texts: shelf.pop()(texts) for shelf in shelves], rounds)
            print(row(times, f"{name}, {state}"), flush=True)


if __name__ == "__main__":
    main()
