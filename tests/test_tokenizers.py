"""MAGE's and taming's tokenizers: published numbers, plain re-implementations, and mistakes that must show."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.tokenizers import load_tokenizer
from semdict.pipeline.tokenizers.base import ConvTokenizer, save_tokenizer
from semdict.pipeline.tokenizers.mage import MageTokenizer
from semdict.pipeline.tokenizers.taming import TamingTokenizer
from semdict.pipeline.tokenizers.vqgan import Downsample, GridAttention, ResidualBlock, Sizes, Variant

TINY = Sizes(stem=32, widths=(32, 64, 64), blocks=1, decoder_blocks=1, z_channels=16, codes=50, dim=16, strided=False)
TAMING = Sizes(stem=32, widths=(32, 64, 64), blocks=1, decoder_blocks=2, z_channels=12, codes=40, dim=8, attention=(2,))
SIZES = {MageTokenizer: TINY, TamingTokenizer: TAMING}


def build(layout: type[ConvTokenizer] = MageTokenizer, seed: int = 0) -> ConvTokenizer:
    """Random weights, norms and biases off their defaults, codes spread so that many are used."""
    model, rng = layout(SIZES[layout]), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=rng)
            if "norm" in name:
                tensor.copy_(noise * 0.3 + (1 if name.endswith("weight") else 0))
            elif name.endswith("bias"):
                tensor.copy_(noise * 0.2)
            elif "embedding" in name:
                tensor.copy_(noise)
            else:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
    return model.requires_grad_(False).eval()


def pictures(count: int = 2, side: int = 32, seed: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def released(golden):
    io = np.load(golden / "vqgan_io.npz")
    images = torch.from_numpy(io["images_u8"]).float() / 255
    return load_tokenizer(golden / "vqgan_tiny.ckpt"), images, io


@pytest.mark.golden
def test_released_numbers(released):
    model, images, io = released
    z = model.encode_features(images)
    np.testing.assert_allclose(z.numpy(), io["z"], atol=2e-4)
    tokens = model.quantize(z)
    assert tokens.dtype == torch.int64 and tokens.shape == (4, 256)
    assert np.array_equal(tokens.numpy(), io["tokens"]), "tokens moved"
    decoded = model.decode(torch.from_numpy(io["tokens"]).long())
    np.testing.assert_allclose(decoded[:2].numpy(), io["decoded"].astype(np.float32), atol=4e-3)  # stored as float16
    np.testing.assert_allclose(decoded[:, :, ::4, ::4].numpy(), io["decoded_stride4"].astype(np.float32), atol=4e-3)
    assert (model.codebook_size, model.grid(256), model.codebook.shape) == (1024, (16, 16), (1024, 32))
    assert model.sizes == Sizes(
        stem=32,
        widths=(32, 32, 64, 64, 128),
        blocks=1,
        decoder_blocks=1,
        z_channels=32,
        codes=1024,
        dim=32,
        strided=False,
    )


@pytest.mark.golden
def test_released_numbers_channels_last(released):
    model, images, io = released
    last = copy_of(model).to(memory_format=torch.channels_last)
    tokens = last.encode(images[:2].to(memory_format=torch.channels_last))
    assert np.array_equal(tokens.numpy(), io["tokens"][:2])


@pytest.mark.golden
def test_the_same_tokenizer_inside_a_mage_checkpoint(released, golden):
    model, images, io = released
    inside = load_tokenizer(golden / "mage_tiny.pth")
    assert inside.sizes == model.sizes
    assert np.array_equal(inside.encode(images[1:2]).numpy(), io["tokens"][1:2])


def copy_of(model: ConvTokenizer) -> ConvTokenizer:
    copy = type(model)(model.sizes).requires_grad_(False).eval()
    copy.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return copy


def swap(model: ConvTokenizer, kind: type, other) -> ConvTokenizer:
    """A copy of `model` whose layers of class `kind` compute `other` instead."""
    copy = copy_of(model)
    for layer in copy.modules():
        if isinstance(layer, kind):
            layer.forward = other.__get__(layer)
    return copy


def block_with_shortcut_of_input(self, x):
    h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
    if not hasattr(self, "nin_shortcut"):
        return h + x
    return h + F.pad(x, (0, 0, 0, 0, 0, h.shape[1] - x.shape[1])) if x.shape[1] < h.shape[1] else h + x[:, : h.shape[1]]


def block_with_shortcut_conv_replacing_h(self, x):
    h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
    return h + x if not hasattr(self, "nin_shortcut") else self.nin_shortcut(h)


@pytest.mark.golden
@pytest.mark.parametrize("mistake", ["range", "max pool", "shortcut of input", "shortcut instead of sum", "transposed"])
def test_a_wrong_tokenizer_gives_other_tokens(released, mistake):
    model, images, io = released
    images, expected = images[:2], io["tokens"][:2]
    if mistake == "range":
        tokens = model.encode(images * 2 - 1)
    elif mistake == "max pool":
        tokens = swap(model, nn.AvgPool2d, lambda self, x: F.max_pool2d(x, 2)).encode(images)
    elif mistake == "shortcut of input":
        tokens = swap(model, ResidualBlock, block_with_shortcut_of_input).encode(images)
    elif mistake == "shortcut instead of sum":
        tokens = swap(model, ResidualBlock, block_with_shortcut_conv_replacing_h).encode(images)
    else:
        tokens = model.encode(images).unflatten(1, (16, 16)).mT.flatten(1)
    assert (tokens.numpy() == expected).mean() < 0.9, "the golden tokens do not notice this mistake"


def plain_mage(state: dict, sizes: Sizes, x: torch.Tensor) -> torch.Tensor:
    """The encoder once more, straight from its definition, in float64."""
    s = {name: tensor.double() for name, tensor in state.items()}

    def norm(x, name):
        groups = x.reshape(x.shape[0], 32, -1)
        scaled = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return scaled.reshape(x.shape) * s[name + ".weight"][:, None, None] + s[name + ".bias"][:, None, None]

    def block(x, name):
        h = norm(x, name + ".norm1")
        h = F.conv2d(h * h.sigmoid(), s[name + ".conv1.weight"], padding=1)
        h = norm(h, name + ".norm2")
        h = F.conv2d(h * h.sigmoid(), s[name + ".conv2.weight"], padding=1)
        shortcut = name + ".nin_shortcut.weight"
        return h + (F.conv2d(h, s[shortcut]) if shortcut in s else x)

    x = F.conv2d(x.double(), s["encoder.conv_in.weight"], padding=1)
    for level in range(len(sizes.widths)):
        for number in range(sizes.blocks):
            x = block(x, f"encoder.down.{level}.block.{number}")
        if level < len(sizes.widths) - 1:
            x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    x = norm(block(block(x, "encoder.mid.block_1"), "encoder.mid.block_2"), "encoder.norm_out")
    return F.conv2d(x * x.sigmoid(), s["encoder.conv_out.weight"], s["encoder.conv_out.bias"])


def test_mage_encoder_against_its_definition_in_float64():
    model, images = build(), pictures()
    expected = plain_mage(model.state_dict(), TINY, images)
    assert torch.allclose(model.encode_features(images).double(), expected, atol=1e-4)
    distances = (expected.permute(0, 2, 3, 1).reshape(-1, 1, 16) - model.codebook.double()).square().sum(-1)
    assert torch.equal(model.encode(images).flatten(), distances.argmin(1))


def test_taming_attention_against_plain_softmax():
    layer, rng = GridAttention(64), torch.Generator().manual_seed(1)
    for tensor in layer.parameters():
        tensor.data = torch.randn(tensor.shape, generator=rng) * 0.3
    x = torch.randn(2, 64, 5, 7, generator=rng)
    h = F.group_norm(x, 32, layer.norm.weight, layer.norm.bias, 1e-6).flatten(2)  # (B, C, N)
    q, k, v = (part.weight[:, :, 0, 0] @ h + part.bias[:, None] for part in (layer.q, layer.k, layer.v))
    weights = torch.einsum("bci,bcj->bij", q, k).mul(64**-0.5).softmax(dim=2)  # over keys j
    out = layer.proj_out.weight[:, :, 0, 0] @ torch.einsum("bcj,bij->bci", v, weights) + layer.proj_out.bias[:, None]
    assert torch.allclose(layer(x), x + out.reshape(x.shape), atol=1e-4)


def test_taming_downsampling_looks_right_and_down():
    layer = Downsample(1)
    layer.conv.weight.data = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)
    layer.conv.bias.data.fill_(0.5)
    x = torch.randn(1, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(1, 1, 3, 3)
    for row in range(3):
        for column in range(3):
            for i in range(3):
                for j in range(3):
                    if 2 * row + i < 6 and 2 * column + j < 6:
                        expected[0, 0, row, column] += x[0, 0, 2 * row + i, 2 * column + j] * (3 * i + j + 1)
    assert torch.allclose(layer(x), expected + 0.5, atol=1e-5)


def test_taming_shortcut_carries_the_input():
    block = ResidualBlock(Variant(), 32, 64)
    block.conv2.weight.data.zero_()
    block.conv2.bias.data.zero_()
    x = pictures(1, 8).repeat(1, 11, 1, 1)[:, :32]
    assert torch.allclose(block(x), F.conv2d(x, block.nin_shortcut.weight, block.nin_shortcut.bias), atol=1e-6)


def test_taming_layout_loads_and_takes_unit_range(tmp_path):
    model, images = build(TamingTokenizer), pictures()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["loss.discriminator.main.0.weight"] = torch.zeros(3)
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "taming.ckpt")
    loaded = load_tokenizer(tmp_path / "taming.ckpt")
    assert loaded.sizes == TAMING
    z = F.conv2d(model.encoder(images * 2 - 1), model.quant_conv.weight, model.quant_conv.bias)
    assert torch.equal(loaded.encode_features(images), z)
    tokens = loaded.encode(images)
    assert torch.equal(
        tokens, (z.permute(0, 2, 3, 1)[..., None, :] - model.codebook).square().sum(-1).argmin(-1).flatten(1)
    )
    codes = model.codebook[tokens].reshape(2, 8, 8, 8).permute(0, 3, 1, 2)
    raw = model.decoder(F.conv2d(codes, model.post_quant_conv.weight, model.post_quant_conv.bias))
    assert torch.allclose(loaded.decode(tokens), (raw + 1) / 2, atol=1e-5)


def test_taming_names_are_those_of_published_files():
    names = set(TamingTokenizer(TAMING).state_dict())
    assert {
        "encoder.conv_in.bias",
        "encoder.down.0.block.0.conv1.bias",
        "encoder.down.0.downsample.conv.weight",
        "encoder.down.1.block.0.nin_shortcut.bias",
        "encoder.down.2.attn.0.proj_out.weight",
        "encoder.mid.attn_1.q.weight",
        "decoder.up.2.attn.1.norm.weight",
        "decoder.up.1.upsample.conv.bias",
        "quant_conv.weight",
        "post_quant_conv.bias",
        "quantize.embedding.weight",
    } <= names
    assert "decoder.up.0.upsample.conv.weight" not in names and "encoder.down.2.downsample.conv.weight" not in names


def test_save_and_load(tmp_path):
    for layout in SIZES:
        model, path = build(layout), tmp_path / f"{layout.layout}.ckpt"
        save_tokenizer(model, path)
        loaded = load_tokenizer(path)
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
        save_tokenizer(loaded, tmp_path / "again.ckpt")
        assert (tmp_path / "again.ckpt").read_bytes() == path.read_bytes()
        assert json.loads(json.dumps(loaded.identity))["layout"] == layout.layout
        assert len(loaded.identity["sha256"]) == 64
        assert not loaded.training and not any(tensor.requires_grad for tensor in loaded.parameters())


def test_gradients_flow_through_the_training_parts():
    model = build().requires_grad_(True)
    z = model.encode_features(pictures(1))
    codes = model.embed(model.quantize(z))
    assert codes.shape == z.shape
    model.decode_features(z + (codes - z).detach()).square().mean().backward()
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0


def test_embed_is_row_major():
    model = build()
    tokens = torch.arange(16)[None]
    assert torch.equal(model.embed(tokens)[0, :, 1, 2], model.codebook[6])


@pytest.mark.parametrize("damage", ["other family", "gumbel", "no codebook", "width", "extra", "missing"])
def test_other_files_are_refused(tmp_path, damage):
    state = {name: tensor.clone() for name, tensor in build().state_dict().items()}
    messages = []
    if damage == "other family":
        state, messages = (
            {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)},
            ["encoder.conv_in.weight", "blocks.0.attn.qkv"],
        )
    elif damage == "gumbel":
        state["quantize.embed.weight"] = state.pop("quantize.embedding.weight")
        messages = ["Gumbel"]
    elif damage == "no codebook":
        del state["quantize.embedding.weight"]
        messages = ["quantize.embedding.weight"]
    elif damage == "width":
        state["quantize.embedding.weight"] = torch.zeros(50, 16)
        state["decoder.conv_in.weight"] = torch.zeros(64, 20, 3, 3)
        messages = ["decoder.conv_in.weight", "(64, 20, 3, 3)", "(64, 16, 3, 3)"]
    elif damage == "extra":
        state["encoder.spare"] = torch.zeros(2)
        messages = ["encoder.spare", "nothing"]
    else:
        del state["decoder.norm_out.weight"]
        messages = ["decoder.norm_out.weight", "nothing"]
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    with pytest.raises(WeightsError) as caught:
        load_tokenizer(tmp_path / "x.ckpt")
    assert all(part in str(caught.value) for part in ["x.ckpt", *messages]), str(caught.value)


def test_odd_shapes_are_refused():
    model = build()
    with pytest.raises(ValueError, match="multiples of 4"):
        model.encode(pictures(1, 30))
    with pytest.raises(ValueError, match="square"):
        model.decode(torch.zeros(1, 60, dtype=torch.int64))


@pytest.mark.parametrize(("size", "near"), [(30, 32), (1, 4), (0, 4), (-8, 4)])
def test_a_size_that_the_stride_does_not_divide_is_refused(size, near):
    with pytest.raises(WeightsError, match=rf"image size {size} is not a multiple of .* stride 4: .* such as {near}$"):
        build().grid(size)
    assert build().grid(36) == (9, 9)
