"""LlamaGen, MaskGIT, IBQ and Open-MAGVIT2 tokenizers against numbers computed with their published code."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.tokenizers import load_tokenizer
from semdict.pipeline.tokenizers.base import Codebook
from semdict.pipeline.tokenizers.magvit2 import BinaryCodebook
from semdict.pipeline.tokenizers.registry import LAYOUTS
from semdict.pipeline.tokenizers.vqgan import DepthToSpace, Sizes

pytestmark = pytest.mark.golden

# file -> (arrays, layout, stride, codes)
FILES = {
    "llamagen_vq16_tiny.pt": ("llamagen_vq16_io.npz", "llamagen", 16, 512),
    "llamagen_vq8_tiny.pt": ("llamagen_vq8_io.npz", "llamagen", 8, 512),
    "maskgit_vqgan_tiny.bin": ("maskgit_vqgan_io.npz", "maskgit", 16, 512),
    "ibq_tiny.ckpt": ("ibq_io.npz", "ibq", 16, 512),
    "magvit2_tiny.ckpt": ("magvit2_io.npz", "magvit2", 8, 1024),
}


def released(golden: Path, file: str) -> tuple[np.lib.npyio.NpzFile, torch.Tensor]:
    """The fixture's arrays, and its images (B, 3, H, W) in [0, 1]."""
    arrays = np.load(golden / FILES[file][0])
    return arrays, torch.from_numpy(arrays["images_u8"]).float() / 255


@pytest.mark.parametrize("file", FILES)
def test_tokens_and_images_are_the_published_ones(golden, file):
    arrays, images = released(golden, file)
    _, layout, stride, codes = FILES[file]
    model = load_tokenizer(golden / file)
    assert (model.layout, model.stride, model.codebook_size) == (layout, stride, codes)
    side = images.shape[-1] // stride
    assert model.grid(images.shape[-1]) == (side, side) and model.codebook.shape[0] == codes
    np.testing.assert_allclose(model.encode_features(images).numpy(), arrays["z"], atol=2e-4)
    tokens = model.encode(images)
    assert tokens.dtype == torch.int64 and np.array_equal(tokens.numpy(), arrays["tokens"])
    low, high = arrays["input_range"]
    decoded = model.decode(tokens).numpy() * (high - low) + low
    np.testing.assert_allclose(decoded[:, :, ::8, ::8], arrays["decoded_stride8"], atol=3e-4)
    np.testing.assert_allclose(decoded[:2], arrays["decoded"].astype(np.float32), atol=3e-3)  # stored as float16


@pytest.mark.parametrize("file", FILES)
def test_tokens_are_the_same_in_channels_last(golden, file):
    arrays, images = released(golden, file)
    model = load_tokenizer(golden / file).to(memory_format=torch.channels_last)
    assert np.array_equal(model.encode(images.to(memory_format=torch.channels_last)).numpy(), arrays["tokens"])


@pytest.mark.parametrize(
    ("file", "name"),
    [("llamagen_vq8_tiny.pt", "tokens_model"), ("ibq_tiny.ckpt", "tokens_raw"), ("magvit2_tiny.ckpt", "tokens_raw")],
)
def test_plain_weights_on_request(golden, file, name):
    arrays, images = released(golden, file)
    model = load_tokenizer(golden / file, ema=False)
    assert np.array_equal(model.encode(images).numpy(), arrays[name])
    assert (arrays[name] != arrays["tokens"]).any() and model.identity["ema"] is False


