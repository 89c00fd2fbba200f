"""Train the miniature CLIP on the emoji: a text and a vision transformer that put captions and pictures in one space.

    python recipes/emoji_clip.py [--folder runs/emoji_clip] [--steps 2800] [--batch 64] [--hard]
    python recipes/emoji_clip.py --look --steps 1200

First the tokenizer learns which letters go together in captions. Then most steps read only a part of each picture's
patches, which costs a third (Li et al. 2023, "FLIP"); the last seventh reads them all. Resumable: the same command goes
on where it stopped. At the end the weights go to diffusionbook/weights/emoji/clip, the tokenizer to emoji/tokenizer
too. A caption without its style is true of other pictures in the batch too. With `--hard` these count as wrong (false
negatives), to see what that costs; nothing is shipped then.

An object comes in two or three styles, and a tower that recognises it knows by heart in which. With `--look` the
picture tower of the CLIP that ships learns to look closer, while the text tower stays as it is (Zhai et al. 2022,
"LiT"), and with it all that reads its captions. Beside its caption each picture is asked for its group and its style,
by the shares of their captions, as in zero-shot classification; and once more for the style where it is mixed with
pictures of other things in that style, block by block.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from shared import SHIPPED, UNSEEN, options

from diffusionbook.clip import CLIP, CLIPConfig, contrastive_loss, gather_rows, retrieval, zero_shot
from diffusionbook.data import STYLES, compose_caption, emoji, pick_device
from diffusionbook.text import Tokenizer, train_bpe
from diffusionbook.training import balanced_weights, train

KEPT = 24  # patches of 64 that are read in the first part; blank ones are the first to go
WITHOUT_STYLE = 0.2  # captions that leave the style out, so that "pizza" alone means any pizza
KEYHOLE = 16  # patches of 64 that are read of mixed pictures
BLOCK = 16  # pixels on a side of the blocks that are mixed
GROUP, WHOLE, MIXED = 0.5, 0.5, 0.5  # how much it counts which group it is, which style, and which where it is mixed


class Neighbours:
    """For each picture the others that share its key, to draw one from: the hard negatives of a batch."""

    def __init__(self, keys: list[str]):
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self.order = torch.tensor(order)
        self.place = torch.empty_like(self.order)
        self.place[self.order] = torch.arange(len(keys))  # where a picture stands among the sorted
        _, count = torch.unique_consecutive(torch.tensor([sorted(set(keys)).index(keys[i]) for i in order]),
                                            return_counts=True)
        first = (count.cumsum(0) - count).repeat_interleave(count)
        self.first, self.count = first[self.place], count.repeat_interleave(count)[self.place]

    def draw(self, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Another picture with the same key for each of `index`; the same picture where it is the only one."""
        first, count = self.first[index], self.count[index]
        step = 1 + (torch.rand(len(index), generator=generator) * (count - 1)).long()
        return self.order[first + (self.place[index] - first + step) % count]


