"""Frozen VQGAN: images <-> code ids. Reads MAGE's and taming-transformers' checkpoints; sizes come from the tensors."""

import math
import os
import re
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.files import sha256_file, write_aside
from semdict.pipeline.common.safeload import load_tensors, refuse_misfit
from semdict.pipeline.tokenizers.vqgan_nets import GROUPS, Codebook, Decoder, Encoder, VqganConfig

IMAGE_SIZE = 256  # pixels a side that `grid` is stated for; every other multiple of the stride works too
PREFIXES = ("", "vqgan.", "first_stage_model.")  # bare tokenizer, MAGE checkpoint, latent-diffusion checkpoint
NOT_WEIGHTS = ("loss.", "model_ema.", "quantize.embedding.cluster_size", "quantize.embedding.embed_avg")
STEM, TABLE = "encoder.conv_in.weight", "quantize.embedding.weight"


class Vqgan(nn.Module):
    """Convolutional tokenizer with one codebook; images are RGB in [0, 1], whatever range the layout uses inside.

    Any image side that is a multiple of the stride works. `encode` and `decode` make no gradient; for training,
    `encode_features`, `quantize`, `embed` and `decode_features` are the same computation in differentiable parts.
    """

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = Codebook(config.codes, config.dim)  # called on latents: (B, D, h, w) -> (B, h * w) int64
        if config.layout == "taming":
            self.quant_conv = nn.Conv2d(config.z_channels, config.dim, 1)
            self.post_quant_conv = nn.Conv2d(config.dim, config.z_channels, 1)
        self.identity: dict = {"kind": "vqgan", **asdict(config), "sha256": None}  # JSON-able, goes into recipes

    @property
    def codebook(self) -> Tensor:
        """(K, D) float, the table of codes."""
        return self.quantize.embedding.weight

    @property
    def codebook_size(self) -> int:
        """K; ids are 0 .. K - 1."""
        return self.config.codes

    @property
    def grid(self) -> int:
        """Cells a side of a 256-pixel image."""
        return IMAGE_SIZE // self.config.stride

    def encode_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> latents before quantisation, (B, D, H / stride, W / stride)."""
        height, width = images.shape[-2:]
        if images.ndim != 4 or images.shape[1] != 3 or height % self.stride or width % self.stride:
            raise ValueError(
                f"images are {tuple(images.shape)}, expected (B, 3, H, W), sides in steps of {self.stride}"
            )
        if self.config.layout == "mage":
            return self.encoder(images)
        return self.quant_conv(self.encoder(images * 2 - 1))

    @property
    def stride(self) -> int:
        """Pixels per cell and side."""
        return self.config.stride

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L) int64, L a square number, row-major -> codes on the grid, (B, D, sqrt L, sqrt L)."""
        side = math.isqrt(tokens.shape[1])
        if tokens.ndim != 2 or side * side != tokens.shape[1]:
            raise ValueError(f"tokens are {tuple(tokens.shape)}, expected (B, L) with L a square number")
        return self.quantize.embedding(tokens).mT.unflatten(2, (side, side))

    def decode_features(self, z: Tensor) -> Tensor:
        """Quantised latents (B, D, h, w) -> images (B, 3, h * stride, w * stride), nominal [0, 1], not clipped."""
        if self.config.layout == "mage":
            return self.decoder(z)
        return self.decoder(self.post_quant_conv(z)) / 2 + 0.5

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> code ids (B, L) int64, L = (H / stride) * (W / stride), row-major."""
        return self.quantize(self.encode_features(images))

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """(B, L) code ids -> images (B, 3, H, W), nominal [0, 1], not clipped."""
        return self.decode_features(self.embed(tokens))

    forward = encode


def load_vqgan(path: str | os.PathLike, device: str | torch.device = "cpu") -> Vqgan:
    """Read a tokenizer: MAGE's released file, a MAGE checkpoint that contains it, or a taming-transformers VQModel.

    Frozen, in evaluation mode, float32. Widths, blocks and levels are inferred from the tensors; a file of another
    family or with tensors of other sizes is a WeightsError that shows both sides.
    """
    path = Path(path)
    state = _tokenizer_part(load_tensors(path), path)
    config = _infer(state, path)
    with torch.device("meta"):
        model = Vqgan(config)
    refuse_misfit(state, model, path, f"a {config.layout} VQGAN of widths {config.widths}")
    # Clones: published fixtures may share one storage among tensors.
    model.load_state_dict({name: tensor.float().clone() for name, tensor in state.items()}, assign=True)
    model.identity["sha256"] = sha256_file(path)
    return model.requires_grad_(False).eval().to(device)


def save_vqgan(model: Vqgan, path: str | os.PathLike) -> None:
    """Write `{"state_dict": ...}`, float32, in the model's own published layout; same weights give the same bytes."""
    state = {name: tensor.detach().float().cpu().clone() for name, tensor in model.state_dict().items()}
    with write_aside(path) as aside, aside.open("wb") as file:  # a file object, since torch stores a path's name
        torch.save({"state_dict": state}, file)


def _tokenizer_part(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tokenizer's tensors without their prefix and without what only training used."""
    for prefix in PREFIXES:
        if prefix + STEM in state:
            inside = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            break
    else:
        raise WeightsError(
            f"{path} is not a VQGAN and holds none: expected {STEM} (also under {' or '.join(PREFIXES[1:])}), "
            f"found {', '.join(list(state)[:4])}, ... ({len(state)} tensors)"
        )
    if "quantize.embed.weight" in inside:
        raise WeightsError(f"{path} is a Gumbel VQGAN (quantize.embed.weight); only nearest-code models are supported")
    if TABLE not in inside:
        raise WeightsError(f"{path} is an autoencoder without a codebook: expected {TABLE}")
    return {name: t for name, t in inside.items() if not name.startswith(NOT_WEIGHTS)}


def _infer(state: dict[str, Tensor], path: Path) -> VqganConfig:
    """The sizes that the tensors speak of; layouts are told apart by the convolutions around taming's codebook."""

    def count(pattern: str) -> int:
        return len({match[0] for name in state if (match := re.match(pattern, name))})

    try:
        levels = range(count(r"encoder\.down\.\d+\."))
        config = VqganConfig(
            layout="taming" if "quant_conv.weight" in state else "mage",
            stem=state[STEM].shape[0],
            widths=tuple(state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in levels),
            blocks=count(r"encoder\.down\.0\.block\.\d+\."),
            decoder_blocks=count(r"decoder\.up\.0\.block\.\d+\."),
            z_channels=state["encoder.conv_out.weight"].shape[0],
            codes=state[TABLE].shape[0],
            dim=state[TABLE].shape[1],
            attention=tuple(i for i in levels if f"encoder.down.{i}.attn.0.q.weight" in state),
            strided="encoder.down.0.downsample.conv.weight" in state,
        )
    except (KeyError, IndexError) as error:
        raise WeightsError(f"{path} is not a whole VQGAN: {error} is missing") from None
    odd = [width for width in (config.stem, *config.widths) if width % GROUPS or width == 0]
    if odd or not config.widths or not config.decoder_blocks:
        raise WeightsError(f"{path} is not a VQGAN of a known kind: widths {config.widths}, group norm needs /{GROUPS}")
    return config
