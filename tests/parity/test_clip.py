"""Chapter 14 against transformers and open_clip: names, shapes, counts, embeddings and losses."""

import dataclasses
import importlib
import json
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from diffusionbook.clip import CLIP, CLIPConfig, VisionConfig, contrastive_loss
from diffusionbook.text import TextConfig, train_bpe

transformers = pytest.importorskip("transformers")

CLOSE = dict(rtol=1e-4, atol=1e-5)
TEXT = TextConfig(vocab_size=600, context_length=12, width=64, layers=2, heads=1, ff_width=96)
VISION = VisionConfig(image_size=16, patch=4, width=128, layers=3, heads=2, ff_width=80)
TINY = CLIPConfig(TEXT, VISION, 24)


def with_activation(name):
    return CLIPConfig(dataclasses.replace(TEXT, activation=name), dataclasses.replace(VISION, activation=name), 24)


def shaken(network):
    """Random weights everywhere, so that no part can hide."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network.eval()


def batch(pad, eos=599):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 598, (3, 12), generator=g)
    ids[:, 0] = 598
    for row, end in enumerate((4, 11, 7)):
        ids[row, end], ids[row, end + 1:] = 599, pad
    return torch.rand(3, 3, 16, 16, generator=g) * 2 - 1, ids


def reference(config, **text):
    saved = config.to_config()
    saved["text_config"] |= text
    return shaken(transformers.CLIPModel(transformers.CLIPConfig(**saved)))


def vectors(output):
    """transformers 5 wraps the embeddings."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("pad", [0, 599])
@pytest.mark.parametrize("eos", [599, 2])
def test_both_towers_equal_transformers(activation, pad, eos):
    config = with_activation(activation)
    theirs = reference(config, eos_token_id=eos)
    ours = CLIP(CLIPConfig.from_config(theirs.config.to_dict())).eval()
    assert ours.config.text.eos_id == eos and ours.config.text.activation == activation
    ours.load(theirs.state_dict())
    images, ids = batch(pad)
    with torch.no_grad():
        out = theirs(input_ids=ids, pixel_values=ours.pixels(images), return_loss=True)
        image, text = ours.encode_image(images), ours.encode_text(ids)
        torch.testing.assert_close(image, vectors(theirs.get_image_features(pixel_values=ours.pixels(images))), **CLOSE)
        torch.testing.assert_close(text, vectors(theirs.get_text_features(input_ids=ids)), **CLOSE)
        torch.testing.assert_close(ours.text_states(ids)[0], out.text_model_output.last_hidden_state, **CLOSE)
        torch.testing.assert_close(ours.vision_model(ours.pixels(images)), out.vision_model_output.last_hidden_state,
                                   **CLOSE)
        torch.testing.assert_close(contrastive_loss(image, text, ours.logit_scale), out.loss, **CLOSE)
        torch.testing.assert_close(ours.score(images, ids), (out.image_embeds * out.text_embeds).sum(1), **CLOSE)


@pytest.mark.parametrize("name", ["vit-l-14", "emoji"])
def test_presets_have_the_names_and_shapes_of_transformers(name):
    config = CLIPConfig.preset(name)
    with torch.device("meta"):
        theirs = transformers.CLIPModel(transformers.CLIPConfig(**config.to_config()))
        ours = CLIP(config)
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items() if "position_ids" not in key}
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == shapes
    assert ours.count_parameters() == sum(p.numel() for p in theirs.parameters())