def vary(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, scale, shift and tint pictures (B, 3, 64, 64) a little, each in its own way; never mirror them."""
    count = len(images)

    def between(low: float, high: float, *shape: int) -> torch.Tensor:
        return (low + (high - low) * torch.rand(count, *shape, generator=generator)).to(images.device)

    angle, scale, shift = between(-0.15, 0.15), between(0.85, 1.15), between(-0.12, 0.12, 2)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2) * scale.view(-1, 1, 1)
    grid = F.affine_grid(torch.cat([turn, shift[:, :, None]], 2), list(images.shape), align_corners=False)
    moved = F.grid_sample(images - 1, grid, align_corners=False)  # what comes in from outside is white
    return (moved * between(0.94, 1.06, 3, 1, 1) + 1).clamp(-1, 1)


def choose_patches(images: torch.Tensor, patch: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """The numbers of `count` patches for each picture at random, blank ones last: (B, count)."""
    contrast = (F.max_pool2d(images, patch) + F.max_pool2d(-images, patch)).amax(1).flatten(1)  # (B, patches)
    chance = torch.rand(contrast.shape, generator=generator).to(images.device)
    return (chance + (contrast > 0.1)).topk(count, dim=1).indices


def mix(four: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures (B, 3, H, W) whose blocks come from one of four others each, (4, B, 3, H, W), at random."""
    _, count, _, height, width = four.shape
    pick = torch.randint(4, (count, 1, height // BLOCK, width // BLOCK), generator=generator).to(four.device)
    pick = pick.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3).expand(-1, 3, -1, -1)
    return four.gather(0, pick[None])[0]


class Question:
    """Which of some classes does a picture show? Shares of captions add up: more captions, more pictures."""

    @torch.no_grad()
    def __init__(self, clip: CLIP, classes: dict[str, list[str]], answers: list[str]):
        captions = [caption for described in classes.values() for caption in described]
        ids = clip.tokenizer(captions).to(clip.device)
        self.text = F.normalize(torch.cat([clip.encode_text(part) for part in ids.split(256)]), dim=1)
        self.scale = clip.logit_scale.exp()
        self.counts = [len(described) for described in classes.values()]
        labels = list(classes)
        self.answers = torch.tensor([labels.index(answer) for answer in answers], device=clip.device)

    def loss(self, image: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the right classes of pictures number `index`, of which `image` (B, D) are embeddings."""
        logits = self.scale * F.normalize(image, dim=1) @ self.text.T
        shares = [part.logsumexp(1) for part in logits.split(self.counts, dim=1)]
        return F.cross_entropy(torch.stack(shares, dim=1), self.answers[index])


class Exam:
    """The pictures of unseen splits, their captions, and how well a CLIP brings them together."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device, unseen: tuple[str, ...] = UNSEEN):
        splits = [emoji(split) for split in unseen]
        self.attributes = [a for split in splits for a in split.attributes]
        self.images = torch.cat([split.images() for split in splits]).to(device)
        self.ids = tokenizer([caption for split in splits for caption in split.captions]).to(device)
        known = emoji("train").attributes
        kinds = {(a["name"], a["tone"], a["group"]) for a in known}
        captions = [(compose_caption(name, tone=tone, style=style), style, group)
                    for name, tone, group in sorted(kinds, key=str) for style in STYLES]
        self.classes = {"style": {style: [c for c, s, _ in captions if s == style] for style in STYLES},
                        "group": {group: [c for c, _, g in captions if g == group] for _, _, group in captions}}

    @torch.no_grad()
    def embeddings(self, clip: CLIP) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all unseen pictures and of their captions, both (N, D) and of length 1."""
        return (F.normalize(torch.cat([clip.encode_image(part) for part in self.images.split(128)]), dim=1),
                F.normalize(torch.cat([clip.encode_text(part) for part in self.ids.split(256)]), dim=1))

    def retrieval(self, clip: CLIP) -> dict[str, float]:
        """R@1 and R@5 both ways among 500 distinct captions, the mean over ten choices of them."""
        image, text = self.embeddings(clip)
        chosen = [torch.randperm(len(image), generator=torch.Generator().manual_seed(seed))[:500] for seed in range(10)]
        tables = [retrieval(image[part], text[part]) for part in chosen]
        return {key: sum(table[key] for table in tables) / len(tables) for key in tables[0]}

    def attributes_found(self, clip: CLIP) -> dict[str, float]:
        """How often the most similar of all unseen captions has the picture's name, tone and style, and by chance."""
        image, text = self.embeddings(clip)
        best = (image @ text.T).argmax(1).tolist()
        found = {}
        for key in ("name", "tone", "style"):
            values = [a[key] for a in self.attributes]
            found[key] = sum(values[i] == values[j] for i, j in enumerate(best)) / len(best)
            found[f"{key} by chance"] = sum(values.count(value) for value in values) / len(values) ** 2
        return found

    def zero_shot(self, clip: CLIP) -> dict[str, float]:
        """How often the style and the group of an unseen picture are named, from all names, tones and styles."""
        shares = {}
        for key, classes in self.classes.items():
            named = zero_shot(clip, self.images, classes).argmax(1).tolist()
            labels = list(classes)
            shares[key] = sum(labels[i] == a[key] for i, a in zip(named, self.attributes, strict=True)) / len(named)
        return shares


def main(folder: Path, steps: int, batch: int, ship: Path, hard: bool, look: bool) -> None:
    device = pick_device()
    data = emoji("train")
    images = data.images().to(device)
    names = [a["name"] for a in data.attributes]
    if hard:
        folder = folder / "hard"  # beside what the usual training left
    if look:
        folder = folder / "look"  # beside what the first training left, from which it must not go on
        clip = CLIP.from_pretrained(SHIPPED / "clip").float().to(device)
        clip.requires_grad_(False)
        for part in (clip.vision_model, clip.visual_projection):
            part.requires_grad_(True)
    else:
        torch.manual_seed(0)
        clip = CLIP(CLIPConfig.preset("emoji")).to(device)
        text = clip.config.text
        clip.tokenizer = train_bpe(data.captions, text.vocab_size, pad="eos", context_length=text.context_length)
    tokenizer = clip.tokenizer
    exam = Exam(tokenizer, device)
    captions = [compose_caption(a["name"], tone=a["tone"], style=style) for a in data.attributes
                for style in (a["style"], None)]
    ids = tokenizer(captions).unflatten(0, (-1, 2)).to(device)  # (pictures, with and without style, 32)
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    number = torch.tensor([numbers[caption] for caption in captions], device=device).view(-1, 2)
    same_name, same_subgroup = Neighbours(names), Neighbours([a["subgroup"] for a in data.attributes])
    if look:
        same_style = Neighbours([a["style"] for a in data.attributes])
        style, group = (Question(clip, exam.classes[key], [a[key] for a in data.attributes])
                        for key in ("style", "group"))

    def asked(image: torch.Tensor, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Group and style of pictures number `index` as `image` (B, D) tells them, and the style of mixed pictures."""
        chosen = index.cpu()
        four = [chosen, *(same_style.draw(chosen, generator) for _ in range(3))]
        mixed = mix(torch.stack([vary(images[part.to(device)], generator) for part in four]), generator)
        patches = choose_patches(mixed, clip.config.vision.patch, KEYHOLE, generator)
        return (GROUP * group.loss(image, index) + WHOLE * style.loss(image, index)
                + MIXED * style.loss(clip.encode_image(mixed, patches), index))

    def loss(kept: int):
        def contrast(clip: CLIP, index: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
            index = index.cpu()
            index = torch.cat([index, same_name.draw(index, generator), same_subgroup.draw(index, generator)])
            bare = (torch.rand(len(index), generator=generator) < WITHOUT_STYLE).long()  # captions without a style
            index, bare = index.to(device), bare.to(device)
            seen = vary(images[index], generator)
            patches = choose_patches(seen, clip.config.vision.patch, kept, generator) if kept else None
            image, text = clip.encode_image(seen, patches), clip.encode_text(ids[index, bare])
            shown, said = gather_rows(number[index]), gather_rows(number[index, bare])
            right = (shown[:, :, None] == said).any(1)  # text j is picture i's caption, with or without its style
            value = contrastive_loss(gather_rows(image), gather_rows(text), clip.logit_scale,
                                     right=None if hard else right)
            if look:
                value = value + asked(image, index, generator)
            return value, {"scale": clip.logit_scale.exp().item()}
        return contrast

    def learn(part: str, steps: int, lr: float, kept: int) -> None:
        train(clip, torch.arange(len(images)), loss(kept), weights=balanced_weights(names), batch=batch, steps=steps,
              lr=lr, weight_decay=0.1, ema=0.995, every=200, folder=folder / part,
              evaluate=lambda: exam.retrieval(clip) | exam.zero_shot(clip)).swap(clip)

    whole = -(-steps // 7)
    learn("part", steps - whole, 5e-4 if look else 1e-3, KEPT)
    learn("whole", whole, 1e-4 if look else 2e-4, 0)
    if not hard:
        clip.save_pretrained(ship / "clip", dtype=torch.float16)
        tokenizer.save_pretrained(ship / "tokenizer")
    for unseen in (UNSEEN, UNSEEN[1:]):
        exam = Exam(tokenizer, device, unseen)
        print(*unseen)
        for report in (exam.retrieval, exam.attributes_found, exam.zero_shot):
            print({key: round(share, 3) for key, share in report(clip).items()})


if __name__ == "__main__":
    main(**options(__file__, __doc__, steps=2800, batch=64, hard="let a caption without style count as wrong",
                   look="train only the picture tower of the CLIP that ships, to look closer"))
