"""The autoregressive model: a Llama-style decoder that predicts the codes of an image one position after the other.

Rotary positions, SwiGLU, one adaLN projection shared by all layers (VAR, arXiv:2404.02905) and driven by the class; the
vocabulary of position t is its first K_t codes. Shapes: B images, L positions, E width, H heads, V codes.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semdict.train.ar.head import grouped_nll, masked_logits
from semdict.train.engine.rng import rand_rows

MASK_MODES = ("train", "sample_only", "off")


@dataclass(frozen=True)
class ArConfig:
    """Everything that decides the shape and the dropout of an AR model; written into its checkpoint."""

    depth: int = 12
    width: int = 768
    heads: int = 12
    sizes: tuple[int, ...] = (16384,) * 256  # codes allowed at each position
    classes: int = 1000
    mask_vocab: str = "train"  # of MASK_MODES: where logits k >= K_t are -inf
    dropout: float = 0.1  # residual branches and feed-forward
    token_dropout: float = 0.1  # embedded input sequence
    attention_dropout: float = 0.1
    rope_base: float = 10000.0
    groups: int = 16  # position groups of the head

    @property
    def vocab(self) -> int:
        """Codes in the largest codebook."""
        return max(self.sizes)

    @property
    def hidden(self) -> int:
        """SwiGLU width: 8/3 of the width, up to a multiple of 16."""
        return -(-8 * self.width // 48) * 16


SHAPES = {"tiny": (2, 64, 2), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (32, 1280, 20)}  # depth, width, heads


def preset(name: str, sizes: tuple[int, ...], **changes) -> ArConfig:
    """The configuration of a named size (of SHAPES) for a tokenizer's per-position codebook sizes."""
    depth, width, heads = SHAPES[name]
    return ArConfig(depth, width, heads, tuple(int(k) for k in sizes), **changes)