COARSE, FINE = (128, 128, 256, 256, 512), (128, 256, 256, 512)  # widths at stride 16 and 8
LLAMAGEN = {"stem": 128, "blocks": 2, "decoder_blocks": 3, "z_channels": 256, "codes": 16384, "dim": 8}
MAGVIT2 = {"stem": 128, "blocks": 4, "decoder_blocks": 4, "mid_blocks": 4}
RELEASED = [  # layout, sizes of the public file, parameters counted on the published classes
    ("llamagen", Sizes(**LLAMAGEN, widths=COARSE, attention=(4,)), 71_883_403),
    ("llamagen", Sizes(**LLAMAGEN, widths=FINE, attention=(3,)), 70_109_835),
    ("maskgit", Sizes(128, COARSE, 2, 2, z_channels=256, codes=1024, dim=256, strided=False), 54_515_587),
    ("ibq", Sizes(128, COARSE, 4, 5, z_channels=256, codes=1024, dim=256, attention=(4,)), 107_049_859),
    ("ibq", Sizes(128, COARSE, 4, 5, z_channels=256, codes=262_144, dim=256, attention=(4,)), 173_896_579),
    ("magvit2", Sizes(**MAGVIT2, widths=COARSE, z_channels=18, codes=2**18, dim=18), 115_127_829),
    ("magvit2", Sizes(**MAGVIT2, widths=FINE, z_channels=18, codes=2**18, dim=18), 112_021_653),
    ("magvit2", Sizes(**MAGVIT2, widths=COARSE, z_channels=14, codes=2**14, dim=14), 115_094_033),
]


@pytest.mark.parametrize(("layout", "sizes", "count"), RELEASED)
def test_public_files_have_as_many_parameters(layout, sizes, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in LAYOUTS[layout](sizes).parameters()) == count


MISTAKES = {  # mistake -> (file, attribute, wrong value)
    "symmetric padding": ("ibq_tiny.ckpt", "padding", "both"),
    "one-sided padding": ("magvit2_tiny.ckpt", "padding", "after"),
    "range of llamagen": ("llamagen_vq8_tiny.pt", "signed", False),
    "range of maskgit": ("maskgit_vqgan_tiny.bin", "signed", True),
    "distance for ibq": ("ibq_tiny.ckpt", "codebook_type", Codebook),
    "raw codes for llamagen": ("llamagen_vq16_tiny.pt", "codebook_type", Codebook),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_variant_gives_other_tokens(golden, mistake):
    file, attribute, value = MISTAKES[mistake]
    arrays, images = released(golden, file)
    model = load_tokenizer(golden / file)
    kind = type(model)
    changes = {attribute: value}
    if attribute != "codebook_type":
        changes = {"variant": replace(kind.variant, **changes)}
    wrong = type("Wrong", (kind,), changes)(model.sizes)
    wrong.load_state_dict(model.state_dict())
    assert (wrong.encode(images).numpy() != arrays["tokens"]).mean() > 0.1


def pixel_shuffle(self: DepthToSpace, x: torch.Tensor) -> torch.Tensor:
    return F.pixel_shuffle(self.conv(x), 2)


def test_the_order_of_depth_to_space_shows(golden, monkeypatch):
    arrays, _ = released(golden, "magvit2_tiny.ckpt")
    monkeypatch.setattr(DepthToSpace, "forward", pixel_shuffle)
    decoded = load_tokenizer(golden / "magvit2_tiny.ckpt").decode(torch.from_numpy(arrays["tokens"]).long()).numpy()
    assert np.abs(decoded[:, :, ::8, ::8] * 2 - 1 - arrays["decoded_stride8"]).max() > 0.05


def test_bits_of_open_magvit2(golden):
    arrays = np.load(golden / "magvit2_bits18.npz")
    codebook = BinaryCodebook(2**18, 18)
    z = torch.from_numpy(arrays["z"])
    tokens = codebook(z)
    assert np.array_equal(tokens.numpy(), arrays["tokens"])
    codes = codebook.lookup(tokens).mT.reshape(z.shape)
    assert np.array_equal(codes.numpy(), arrays["quantised"])
    assert np.array_equal(codebook.lookup(torch.from_numpy(arrays["ids"]).long()).numpy(), arrays["codes"])
    single = 2 * torch.eye(18)[:, :, None, None] - 1
    assert np.array_equal(codebook(single)[:, 0].numpy(), arrays["one_bit_tokens"])
    for low in (6, 9):
        assert np.array_equal(tokens % 2**low, arrays[f"tokens_pre_{low}_{18 - low}"])
        assert np.array_equal(tokens >> low, arrays[f"tokens_post_{low}_{18 - low}"])


def test_averaged_weights_of_some_tensors_only_are_refused(golden, tmp_path):
    state = torch.load(golden / "ibq_tiny.ckpt", weights_only=True)["state_dict"]
    del state["model_ema.quantizeembeddingweight"]
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match=r"averaged weights of some tensors only; quantize\.embedding\.weight"):
        load_tokenizer(tmp_path / "x.ckpt")


