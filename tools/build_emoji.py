"""Build `diffusionbook/data/emoji.parquet`: captioned emoji in three styles, 64×64, on white.

    python tools/build_emoji.py [--packages FOLDER]

The pictures come from three npm packages and the names from a fourth, each at a fixed version and checked
against its SHA-256. FOLDER holds their .tgz files; without it, `npm pack` fetches them. The result is the same
to the byte on every run with the same Pillow and pyarrow.
"""

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

PACKAGES = {
    "noto": (
        "emoji-datasource-google", "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "twemoji": (
        "emoji-datasource-twitter", "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    "3d": (
        "@lobehub/fluent-emoji-3d", "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    "names": (
        "emojibase-data", "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
}
PICTURES = {"noto": "package/img/google/64/", "twemoji": "package/img/twitter/64/", "3d": "package/assets/"}
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
SIZE = 64
HELD_OUT = 300  # pictures in each of validation, object_style and tone_style
WITHOUT_STYLE = 0.2  # the share of training captions that leave the style out
LOOK_ALIKE = 4.0  # root-mean-square difference, in grey levels of 255, under which two pictures count as the same
IN_THE_BOOK = {"red heart", "pizza", "grinning face", "cat face"}  # running examples, never held out
# Microsoft's licence doesn't cover these pictures of the 3D set: they show trademarks, and the flags aren't its own.
NOT_FREE_IN_3D = ("flag: ", "technologist", "man technologist", "woman technologist", "video game", "paperclip")
COLUMNS = ("image", "caption", "name", "tone", "style", "gender", "group", "subgroup", "tags", "hexcode", "split")
OUT = Path(__file__).parent.parent / "diffusionbook" / "data"


def open_package(folder: Path, package: str, version: str, sha256: str) -> tarfile.TarFile:
    """Open an npm package's tarball in `folder`, fetching it with `npm pack` if it isn't there."""
    path = folder / f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=folder, check=True)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{path.name}: SHA-256 is {found}, expected {sha256}; delete it and fetch it again")
    return tarfile.open(path)


def read_pictures(package: tarfile.TarFile, prefix: str) -> dict[str, np.ndarray]:
    """Read every picture as (64, 64, 3) uint8 on white, by its code points (without the FE0F variation mark)."""
    pictures = {}
    for member in package:
        if member.name.startswith(prefix) and member.name.endswith((".png", ".webp")):
            code = Path(member.name).stem.upper().replace("-FE0F", "")
            with Image.open(package.extractfile(member)) as image:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image).convert("RGB")
                if image.size != (SIZE, SIZE):
                    image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            pictures[code] = np.asarray(image)
    return pictures


def read_names(package: tarfile.TarFile) -> list[dict]:
    """List every emoji with its name, skin tone, gender and group, from Unicode CLDR by way of emojibase."""
    read = lambda path: json.load(package.extractfile(path))  # noqa: E731
    emoji, messages = read("package/en/data.json"), read("package/en/messages.json")
    groups = {g["order"]: g["message"] for g in messages["groups"]}
    subgroups = {g["order"]: g["message"] for g in messages["subgroups"]}
    rows = []
    for base in emoji:
        if base.get("group") not in groups or groups[base["group"]] == "components":
            continue
        for one in [base, *base.get("skins", [])]:
            tone = one.get("tone", [])
            tone = [tone] if isinstance(tone, int) else tone
            rows.append({
                "name": base["label"],
                "tone": " and ".join(dict.fromkeys(TONES[i - 1] for i in tone)) or None,
                "gender": gender(base),
                "group": groups[base["group"]],
                "subgroup": subgroups[base["subgroup"]],
                "tags": base.get("tags", []),
                "hexcode": one["hexcode"],
                "order": one["order"],
            })
    return rows


def gender(base: dict) -> str | None:
    """The gender that a name states: "woman", "man", "person" or None."""
    words = set(base["label"].replace(":", " ").replace(",", " ").split())
    if base.get("gender") == 0 or words & {"woman", "women", "girl"} and not words & {"man", "men", "boy"}:
        return "woman"
    if base.get("gender") == 1 or words & {"man", "men", "boy"} and not words & {"woman", "women", "girl"}:
        return "man"
    return "person" if words & {"person", "people", "adult", "child"} else None


def look_alikes(pictures: np.ndarray) -> np.ndarray:
    """Mark each of the (N, 64, 64, 3) pictures that has a near twin among the others."""
    flat = pictures.reshape(len(pictures), -1).astype(np.float32)
    squares = (flat**2).sum(1)
    marked = np.zeros(len(flat), bool)
    for start in range(0, len(flat), 512):
        rows = slice(start, start + 512)
        distance = squares[rows, None] + squares[None] - 2 * flat[rows] @ flat.T
        distance[np.arange(len(distance)), np.arange(len(flat))[rows]] = np.inf
        marked[rows] = distance.min(1) < LOOK_ALIKE**2 * flat.shape[1]
    return marked


