"""What a tokenizer offers, and the convolutional one that the released layouts share."""

import math
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.files import atomic_write
from semdict.pipeline.common.nearest import exact_float32, nearest
from semdict.pipeline.common.safeload import refuse_misfit
from semdict.pipeline.tokenizers.vqgan import GROUPS, Decoder, Encoder, Sizes, Variant

# B images, L = h * w grid cells in row-major order, D width of a code, K codes
AVERAGED = "model_ema."  # averaged copies stand beside the plain tensors, their names without dots behind this


class Tokenizer(Protocol):
    """Images <-> token ids; `load_tokenizer` returns one, a frozen module in evaluation mode."""

    codebook_size: int  # K; ids are 0 .. K - 1
    stride: int  # pixels per grid cell and side; image sides are multiples of it
    identity: dict[str, Any]  # JSON-able, with the SHA-256 of the file; goes into recipes

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [0, 1] -> (B, L) int64."""

    def decode(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 -> (B, 3, H, W), nominally in [0, 1], not clipped."""

    def grid(self, image_size: int) -> tuple[int, ...]:
        """Cells of a square image, (rows, columns) or (L,) for a 1-D tokenizer; WeightsError where none fit."""


class Codebook(nn.Module):
    """The table of codes; called on latents it finds the nearest ones."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codes, 1.0 / codes)

    @property
    def table(self) -> Tensor:
        """(K, D) float: token i decodes from row i."""
        return self.embedding.weight

    def lookup(self, tokens: Tensor) -> Tensor:
        """Ids of any shape -> codes (..., D)."""
        return self.embedding(tokens)

    def forward(self, z_BDhw: Tensor) -> Tensor:
        """(B, D, h, w) float -> (B, h * w) int64, row-major: least squared distance, lowest id on a tie."""
        points_ND = z_BDhw.detach().permute(0, 2, 3, 1).reshape(-1, z_BDhw.shape[1])
        return self.search(points_ND).reshape(z_BDhw.shape[0], -1)

    def search(self, points_ND: Tensor) -> Tensor:
        """(N, D) float -> ids (N,) int64."""
        return nearest(points_ND, self.embedding.weight.detach())


class ConvTokenizer(nn.Module):
    """Convolutional tokenizer with one codebook; images are RGB in [0, 1] whatever range the family uses inside.

    A subclass is a released layout: its name, the tensor names that tell it from others, its variant of the network and
    its codebook. Any square image whose side is a multiple of the stride works. `encode` and `decode` make no gradient;
    for training, `encode_features`, `quantize`, `embed` and `decode_features` are the same computation in
    differentiable parts.
    """

    layout: ClassVar[str]
    present: ClassVar[tuple[str, ...]]  # tensor names that every file of the layout has
    absent: ClassVar[tuple[str, ...]] = ()  # tensor names that only files of similar layouts have
    ignored: ClassVar[tuple[str, ...]] = (  # beginnings of names that inference does not use
        "loss.",
        AVERAGED,
        "quantize.embedding.cluster_size",
        "quantize.embedding.embed_avg",
    )
    averaged: ClassVar[bool] = False  # files may hold averaged copies (AVERAGED), which the released scripts use
    variant: ClassVar[Variant]
    codebook_type: ClassVar[type[Codebook]] = Codebook

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder, self.decoder = Encoder(self.variant, sizes), Decoder(self.variant, sizes)
        self.quantize = self.codebook_type(sizes.codes, sizes.dim)
        if self.variant.projection:
            self.quant_conv = nn.Conv2d(sizes.z_channels, sizes.dim, 1)
            self.post_quant_conv = nn.Conv2d(sizes.dim, sizes.z_channels, 1)
        described = {name: value for name, value in asdict(sizes).items() if name not in ("mid_blocks", "patch")}
        self.identity: dict[str, Any] = {"kind": "vqgan", "layout": self.layout, **described, "sha256": None}

    @property
    def codebook(self) -> Tensor:
        """(K, D) float, the table of codes."""
        return self.quantize.table

    @property
    def codebook_size(self) -> int:
        """K; ids are 0 .. K - 1."""
        return self.sizes.codes

    @property
    def stride(self) -> int:
        """Pixels per grid cell and side."""
        return self.sizes.stride

    def grid(self, image_size: int) -> tuple[int, int]:
        """(rows, columns) of the cells of a square image; WeightsError when the stride does not divide its side."""
        if image_size % self.stride or image_size <= 0:
            near = max(1, round(image_size / self.stride)) * self.stride
            raise WeightsError(
                f"image size {image_size} is not a multiple of the tokenizer's stride {self.stride}: set pixels.size "
                f"to one, such as {near}"
            )
        return image_size // self.stride, image_size // self.stride

    def encode_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> latents before quantisation, (B, D, H / stride, W / stride)."""
        height, width = images.shape[-2:]
        if images.ndim != 4 or images.shape[1] != 3 or height % self.stride or width % self.stride:
            raise ValueError(
                f"images are {tuple(images.shape)}, expected (B, 3, H, W), sides in multiples of {self.stride}"
            )
        z = self.encoder(images * 2 - 1 if self.variant.signed else images)
        return self.quant_conv(z) if self.variant.projection else z

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L) int64, L a square number, row-major -> codes on the grid, (B, D, sqrt L, sqrt L)."""
        side = math.isqrt(tokens.shape[1])
        if tokens.ndim != 2 or side * side != tokens.shape[1]:
            raise ValueError(f"tokens are {tuple(tokens.shape)}, expected (B, L) with L a square number")
        return self.quantize.lookup(tokens).mT.unflatten(2, (side, side))

    def decode_features(self, z: Tensor) -> Tensor:
        """Quantised latents (B, D, h, w) -> images (B, 3, h * stride, w * stride), nominal [0, 1], not clipped."""
        x = self.decoder(self.post_quant_conv(z) if self.variant.projection else z)
        return x / 2 + 0.5 if self.variant.signed else x

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> token ids (B, L) int64, L = (H / stride) * (W / stride), row-major.

        Float32 products keep all their bits unless autocast is on: TF32 changes which code is nearest.
        """
        with exact_float32():
            return self.quantize(self.encode_features(images))

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """(B, L) token ids -> images (B, 3, H, W), nominal [0, 1], not clipped."""
        return self.decode_features(self.embed(tokens))

    forward = encode

    @classmethod
    def renamed(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under the module's names; the published names of most layouts are those already."""
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], path: Path, ema: bool = True) -> Self:
        """Build the module that a state dict of this layout describes; WeightsError where sizes contradict each other.

        ema: use averaged weights where the state dict holds them beside the plain ones.
        """
        state = {name: tensor for name, tensor in tensors.items() if not name.startswith(cls.ignored)}
        if ema and cls.averaged:
            state = averaged_copies(state, tensors, path)
        state = cls.renamed(state)
        sizes = cls.infer_sizes(state, path)
        with torch.device("meta"):
            model = cls(sizes)
        refuse_misfit(state, model.state_dict(), path, f"a {cls.layout} tokenizer of widths {sizes.widths}")
        # Clones: published fixtures may share one storage among tensors.
        model.load_state_dict({name: tensor.float().clone() for name, tensor in state.items()}, assign=True)
        return model

    @classmethod
    def infer_sizes(cls, state: dict[str, Tensor], path: Path) -> Sizes:
        """The sizes that the tensors' names and shapes describe."""

        def count(pattern: str) -> int:
            return len({match[0] for name in state if (match := re.match(pattern, name))})

        try:
            levels = range(count(r"encoder\.down\.\d+\."))
            z_channels = state["encoder.conv_out.weight"].shape[0]
            codes, dim = cls.codebook_shape(state)
            sizes = Sizes(
                stem=state["encoder.conv_in.weight"].shape[0],
                widths=tuple(state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in levels),
                blocks=count(r"encoder\.down\.0\.block\.\d+\."),
                decoder_blocks=count(r"decoder\.up\.0\.block\.\d+\."),
                mid_blocks=count(r"encoder\.mid\.block_\d+\."),
                z_channels=z_channels,
                codes=codes,
                dim=dim,
                attention=tuple(i for i in levels if f"encoder.down.{i}.attn.0.q.weight" in state),
                strided="encoder.down.0.downsample.conv.weight" in state,
                patch=cls.patch_of(state),
            )
        except (KeyError, IndexError) as error:
            raise WeightsError(f"{path} is not a whole {cls.layout} tokenizer: {error} is missing") from None
        odd = [width for width in (sizes.stem, *sizes.widths) if width % GROUPS or width == 0]
        if odd or not sizes.widths or not sizes.decoder_blocks:
            raise WeightsError(
                f"{path} is not a {cls.layout} tokenizer: its levels have {sizes.widths} channels, which group norm "
                f"needs in multiples of {GROUPS}"
            )
        return sizes

    @classmethod
    def patch_of(cls, state: dict[str, Tensor]) -> int:
        """Pixels per side of a position of the finest level; 1 in every published layout."""
        return 1

    @classmethod
    def codebook_shape(cls, state: dict[str, Tensor]) -> tuple[int, int]:
        """(K, D), from the tensors."""
        return tuple(state["quantize.embedding.weight"].shape)


def averaged_copies(state: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The averaged copies of `state` among `tensors`, or `state` itself where there are none.

    WeightsError when some tensors have a copy and others have none.
    """
    copies = {name: tensors.get(AVERAGED + name.replace(".", "")) for name in state}
    missing = [name for name, copy in copies.items() if copy is None]
    if len(missing) == len(state):
        return state
    if missing:
        raise WeightsError(f"{path} holds averaged weights of some tensors only; {missing[0]} has none")
    return copies


def save_tokenizer(model: ConvTokenizer, path: str | os.PathLike, dtype: torch.dtype = torch.float32) -> None:
    """Write `{"state_dict": ...}` of `dtype` under the module's own names; same weights give the same bytes."""
    state = {
        name: tensor.detach().to("cpu", dtype, memory_format=torch.contiguous_format, copy=True)
        for name, tensor in model.state_dict().items()
    }
    with atomic_write(path) as staged, staged.open("wb") as file:  # a file object, since torch stores a path's name
        torch.save({"state_dict": state}, file)