def test_a_layout_can_be_named_where_names_do_not_tell(golden, tmp_path):
    """Without its averaged weights an IBQ file has the tensor names of taming-transformers."""
    arrays, images = released(golden, "ibq_tiny.ckpt")
    state = torch.load(golden / "ibq_tiny.ckpt", weights_only=True)["state_dict"]
    plain = {name: tensor for name, tensor in state.items() if not name.startswith("model_ema.")}
    torch.save(plain, tmp_path / "x.ckpt")
    assert load_tokenizer(tmp_path / "x.ckpt").layout == "taming"
    named = load_tokenizer(tmp_path / "x.ckpt", layout="ibq")
    assert np.array_equal(named.encode(images).numpy(), arrays["tokens_raw"])
    plain["encoder.down.0.block.3.conv1.weight"] = torch.zeros(1)  # as deep as the released IBQ files
    torch.save(plain, tmp_path / "deep.ckpt")
    with pytest.raises(WeightsError, match="IBQ tokenizer without its averaged weights"):
        load_tokenizer(tmp_path / "deep.ckpt")
    with pytest.raises(WeightsError, match="layout ibk is unknown; did you mean ibq"):
        load_tokenizer(tmp_path / "x.ckpt", layout="ibk")


@pytest.mark.parametrize("file", FILES)
def test_wrapped_and_converted_files_load_alike(golden, tmp_path, file):
    """The same weights in safetensors, under wrapper prefixes, and inside a larger model."""
    from safetensors.torch import save_file

    arrays, images = released(golden, file)
    checkpoint = torch.load(golden / file, weights_only=True)
    state = checkpoint.get("ema") or checkpoint.get("state_dict") or checkpoint.get("model") or checkpoint
    state = {name: tensor.clone() for name, tensor in state.items()}
    save_file(state, tmp_path / "x.safetensors")
    torch.save({"model": {f"module._orig_mod.{k}": t for k, t in state.items()}}, tmp_path / "wrapped.pt")
    torch.save({"state_dict": {f"first_stage.{k}": t for k, t in state.items()}}, tmp_path / "inside.pt")
    for name in ("x.safetensors", "wrapped.pt", "inside.pt"):
        assert np.array_equal(load_tokenizer(tmp_path / name).encode(images[:1]).numpy(), arrays["tokens"][:1])


def test_files_on_the_hub_are_named_by_repository_and_file(golden, tmp_path):
    """huggingface_hub's own cache, filled by hand, in a process that has no network."""
    repository = tmp_path / "models--owner--tokenizers"
    for revision in ("main", "v2"):
        commit = {"main": "a", "v2": "b"}[revision] * 40
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        (repository / "snapshots" / commit / "sub").mkdir(parents=True)
        source = {"main": "llamagen_vq8_tiny.pt", "v2": "magvit2_tiny.ckpt"}[revision]
        (repository / "snapshots" / commit / "sub" / "vq.pt").write_bytes((golden / source).read_bytes())
    code = (
        "from semdict import load_tokenizer\n"
        "print(load_tokenizer('hf-hub:owner/tokenizers/sub/vq.pt').layout)\n"
        "print(load_tokenizer('hf-hub:owner/tokenizers@v2/sub/vq.pt').layout)\n"
        "for name in ('hf-hub:owner/other/vq.pt', 'hf-hub:owner/tokenizers'):\n"
        "    try: load_tokenizer(name)\n"
        "    except Exception as error: print(type(error).__name__, error)"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["llamagen", "magvit2"]
    assert lines[2].startswith("WeightsError hf-hub:owner/other/vq.pt cannot be fetched") and "its path" in lines[2]
    assert "expected hf-hub:owner/name/file" in lines[3]