def lot(*key: str) -> float:
    """A number in [0, 1) drawn by hashing, so that it depends on nothing but the key."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, key)).encode()).digest()[:6], "big") / 2**48


def split(rows: list[dict], twin: np.ndarray) -> None:
    """Give each row its split. Every part of a held-out combination, and every pair of parts, stays in training."""
    styles_of = {}
    for row in rows:
        styles_of.setdefault(row["name"], set()).add(row["style"])
    tones = {row["name"] for row in rows if row["tone"]}
    one_tone = set(TONES)

    def take(kind: str, suitable, limit: dict[str, int]) -> None:
        taken, used = Counter(), set()
        for row in sorted(rows, key=lambda r: lot(kind, r["hexcode"], r["style"])):
            bin_ = row["style"]
            if row["split"] == "train" and row["name"] not in used and taken[bin_] < limit[bin_] and suitable(row):
                row["split"] = kind
                taken[bin_] += 1
                used.add(row["name"])

    clear = [not t for t in twin]
    for row, is_clear in zip(rows, clear, strict=True):
        row["split"], row["clear"] = "train", is_clear and row["name"] not in IN_THE_BOOK
    third = dict.fromkeys(PICTURES, HELD_OUT // 3)
    held = lambda: {r["name"] for r in rows if r["split"] != "train"}  # noqa: E731
    take("object_style", lambda r: r["clear"] and r["name"] not in tones and len(styles_of[r["name"]]) == 3
         and r["group"] not in ("people & body", "flags"), third)
    take("tone_style", lambda r: r["clear"] and r["tone"] in one_tone and len(styles_of[r["name"]]) == 3, third)
    before = held()
    take("validation", lambda r: r["clear"] and r["name"] not in before and len(styles_of[r["name"]]) > 1, third)
    for row in rows:
        del row["clear"]


def is_free(row: dict) -> bool:
    """Whether the picture may be shipped under its set's licence."""
    return row["style"] != "3d" or not row["name"].startswith(NOT_FREE_IN_3D)


def caption(row: dict) -> str:
    """Put a row into words: `<name>[, <tone> skin tone][, <style> style]`."""
    tone = f", {row['tone']} skin tone" if row["tone"] else ""
    silent = row["split"] == "train" and lot("style", row["hexcode"], row["style"]) < WITHOUT_STYLE
    return row["name"] + tone + ("" if silent else f", {row['style']} style")


def webp(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", lossless=True, quality=90, method=5)
    return buffer.getvalue()


def write_table(rows: list[dict], target: Path) -> None:
    """Write the rows as Parquet; the metadata tells the package `datasets` that the first column holds pictures."""
    text = pa.string()
    types = dict.fromkeys(COLUMNS, text) | {
        "image": pa.struct([("bytes", pa.binary()), ("path", text)]),
        "tags": pa.list_(text),
    }
    features = {column: {"dtype": "string", "_type": "Value"} for column in COLUMNS}
    features |= {"image": {"_type": "Image"}, "tags": [{"dtype": "string", "_type": "Value"}]}
    schema = pa.schema(list(types.items()), metadata={"huggingface": json.dumps({"info": {"features": features}})})
    table = pa.Table.from_pylist([{column: row[column] for column in COLUMNS} for row in rows], schema=schema)
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, target, compression="none", row_group_size=1000)


def build(folder: Path) -> None:
    packages = {key: open_package(folder, *where) for key, where in PACKAGES.items()}
    names = read_names(packages["names"])
    rows, pictures, twins = [], [], []
    for style, prefix in PICTURES.items():
        found = read_pictures(packages[style], prefix)
        here = [(n, found[code]) for n in names if (code := n["hexcode"].replace("-FE0F", "")) in found]
        rows += [{**n, "style": style} for n, _ in here]
        pictures += [p for _, p in here]
        twins.append(look_alikes(np.stack([p for _, p in here])))
    split(rows, np.concatenate(twins))
    # Left out only now, so that leaving a picture out moves no other one into another split.
    free = [is_free(row) for row in rows]
    rows, pictures = list(compress(rows, free)), list(compress(pictures, free))
    with ThreadPoolExecutor() as pool:
        files = list(pool.map(webp, pictures))
    for row, file in zip(rows, files, strict=True):
        row["caption"] = caption(row)
        row["image"] = {"bytes": file, "path": None}
    rows.sort(key=lambda row: (row["order"], row["style"]))
    target = OUT / "emoji.parquet"
    write_table(rows, target)
    card = {
        "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
        "pictures": len(rows),
        "names": len({r["name"] for r in rows}),
        "styles": dict(sorted(Counter(r["style"] for r in rows).items())),
        "splits": dict(sorted(Counter(r["split"] for r in rows).items())),
        "sources": {key: f"{package}@{version}" for key, (package, version, _) in PACKAGES.items()},
    }
    (OUT / "emoji.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2), f"{target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, help="folder with the four .tgz files")
    given = parser.parse_args().packages
    if given:
        build(given.resolve())
    else:
        with tempfile.TemporaryDirectory() as temporary:
            build(Path(temporary))