def test_to_transformers_and_back(tmp_path):
    ours = shaken(CLIP(TINY))
    ours.tokenizer = train_bpe(["a red heart", "a pizza and a heart"], 520, context_length=12)
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "ours").eval()
    images, ids = batch(0)
    with torch.no_grad():
        torch.testing.assert_close(vectors(theirs.get_text_features(input_ids=ids)), ours.encode_text(ids), **CLOSE)
        torch.testing.assert_close(vectors(theirs.get_image_features(pixel_values=ours.pixels(images))),
                                   ours.encode_image(images), **CLOSE)
    words = transformers.CLIPTokenizer.from_pretrained(tmp_path / "ours")
    assert words("a red pizza")["input_ids"] == ours.tokenizer("a red pizza")[0].tolist()[:len(words("a red pizza")[0])]
    theirs.save_pretrained(tmp_path / "theirs")
    again = CLIP.from_pretrained(tmp_path / "theirs")
    assert again.config.text == TINY.text and again.config.projection == 24
    for key, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_old_transformers_files(tmp_path):
    ours = shaken(CLIP(TINY))
    state = ours.state_dict() | {f"{tower}_model.embeddings.position_ids": torch.arange(n)[None]
                                 for tower, n in (("text", 12), ("vision", 17))}
    config = TINY.to_config()
    config["text_config_dict"], config["vision_config_dict"] = config.pop("text_config"), config.pop("vision_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "pytorch_model.bin")
    again = CLIP.from_pretrained(tmp_path)
    assert again.config == TINY and torch.equal(again.text_projection.weight, ours.text_projection.weight)


@pytest.fixture(scope="module")
def open_clip():
    """open_clip's model file without the rest of the package, which wants torchvision."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip_torch is not installed (pip install --no-deps open_clip_torch)")
    package = types.ModuleType("open_clip")
    package.__path__ = list(spec.submodule_search_locations)
    misc = types.ModuleType("torchvision.ops.misc")
    misc.FrozenBatchNorm2d = torch.nn.Identity
    stubs = {"open_clip": package}
    if importlib.util.find_spec("torchvision") is None:
        stubs |= {name: types.ModuleType(name) for name in ("torchvision", "torchvision.ops")}
        stubs["torchvision.ops.misc"] = misc
    before = set(sys.modules)
    sys.modules.update(stubs)
    try:
        yield importlib.import_module("open_clip.model")
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("open_clip", "torchvision"):
                del sys.modules[name]


def open_clip_config(quick, vision=None, text=None):
    return {"embed_dim": 24, "quick_gelu": quick,
            "vision_cfg": {"image_size": 16, "layers": 3, "width": 128, "patch_size": 4, "mlp_ratio": 80 / 128}
            | (vision or {}),
            "text_cfg": {"context_length": 12, "vocab_size": 600, "width": 64, "heads": 1, "layers": 2,
                         "mlp_ratio": 96 / 64} | (text or {})}


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
def test_both_towers_equal_open_clip(open_clip, tmp_path, quick, kind):
    model = open_clip_config(quick, {"head_width": 32}, {"heads": 4})
    theirs = shaken(getattr(open_clip, kind)(**model))
    colours = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": colours}))
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    ours = CLIP.from_pretrained(tmp_path)
    assert (ours.config.text.heads, ours.config.vision.heads) == (4, 4)
    assert ours.config.vision.mean == (0.5, 0.4, 0.3) and ours.config.vision.std == (0.5, 0.6, 0.7)
    images, ids = batch(0)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(ours.pixels(images)), **CLOSE)
        torch.testing.assert_close(ours.encode_text(ids), theirs.encode_text(ids), **CLOSE)
        assert ours.logit_scale == theirs.logit_scale


@pytest.mark.parametrize("tower, option", [
    ("text", {"no_causal_mask": True}), ("text", {"pool_type": "last"}), ("text", {"norm_kwargs": {"eps": 1e-2}}),
    ("text", {"act_kwargs": {"approximate": "tanh"}}), ("vision", {"pool_type": "avg"}),
    ("vision", {"final_ln_after_pool": True}),
])
def test_what_tensors_do_not_tell_is_not_guessed(open_clip, tmp_path, tower, option):
    """Such a CLIP has the tensors of a plain one, and other answers."""
    towers = {"text": {"pool_type": "argmax"}, "vision": {"pool_type": "tok"}}  # said of one tower, not of the other
    towers[tower] = towers[tower] | option
    model = open_clip_config(False, **towers)
    state = open_clip.CLIP(**model).state_dict()
    assert state.keys() == open_clip.CLIP(**open_clip_config(False)).state_dict().keys()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    with pytest.raises(ValueError, match=f"open_clip's option {next(iter(option))}=.* is not supported"):
        CLIP.from_pretrained(tmp_path)


def test_what_was_saved_last_is_loaded(open_clip, tmp_path):
    model = open_clip_config(True)
    state = open_clip.CLIP(**model).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    clip = CLIP.from_pretrained(tmp_path)
    clip.visual_projection.weight.data.zero_()
    clip.save_pretrained(tmp_path)
    assert not CLIP.from_pretrained(tmp_path).visual_projection.weight.any()


@pytest.mark.parametrize("form", ["safetensors", "pt", "torchscript"])
def test_a_single_file_of_openai(open_clip, tmp_path, form):
    theirs = shaken(open_clip.CLIP(**open_clip_config(True)))
    state = {k: v for k, v in theirs.state_dict().items() if k != "attn_mask"}
    extra = {"input_resolution": torch.tensor(16), "context_length": torch.tensor(12), "vocab_size": torch.tensor(600)}
    path = tmp_path / ("clip.safetensors" if form == "safetensors" else "clip.pt")
    if form == "safetensors":
        save_file(state | extra, path)
    elif form == "pt":
        torch.save(state | extra, path)
    else:
        torch.jit.save(torch.jit.script(Nested(state | extra)), path)
    ours = CLIP.from_pretrained(path)
    assert dataclasses.replace(ours.config, logit_scale=TINY.logit_scale) == TINY
    images, ids = batch(0)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(ours.pixels(images)), **CLOSE)
        torch.testing.assert_close(ours.encode_text(ids), theirs.encode_text(ids), **CLOSE)


class Nested(torch.nn.Module):
    """A module with a given state dict, to be saved as TorchScript."""

    def __init__(self, state):
        super().__init__()
        for name in {key.split(".")[0] for key in state}:
            inner = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            if inner:
                self.add_module(name, Nested(inner))
            else:
                self.register_buffer(name, state[name].clone())

    def forward(self):
        return 0