class KvCache:
    """Keys and values of all layers, (depth, 2, B, H, L, D), allocated once and filled from the front."""

    def __init__(self, config: ArConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.depth, 2, batch, config.heads, len(config.sizes), config.width // config.heads)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)

    def extend(self, layer: int, start: int, k_BHSD: Tensor, v_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values at [start, start + S) and return those of [0, start + S)."""
        stop = start + k_BHSD.shape[2]
        self.kv[layer, 0, :, :, start:stop], self.kv[layer, 1, :, :, start:stop] = k_BHSD, v_BHSD
        return self.kv[layer, 0, :, :, :stop], self.kv[layer, 1, :, :, :stop]


class Layer(nn.Module):
    """x += gate * attention(modulated norm(x)); x += gate * SwiGLU(modulated norm(x)). No biases."""

    def __init__(self, config: ArConfig, index: int) -> None:
        super().__init__()
        E = config.width
        self.index, self.heads = index, config.heads
        self.drop_p, self.attention_drop_p = config.dropout, config.attention_dropout
        self.qkv = nn.Linear(E, 3 * E, bias=False)
        self.proj = nn.Linear(E, E, bias=False)
        self.gate_up = nn.Linear(E, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, E, bias=False)
        self.adaln_offset = nn.Parameter(torch.zeros(6, E))

    def forward(self, x_BSE: Tensor, shared_B6E: Tensor, rope: Tensor, cache: KvCache | None, start: int) -> Tensor:
        """S positions from `start` on; with a cache they attend to all that came before."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (shared_B6E + self.adaln_offset).unsqueeze(2).unbind(1)
        attended = self._attend(_modulate(x_BSE, shift1, scale1), rope, cache, start)
        x_BSE = x_BSE + gate1 * self._drop(self.proj(attended))
        gate, up = self.gate_up(_modulate(x_BSE, shift2, scale2)).chunk(2, -1)
        return x_BSE + gate2 * self._drop(self.down(self._drop(F.silu(gate) * up)))

    def _attend(self, x_BSE: Tensor, rope: Tensor, cache: KvCache | None, start: int) -> Tensor:
        B, S, E = x_BSE.shape
        q, k, v = self.qkv(x_BSE).view(B, S, 3, self.heads, E // self.heads).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, rope), rotate(k, rope)
        mask = None
        if cache is not None:
            k, v = cache.extend(self.index, start, k.to(cache.kv.dtype), v.to(cache.kv.dtype))
            q = q.to(cache.kv.dtype)
            if S > 1 and start:  # is_causal aligns to the top left, which is right only from position 0 on
                mask = torch.ones(S, start + S, dtype=torch.bool, device=q.device).tril(start)
        drop = self.attention_drop_p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, mask, drop, is_causal=S > 1 and mask is None)
        return out.transpose(1, 2).reshape(B, S, E)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.drop_p, self.training)


class ArModel(nn.Module):
    """Class -> codes. The start token is the class embedding; its row `classes` means no class."""

    KIND, COMMAND = "semdict-ar", "semdict ar train"

    def __init__(self, config: ArConfig, seed: int = 0) -> None:
        super().__init__()
        if config.mask_vocab not in MASK_MODES:
            raise ValueError(f"mask_vocab {config.mask_vocab!r} is unknown; known: {', '.join(MASK_MODES)}")
        if config.width % (2 * config.heads):
            raise ValueError(f"width {config.width} is not an even multiple of heads {config.heads}")
        self.config = config
        E = config.width
        self.embed = nn.Embedding(config.vocab, E)
        self.class_embed = nn.Embedding(config.classes + 1, E)
        self.adaln = nn.Linear(E, 6 * E)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.depth))
        self.norm = nn.RMSNorm(E, eps=1e-6)
        self.head = nn.Linear(E, config.vocab, bias=False)
        self.register_buffer(
            "rope", rope_table(len(config.sizes), E // config.heads, config.rope_base), persistent=False
        )
        self._init(torch.Generator().manual_seed(seed))

    def config_dict(self) -> dict[str, Any]:
        """The configuration as plain data, for a model file."""
        return asdict(self.config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ArModel":
        """A module of the configuration that `config_dict` gave."""
        return cls(ArConfig(**{**config, "sizes": tuple(config["sizes"])}))

    @property
    def null_class(self) -> int:
        """The label of "no class"."""
        return self.config.classes

    def sizes(self, purpose: str) -> tuple[int, ...]:
        """Codes allowed at each position for purpose "train" or "sample", as `mask_vocab` says."""
        mode = self.config.mask_vocab
        masked = mode == "train" or (mode == "sample_only" and purpose == "sample")
        return self.config.sizes if masked else (self.config.vocab,) * len(self.config.sizes)

    def no_weight_decay(self) -> set[str]:
        """Adaptive-norm parameters are not decayed, besides biases and norms (VCQ, appendix A)."""
        return {name for name, _ in self.named_parameters() if "adaln" in name}

    def forward(self, ids_BL: Tensor, labels_B: Tensor) -> Tensor:
        """(B, L) int64 codes, (B,) classes -> (B, L, V) float32 logits.

        Row t predicts ids_BL[:, t] from the ids before it. Logits that `mask_vocab` excludes in training are -inf.
        """
        return masked_logits(self.hidden(ids_BL, labels_B), self.head.weight, self.sizes("train"))

    def loss(self, ids_BL: Tensor, labels_B: Tensor) -> Tensor:
        """Mean negative log-likelihood in nats per token, a scalar; no (B, L, V) tensor is allocated."""
        return self.nll(ids_BL, labels_B).mean()

    def nll(self, ids_BL: Tensor, labels_B: Tensor) -> Tensor:
        """(B, L) float32 nats per token under the training vocabulary."""
        hidden_BLE = self.hidden(ids_BL, labels_B)
        return grouped_nll(hidden_BLE, self.head.weight, ids_BL, self.sizes("train"), self.config.groups)

    def hidden(self, ids_BL: Tensor, labels_B: Tensor) -> Tensor:
        """(B, L, E) normed outputs: position t has seen the class and ids_BL[:, :t]."""
        condition_BE = self.class_embed(labels_B)
        x_BLE = torch.cat([condition_BE[:, None], self.embed(ids_BL[:, :-1])], 1)
        x_BLE = F.dropout(x_BLE, self.config.token_dropout, self.training)
        return self._run(x_BLE, self.modulation(labels_B), None, 0)

    def modulation(self, labels_B: Tensor) -> Tensor:
        """(B, 6, E): shift, scale, gate of both branches, before each layer's own offsets; once per sequence."""
        return self.adaln(F.silu(self.class_embed(labels_B))).view(len(labels_B), 6, -1)

    def step(self, ids_BS: Tensor | None, labels_B: Tensor, shared_B6E: Tensor, cache: KvCache, start: int) -> Tensor:
        """(B, S, E) outputs at positions [start, start + S), through the cache.

        ids_BS: the codes *before* those positions (None at start 0 with S = 1, where the class is the input).
        """
        x_BSE = self.class_embed(labels_B)[:, None] if ids_BS is None else self.embed(ids_BS)
        return self._run(x_BSE, shared_B6E, cache, start)

    def _run(self, x_BSE: Tensor, shared_B6E: Tensor, cache: KvCache | None, start: int) -> Tensor:
        rope = self.rope[:, start : start + x_BSE.shape[1]]
        for layer in self.layers:
            x_BSE = layer(x_BSE, shared_B6E, rope, cache, start)
        return self.norm(x_BSE)

    @torch.no_grad()
    def _init(self, rng: torch.Generator) -> None:
        """Normal 0.02, residual outputs by depth; adaLN zero, so that every layer starts as the identity."""
        if self.head.weight.is_meta:
            return
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and "adaln" not in name:
                residual = name.endswith(("proj.weight", "down.weight"))
                parameter.normal_(0, 0.02 / (2 * self.config.depth) ** 0.5 if residual else 0.02, generator=rng)
        for parameter in (self.adaln.weight, self.adaln.bias):
            parameter.zero_()


def rope_table(length: int, dim: int, base: float) -> Tensor:
    """(2, length, dim / 2) float32 cosines and sines of t * base^(-2 i / dim) (RoFormer, arXiv:2104.09864)."""
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x_BHSD: Tensor, rope_2SD: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of each head by their position's angles; float32 inside, the input's type outside."""
    cos, sin = rope_2SD
    a, b = x_BHSD.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x_BHSD.dtype)


def _modulate(x_BSE: Tensor, shift_B1E: Tensor, scale_B1E: Tensor) -> Tensor:
    """RMS norm without weights, then the class's scale and shift."""
    return F.rms_norm(x_BSE, x_BSE.shape[-1:], eps=1e-6) * (1 + scale_B1E) + shift_B1E


def drop_labels(labels_B: Tensor, probability: float, null_class: int, rng: torch.Generator) -> Tensor:
    """(B,) labels, each replaced by `null_class` with that probability; for classifier-free guidance."""
    dropped_B = rand_rows(len(labels_B), rng=rng).to(labels_B.device) < probability
    return torch.where(dropped_B, null_class, labels_B)


@torch.no_grad()
def nll_bits(model: ArModel, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, int]:
    """((L,) float64 mean bits per position, number of images) over (ids (B, L), labels (B,)) batches, in eval mode.

    ValueError when there is no batch. The sum over positions is bits per image.
    """
    training = model.training
    model.eval()
    total_L, images = None, 0
    try:
        for ids_BL, labels_B in batches:
            bits_L = model.nll(ids_BL, labels_B).double().sum(0) / math.log(2)
            total_L = bits_L if total_L is None else total_L + bits_L
            images += len(ids_BL)
    finally:
        model.train(training)
    if total_L is None:
        raise ValueError("no tokens to measure the likelihood on")
    return (total_L / images).cpu(), images
