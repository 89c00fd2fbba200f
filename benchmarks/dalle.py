"""DALL·E's transformer with its memory, without it, and transformers' GPT-2 with the same weights, in turns.

    python benchmarks/dalle.py            # on the CPU, or on a GPU where there is one
    python benchmarks/dalle.py --smoke    # seconds: does everything still run?

Prints a Markdown table of milliseconds for each code. A ratio below 1 means that ours with its memory is faster.
"""
import argparse
import statistics
import warnings

import torch
from timing import in_turns, ratio

from diffusionbook.dalle import DalleConfig, DalleTransformer, sample_codes, to_gpt2
from diffusionbook.data import pick_device

with warnings.catch_warnings():  # some of its parts warn about optional packages while they load
    warnings.simplefilter("ignore")
    from transformers import GPT2Config, GPT2LMHeadModel


@torch.no_grad()
def main(batch: int, grid: int, rounds: int) -> None:
    device, c = pick_device(), DalleConfig.preset("emoji")
    torch.manual_seed(0)
    ours = DalleTransformer(c).to(device).eval()
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.text_vocab + c.codes, n_positions=c.text_length + c.places, n_embd=c.width, n_layer=c.layers,
        n_head=c.heads, bos_token_id=None, eos_token_id=None)).to(device).eval()
    theirs.load_state_dict(to_gpt2(ours.state_dict()))
    ids = torch.randint(c.text_vocab, (batch, c.text_length), device=device)
    count = grid**2
    start = torch.randint(c.codes, (batch, c.places - count), device=device)
    forbidden = list(range(c.text_vocab))

    def remembering() -> torch.Tensor:
        return sample_codes(ours, ids, start=start, top_k=1, progress=False)

    def forgetful() -> torch.Tensor:
        codes = start
        for _ in range(count):
            states, _ = ours.read(ours.tokens(ids, codes))
            codes = torch.cat([codes, ours.code_logits(states[:, -1]).argmax(1, keepdim=True)], dim=1)
        return codes

    def gpt2() -> torch.Tensor:
        row = ours.tokens(ids, start)
        written = theirs.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=count, do_sample=False,
                                  suppress_tokens=forbidden, pad_token_id=0)
        return written[:, c.text_length :] - c.text_vocab

    ways = {"ours": remembering, "ours without its memory": forgetful, "transformers' generate": gpt2}
    written = [way() for way in ways.values()]  # also warms up
    assert all(torch.equal(written[0], other) for other in written[1:])
    times = in_turns(list(ways.values()), rounds, cuda=device.type == "cuda")
    print(f"The last {count} of {c.places} codes of {batch} pictures on {device.type}, {rounds} rounds.\n")
    print("| | ms for each code | ratio |\n|---|---|---|")
    for name, own in zip(ways, times, strict=True):
        print(f"| {name} | {statistics.median(own) / count:.1f} | {ratio(times[0], own):.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    main(given.batch, 2 if given.smoke else 8, 2 if given.smoke else given.rounds)
