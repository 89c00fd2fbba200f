"""Write the networks of the book's page "Paint" in the form in which it runs them in a browser.

    python tools/export_page.py _build/html/_static/paint/models

They are the miniature Stable Diffusion, and the miniature CLIP for the meter. Each becomes ONNX files: weights stored
as float16 and widened to float32 when they are loaded. What is not a network (vocabulary, schedule, shapes, the
meter's scale) goes to painter.json.
"""
import argparse
import io
import json
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from diffusionbook.clip import CLIP
from diffusionbook.data import emoji
from diffusionbook.stable_diffusion import StableDiffusion


class Calling(nn.Module):
    """A module whose forward pass is any function of it: what the exporter wants."""

    def __init__(self, network: nn.Module, call):
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *inputs):
        return self.call(self.network, *inputs)


def to_onnx(network: nn.Module, call, inputs: dict[str, torch.Tensor], output: str) -> onnx.ModelProto:
    """The ONNX graph of `call(network, *inputs)`, for any batch size."""
    buffer = io.BytesIO()
    axes = {name: {0: "batch"} for name in (*inputs, output)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing fixes Python's decisions about shapes, which are always the same here
        torch.onnx.export(Calling(network, call), tuple(inputs.values()), buffer, input_names=list(inputs),
                          output_names=[output], dynamic_axes=axes, opset_version=17, dynamo=False)
    return onnx.load_from_string(buffer.getvalue())


def store_as_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Halve the file: each large float32 tensor becomes float16 with a cast behind it."""
    casts = []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.size >= 64:
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), name + "_float16"))
            casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model


def scale(clip: CLIP, ids: torch.Tensor, images: torch.Tensor) -> dict[str, list[float]]:
    """How similar real pictures are to their own captions and to those of others: 101 percentiles of each."""
    other = torch.arange(len(ids)).roll(len(ids) // 2)
    pairs = {"own": clip.score(images, ids), "others": clip.score(images, ids[other])}
    return {name: np.percentile(values.numpy(), range(101)).round(4).tolist() for name, values in pairs.items()}


def export_meter(clip: CLIP, painter: StableDiffusion, folder: Path) -> dict:
    """Write the network that says how well a picture fits a caption; return its size and its scale."""
    real = emoji("validation")
    rows = torch.randperm(len(real), generator=torch.Generator().manual_seed(0)).tolist()
    ids, images = painter.tokenizer([real.captions[i] for i in rows]), real.images(rows)

    def similarity(net, image, ids):
        return torch.cosine_similarity(net.encode_image(image), net.text_states(ids)[1])

    graph = to_onnx(clip, similarity, {"image": images[:1], "ids": ids[:1]}, "similarity")
    path = folder / "clip.onnx"
    path.write_bytes(store_as_float16(graph).SerializeToString())
    return {"size": path.stat().st_size, **scale(clip, ids, images)}


def export(painter: StableDiffusion, clip: CLIP, folder: Path) -> None:
    """Write the painter's networks, the CLIP of the page's meter, and `painter.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    unet, encoder, tokenizer = painter.unet.config, painter.text_encoder.config, painter.tokenizer
    latent = (unet.in_channels, unet.sample_size, unet.sample_size)
    ids = torch.zeros(2, encoder.context_length, dtype=torch.int64)
    context = torch.zeros(2, encoder.context_length, encoder.width)
    networks = {
        "text_encoder": (painter.text_encoder, lambda net, ids: net(ids), {"ids": ids}, "context"),
        "unet": (painter.unet, lambda net, x, t, context: net(x, t, context),
                 {"x": torch.zeros(2, *latent), "t": torch.zeros(2), "context": context}, "answer"),
        "decoder": (painter.vae, lambda net, z: net.decode(z), {"z": torch.zeros(1, *latent)}, "image"),
    }
    sizes = {}
    for name, parts in networks.items():
        path = folder / f"{name}.onnx"
        path.write_bytes(store_as_float16(to_onnx(*parts)).SerializeToString())
        sizes[name] = path.stat().st_size
    t = torch.arange(painter.schedule.steps, dtype=torch.float64)
    facts = {
        "sizes": sizes, "latent": latent, "prediction": painter.prediction,
        "alpha": painter.schedule.alpha(t).tolist(), "sigma": painter.schedule.sigma(t).tolist(),
        "length": tokenizer.context_length, "pad": tokenizer.pad_id, "vocabulary": tokenizer.vocab,
        "merges": [" ".join(pair) for pair in tokenizer.merges], "meter": export_meter(clip, painter, folder),
    }
    (folder / "painter.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    export(StableDiffusion.from_pretrained("emoji"), CLIP.from_pretrained("emoji"), parser.parse_args().folder)
