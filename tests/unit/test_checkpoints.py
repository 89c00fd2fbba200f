"""The appendix on checkpoints: what fits is loaded exactly, and everything else is refused by name."""

import json
import math
import os
import pickle
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffusionbook import checkpoints
from diffusionbook.checkpoints import (
    OLD_DIFFUSERS,
    OLD_TRANSFORMERS,
    OPENAI_TEXT,
    Model,
    all_or_nothing,
    check_keys,
    from_guided_diffusion,
    guided_diffusion_names,
    is_finite,
    locate,
    read_json,
    read_tensors,
    read_weights,
    rename,
    sha256,
    split_qkv,
    to_guided_diffusion,
    verify,
    write_atomically,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class SmallConfig:
    width: int = 3

    def to_config(self):
        return asdict(self)

    @classmethod
    def from_config(cls, config):
        return cls(**config)


class Small(Model):
    config_class = SmallConfig
    subfolder = "small"
    dialects = [(r"^old\.", "layer.")]

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(config.width, 2)

    def forward(self, x):
        return self.layer(x)


@pytest.fixture
def saved(tmp_path):
    """A model and the folder that holds it."""
    torch.manual_seed(0)
    model = Small(SmallConfig())
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def without_sums(folder):
    """The folder as other tools write it: without `SHA256SUMS`."""
    (folder / "SHA256SUMS").unlink()
    return folder


# Keys


def test_equal_keys_pass_in_any_order():
    assert check_keys(["a", "b"], {"b": 0, "a": 1}) is None


def test_missing_keys_come_with_the_nearest_names():
    expected = [f"down.{i}.conv.weight" for i in range(5)]
    found = ["down.0.convolution.weight", "something.else", *expected[3:]]
    with pytest.raises(ValueError) as error:
        check_keys(expected, found, where="unet")
    message = str(error.value)
    assert message.startswith("unet don't fit the network: 3 keys missing, 2 unexpected.")
    assert "missing 'down.0.conv.weight'; nearest there: down.0.convolution.weight" in message
    assert "unexpected 'something.else'" in message


def test_at_most_three_of_each_kind_are_listed():
    with pytest.raises(ValueError) as error:
        check_keys([f"a{i}" for i in range(10)], [f"b{i}" for i in range(10)])
    lines = str(error.value).split("\n")
    assert sum(line.startswith("  missing") for line in lines) == 3
    assert sum(line.startswith("  unexpected") for line in lines) == 3


@pytest.mark.parametrize("old, new", [
    ("mid_block.attentions.0.query.weight", "mid_block.attentions.0.to_q.weight"),
    ("mid_block.attentions.0.key.bias", "mid_block.attentions.0.to_k.bias"),
    ("down_blocks.1.attentions.12.value.weight", "down_blocks.1.attentions.12.to_v.weight"),
    ("encoder.mid_block.attentions.0.proj_attn.bias", "encoder.mid_block.attentions.0.to_out.0.bias"),
    ("mid_block.attentions.0.to_q.weight", "mid_block.attentions.0.to_q.weight"),
    ("mid_block.attentions.0.group_norm.weight", "mid_block.attentions.0.group_norm.weight"),
    ("key.query.value.weight", "key.query.value.weight"),
])
def test_the_old_dialect_of_diffusers(old, new):
    assert list(rename({old: 1}, OLD_DIFFUSERS)) == [new]


def test_the_old_dialect_of_transformers():
    state = {"text_model.final_layer_norm.weight": 1, "text_model.embeddings.position_ids": 2,
             "text_projection.weight": 3, "embeddings.position_ids": 4, "embeddings.position_embedding.weight": 5}
    assert rename(state, OLD_TRANSFORMERS) == {
        "final_layer_norm.weight": 1, "text_projection.weight": 3, "embeddings.position_embedding.weight": 5,
    }


# Files


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    write_atomically(path, lambda temporary: Path(temporary).write_text("whole"))
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_a_file_may_be_read_by_whom_the_user_lets(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "ours", lambda temporary: Path(temporary).write_text("whole"))
        (tmp_path / "plain").touch()
        assert os.umask(umask) == umask  # left alone
    finally:
        os.umask(before)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(temporary):
        Path(temporary).write_text("ha")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk is full"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_sha256_has_its_known_value(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_json_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"width": 3')
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("content", [b"", b"short", b"\x80\x02}q\x00.", b"\xff" * 64])
def test_what_is_not_safetensors_is_named(tmp_path, content):
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged or not safetensors"):
        read_tensors(tmp_path / WEIGHTS)


# Models


def test_a_model_comes_back_as_it_was(saved):
    model, folder = saved
    again = Small.from_pretrained(folder)
    assert again.config == model.config and not again.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert torch.equal(again(torch.ones(1, 3)), model(torch.ones(1, 3)))
    assert sorted(path.name for path in folder.iterdir()) == sorted(["SHA256SUMS", "config.json", WEIGHTS])
    assert again.count_parameters() == 8 and again.device.type == "cpu"
    assert all(p.requires_grad for p in again.parameters())


def test_the_sums_are_those_of_sha256sum(saved):
    _, folder = saved
    lines = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert [name for _, name in lines] == ["config.json", WEIGHTS]
    assert all(sha256(folder / name) == digest for digest, name in lines)


def test_loading_does_not_wait_for_the_compiler():
    """PyTorch imports its compiler when numbers are drawn or multiplied on the `meta` device."""
    done = subprocess.run([sys.executable, "-c", """if True:
        import sys
        import torch
        before = "torch._dynamo" in sys.modules
        from diffusionbook.dalle import DallE
        from diffusionbook.dalle2 import DallE2
        from diffusionbook.glide import Glide
        from diffusionbook.stable_diffusion import StableDiffusion
        for kind in (StableDiffusion, DallE, Glide, DallE2):
            kind.from_pretrained("emoji")
            assert before or "torch._dynamo" not in sys.modules, kind
        """], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_training_what_was_loaded_leaves_its_file_alone(saved):
    model, folder = saved
    again = Small.from_pretrained(folder)
    with torch.no_grad():
        again.layer.weight.zero_()
    assert torch.equal(Small.from_pretrained(folder).layer.weight, model.layer.weight)
    again.save_pretrained(folder)  # over the file that its own weights come from
    assert Small.from_pretrained(folder).layer.weight.abs().max() == 0


def test_weights_are_stored_and_loaded_in_the_type_asked_for(saved):
    model, folder = saved
    model.save_pretrained(folder, dtype=torch.float16)
    assert {t.dtype for t in load_file(folder / WEIGHTS).values()} == {torch.float16}
    assert model.dtype == torch.float32
    assert torch.equal(Small.from_pretrained(folder).layer.weight, model.layer.weight.half().float())
    assert Small.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_dialect_is_understood(saved):
    model, folder = saved
    state = {key.replace("layer.", "old."): tensor for key, tensor in model.state_dict().items()}
    save_file(state, without_sums(folder) / WEIGHTS)
    assert torch.equal(Small.from_pretrained(folder).layer.weight, model.layer.weight)


def test_a_truncated_file_is_named(saved):
    _, folder = saved
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is not the file it was"):
        Small.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged"):
        Small.from_pretrained(without_sums(folder))


def test_one_flipped_bit_is_found(saved):
    _, folder = saved
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match="SHA-256 differs"):
        Small.from_pretrained(folder)
    with pytest.raises(ValueError, match="SHA-256 differs"):
        verify(folder)


def test_an_edited_config_is_found(saved):
    _, folder = saved
    (folder / "config.json").write_text('{"width": 4}')
    with pytest.raises(ValueError, match="config.json is not the file it was"):
        Small.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_missing_file_is_named(saved, name):
    _, folder = saved
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing although SHA256SUMS names it"):
        Small.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        Small.from_pretrained(without_sums(folder))


def test_loading_in_place_keeps_parameters_and_their_type():
    net = Small(SmallConfig()).double()
    before, state = dict(net.named_parameters()), {k: v + 1 for k, v in net.state_dict().items()}
    net.load(state)
    assert net.dtype == torch.float64 and all(net.get_parameter(name) is p for name, p in before.items())
    assert all(torch.equal(p, state[name]) for name, p in net.named_parameters())
    assert all(p.data_ptr() != state[name].data_ptr() for name, p in net.named_parameters())
    assert net.load(state, dtype=torch.float32).dtype == torch.float32


def test_weights_are_not_rounded_to_whole_numbers(saved, tmp_path):
    with pytest.raises(ValueError, match="stored as torch.int8, which keeps too little"):
        saved[0].save_pretrained(tmp_path / "whole", dtype=torch.int8)
    assert not (tmp_path / "whole").exists()


def test_another_shape_is_refused(saved):
    _, folder = saved
    (without_sums(folder) / "config.json").write_text('{"width": 4}')
    with pytest.raises(ValueError, match=r"layer.weight has shape \(2, 3\), the config asks for \(2, 4\)"):
        Small.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_weights_whose_sum_is_not_are_finite(dtype):
    largest = torch.full((8,), torch.finfo(dtype).max, dtype=dtype)
    assert not largest.sum().isfinite() and is_finite(largest) and is_finite(-largest)
    assert is_finite(largest[:0]) and is_finite(torch.arange(3)) and is_finite(torch.tensor([True]))
    for bad in ([math.nan], [math.inf], [math.inf, -math.inf]):
        assert not is_finite(torch.cat([largest, torch.tensor(bad, dtype=dtype), -largest]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(saved, value):
    model, folder = saved
    state = model.state_dict()
    state["layer.bias"] = torch.tensor([0.0, value])
    with pytest.raises(ValueError, match="layer.bias holds NaN or infinity"):
        model.load(state)
    save_file(state, without_sums(folder) / WEIGHTS)
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}: layer.bias"):
        Small.from_pretrained(folder)


@pytest.mark.parametrize("value, dtype", [(float("nan"), None), (float("inf"), None), (1e6, torch.float16)])
def test_what_could_not_be_loaded_is_not_saved(saved, value, dtype):
    model, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        model.layer.bias[0] = value
    with pytest.raises(ValueError, match="layer.bias holds NaN or infinity as torch.float.*nothing was saved"):
        model.save_pretrained(folder, dtype=dtype)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_type_that_is_too_narrow_is_named(saved):
    model, folder = saved
    with torch.no_grad():
        model.layer.bias[0] = 1e6
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="layer.bias holds NaN or infinity as torch.float16"):
        Small.from_pretrained(folder, dtype=torch.float16)
    assert Small.from_pretrained(folder, dtype=torch.bfloat16).layer.bias.isfinite().all()


def test_two_networks_never_share_weights(saved):
    model, _ = saved
    before = model.layer.weight.detach().clone()
    other = Small(SmallConfig()).load(model.state_dict())
    with torch.no_grad():
        other.layer.weight.add_(1)
    assert torch.equal(model.layer.weight, before) and torch.equal(other.layer.weight, before + 1)
    with torch.device("meta"):
        empty = Small(SmallConfig())
    assert empty.load(other.state_dict()).layer.weight.data_ptr() == other.layer.weight.data_ptr()  # no room wasted


@pytest.mark.parametrize("content", ["[1, 2]", "null", '{"size": 3}'])
def test_another_config_is_named(saved, content):
    _, folder = saved
    (without_sums(folder) / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json is not the config of a Small"):
        Small.from_pretrained(folder)


def test_other_keys_are_refused(saved):
    model, folder = saved
    state = dict(model.state_dict(), extra=torch.zeros(1))
    del state["layer.bias"]
    save_file(state, without_sums(folder) / WEIGHTS)
    with pytest.raises(ValueError, match="1 keys missing, 1 unexpected"):
        Small.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_programs_in_pickles_never_run(saved):
    _, folder = saved
    (folder / WEIGHTS).unlink()
    without_sums(folder)

    class Boom:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.ckpt"):
        (folder / name).write_bytes(pickle.dumps(Boom()))
    with pytest.raises(ValueError, match="perhaps a program, and was not opened"):
        Small.from_pretrained(folder)
    (folder / WEIGHTS).write_bytes(pickle.dumps(Boom()))  # nor under another name
    with pytest.raises(ValueError, match="not safetensors"):
        Small.from_pretrained(folder)


def test_a_failed_save_keeps_the_old_weights(saved, monkeypatch):
    model, folder = saved
    before = (folder / WEIGHTS).read_bytes()

    def fail(state, path, metadata):
        Path(path).write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoints, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(folder)
    assert (folder / WEIGHTS).read_bytes() == before
    assert len(list(folder.iterdir())) == 3


def test_a_model_wants_its_own_kind_of_config():
    with pytest.raises(TypeError, match="needs a SmallConfig, got dict"):
        Small({"width": 3})


# Finding them


def test_locate_finds_shipped_names_paths_and_subfolders(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "files", lambda package: tmp_path)
    for name in ("weights/emoji/small", "weights/digits", "elsewhere/small"):
        (tmp_path / name).mkdir(parents=True)
    assert locate("emoji") == tmp_path / "weights/emoji"
    assert locate("emoji", "small") == tmp_path / "weights/emoji/small"
    assert locate("digits", "small") == tmp_path / "weights/digits"
    assert locate(tmp_path / "elsewhere", "small") == tmp_path / "elsewhere/small"
    with pytest.raises(FileNotFoundError, match=r"no model named 'emojy'.*\(digits, emoji\)"):
        locate("emojy")


def test_locate_lists_what_really_ships(root):
    names = sorted(path.name for path in (root / "diffusionbook" / "weights").glob("*") if path.is_dir())
    with pytest.raises(FileNotFoundError, match=re.escape(f"({', '.join(names)})")):
        locate("nothing of that name")


def test_a_model_is_found_in_the_folder_of_a_pipeline(saved, tmp_path):
    model, folder = saved
    folder.rename(tmp_path / "small")
    assert torch.equal(Small.from_pretrained(tmp_path).layer.weight, model.layer.weight)


def test_config_is_json_with_the_weights_format_marked(saved):
    _, folder = saved
    assert json.loads((folder / "config.json").read_text()) == {"width": 3}
    assert b'"format":"pt"' in (folder / WEIGHTS).read_bytes()[:400]  # transformers insists on it


# Guided diffusion's way of naming a U-Net


def test_where_stable_diffusions_single_files_keep_their_blocks():
    """The numbers that the files of Stable Diffusion 1.x have: two layers a level, attention on all but the last."""
    expected = {
        "conv_in.weight": "input_blocks.0.0.weight",
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "down_blocks.0.resnets.1.conv1.weight": "input_blocks.2.0.in_layers.2.weight",
        "down_blocks.0.attentions.1.proj_in.weight": "input_blocks.2.1.proj_in.weight",
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.weight":
            "input_blocks.2.1.transformer_blocks.0.attn1.to_q.weight",
        "down_blocks.0.downsamplers.0.conv.bias": "input_blocks.3.0.op.bias",
        "down_blocks.2.downsamplers.0.conv.bias": "input_blocks.9.0.op.bias",
        "down_blocks.3.resnets.1.time_emb_proj.bias": "input_blocks.11.0.emb_layers.1.bias",
        "mid_block.attentions.0.norm.weight": "middle_block.1.norm.weight",
        "mid_block.resnets.1.conv2.bias": "middle_block.2.out_layers.3.bias",
        "up_blocks.0.upsamplers.0.conv.bias": "output_blocks.2.1.conv.bias",
        "up_blocks.1.attentions.2.norm.bias": "output_blocks.5.1.norm.bias",
        "up_blocks.1.upsamplers.0.conv.bias": "output_blocks.5.2.conv.bias",
        "up_blocks.3.resnets.2.conv_shortcut.weight": "output_blocks.11.0.skip_connection.weight",
        "conv_norm_out.bias": "out.0.bias",
        "conv_out.bias": "out.2.bias",
    }
    assert guided_diffusion_names(expected) == {ours: (theirs, 0, 1) for ours, theirs in expected.items()}


ATTENTION = "mid_block.attentions.0."


def attention_tensors():
    """A state dict with one attention, of two heads of two channels, whose numbers tell where they belong."""
    state = {"down_blocks.0.resnets.0.norm1.bias": torch.zeros(1)}
    for i, part in enumerate(("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "to_out.0")):
        state[f"{ATTENTION}{part}.weight"] = 100.0 * i + 10 * torch.arange(4.0)[:, None] + torch.arange(4.0)
        state[f"{ATTENTION}{part}.bias"] = 100.0 * i + torch.arange(4.0)
    return state


@pytest.mark.parametrize("head_width, rows", [
    (2, [0, 1, 100, 101, 200, 201, 2, 3, 102, 103, 202, 203]),  # q, k, v of head 0, then those of head 1
    (None, [0, 1, 2, 3, 100, 101, 102, 103, 200, 201, 202, 203]),  # all of q, then of k, then of v
])
def test_queries_keys_and_values_are_stacked_in_either_order(head_width, rows):
    state = dict(sorted(attention_tensors().items()))  # a file's order must not matter
    theirs = to_guided_diffusion(state, head_width=head_width)
    assert theirs["middle_block.1.qkv.bias"].tolist() == rows
    assert theirs["middle_block.1.qkv.weight"].shape == (12, 4, 1)
    assert theirs["middle_block.1.encoder_kv.weight"].shape == (8, 4, 1)
    assert theirs["middle_block.1.proj_out.weight"].shape == (4, 4, 1)
    if head_width:
        assert theirs["middle_block.1.encoder_kv.bias"].tolist() == [300, 301, 400, 401, 302, 303, 402, 403]
    back = from_guided_diffusion(theirs, state, head_width=head_width)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    with pytest.raises(ValueError, match=r"missing 'middle_block.1.qkv.bias'; nearest there: \S+"):
        from_guided_diffusion({k: v for k, v in theirs.items() if k != "middle_block.1.qkv.bias"}, state, head_width=2)


# Pickles, shards and other people's names


class Trap:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_pickle_with_tensors_is_read(tmp_path):
    state = {"w": torch.arange(3.0), "b": torch.ones(2)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.ckpt")
    torch.save(state, tmp_path / "model.bin")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("model.ckpt", "model.bin", "old.pt"):
        found = read_tensors(tmp_path / name)
        assert found.keys() == state.keys() and torch.equal(found["w"], state["w"])


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, capsys):
    torch.save({"w": torch.ones(1), "more": Trap()}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="perhaps a program, and was not opened"):
        read_tensors(tmp_path / "model.ckpt")
    assert "this ran" not in capsys.readouterr().out
    (tmp_path / "model.ckpt").write_bytes((tmp_path / "model.ckpt").read_bytes()[:100])
    with pytest.raises(ValueError, match="model.ckpt"):
        read_tensors(tmp_path / "model.ckpt")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", b"PK\x03\x04", b"\x80\x02."])
def test_what_is_no_pickle_is_named(tmp_path, content):
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(ValueError, match="model.bin .* damaged"):
        read_tensors(tmp_path / "model.bin")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_pickle_raises_nothing_but_value_errors(tmp_path):
    path, random = tmp_path / "model.bin", np.random.default_rng(0)
    torch.save({"w": torch.ones(9)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for _ in range(150):
        damaged = bytearray(content)
        for place in random.integers(len(content), size=5):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        try:
            read_tensors(path)
        except ValueError as error:
            assert "model.bin" in str(error)


@pytest.mark.parametrize("content", [[torch.ones(1)], torch.ones(1), {"state_dict": None}])
def test_a_pickle_without_names_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="tensors by name were expected"):
        read_tensors(tmp_path / "model.pt")


def test_pickles_want_a_pytorch_without_known_holes(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(1)}, tmp_path / "model.pt")
    for version, fine in (("2.9.1+cpu", False), ("2.10.0", True), ("3.0.0a0", True)):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        if fine:
            assert read_tensors(tmp_path / "model.pt").keys() == {"w"}
        else:
            with pytest.raises(ValueError, match="safely from version 2.10 on, and this is 2.9.1"):
                read_tensors(tmp_path / "model.pt")


def test_a_pickle_of_dicts_in_a_dict_says_what_it_holds(tmp_path):
    """Files of textual inversion in the layout of one popular interface."""
    torch.save({"string_to_param": {"*": torch.ones(2)}, "name": "cat"}, tmp_path / "cat.pt")
    with pytest.raises(ValueError, match="holds no tensors by name, but string_to_param, name; take out the part"):
        read_tensors(tmp_path / "cat.pt")


@pytest.mark.parametrize("index", ["model.safetensors.index.fp16.json", "pytorch_model.bin.index.json",
                                   "model.bin.index.json"])
def test_shards_of_all_kinds(tmp_path, index):
    safe = ".safetensors" in index
    names = [f"model-{i}.{'safetensors' if safe else 'bin'}" for i in (1, 2)]
    for name, key in zip(names, "ab", strict=True):
        (save_file if safe else torch.save)({key: torch.ones(1)}, tmp_path / name)
    (tmp_path / index).write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))
    assert read_weights(tmp_path, "model.safetensors").keys() == {"a", "b"}


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    for text in ("one", "two"):
        write_atomically(tmp_path / "link", lambda temporary, text=text: Path(temporary).write_text(text))
        assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "file").read_text() == text
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_weights_come_in_shards_in_halves_and_in_older_files(tmp_path):
    one, two = {"a": torch.ones(1)}, {"b": torch.zeros(2)}
    name = "diffusion_pytorch_model.safetensors"
    torch.save(one, tmp_path / "diffusion_pytorch_model.bin")
    assert read_weights(tmp_path, name).keys() == {"a"}
    save_file(two, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert read_weights(tmp_path, name).keys() == {"b"}
    save_file(one, tmp_path / "m-1.safetensors")
    save_file(two, tmp_path / "m-2.safetensors")
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    (tmp_path / f"{name}.index.json").write_text(json.dumps(index))
    assert read_weights(tmp_path, name).keys() == {"a", "b"}
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="m-2.safetensors is missing"):
        read_weights(tmp_path, name)
    (tmp_path / f"{name}.index.json").write_text(json.dumps({"weight_map": {"a": "../m.safetensors"}}))
    with pytest.raises(ValueError, match="files of its own folder"):
        read_weights(tmp_path, name)
    save_file(one, tmp_path / name)
    assert read_weights(tmp_path, name).keys() == {"a"}
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        read_weights(tmp_path / "nowhere", "model.safetensors")


def test_stacked_attention_is_cut_in_three():
    stacked = {"a.attn.in_proj_weight": torch.arange(12.0).view(6, 2), "a.attn.in_proj_bias": torch.arange(6.0),
               "ln_final.weight": torch.ones(2), "logit_scale": torch.ones(())}
    found = rename(split_qkv(stacked), OPENAI_TEXT)
    assert found.keys() == {f"a.self_attn.{n}_proj.{k}" for n in "qkv" for k in ("weight", "bias")} | {
        "final_layer_norm.weight"}
    assert torch.equal(found["a.self_attn.k_proj.weight"], torch.tensor([[4.0, 5.0], [6.0, 7.0]]))
    assert torch.equal(found["a.self_attn.v_proj.bias"], torch.tensor([4.0, 5.0]))


def test_a_name_that_means_two_things_is_refused(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'digits' ships, and there is a folder of that name here.*'./digits'"):
        locate("digits")
    assert locate("./digits") == Path("digits")


def test_a_folder_behind_a_link_is_saved_into(tmp_path):
    """What the link leads to may be another disk, and its old parts go only once the new ones are there."""
    real = tmp_path / "disk" / "model"
    (real / "old").mkdir(parents=True)
    (real / "old" / "weights").write_text("old")
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(RuntimeError), all_or_nothing(tmp_path / "link", owned=["old"]) as new:
        (new / "weights").write_text("new")
        raise RuntimeError
    assert [path.name for path in real.iterdir()] == ["old"]
    with all_or_nothing(tmp_path / "link", owned=["old"]) as new:
        assert new.resolve().parent == real.resolve()
        (new / "weights").write_text("new")
    assert [path.name for path in real.iterdir()] == ["weights"]


def test_an_owned_part_that_is_a_link_is_taken_off(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").symlink_to(tmp_path / "elsewhere")
    with all_or_nothing(tmp_path / "model", owned=["old"]) as new:
        (new / "weights").write_text("new")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["weights"] and (tmp_path / "elsewhere").is_dir()
