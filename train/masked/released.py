"""Published MAGE, Sorcen and LEASE checkpoints: read into the one model, and written back in their own layouts.

Tensors of a file that the model does not use (unused embeddings, a tokenizer, an online classifier, the teacher) are
kept with the model and written back unchanged. Optimiser state is not kept.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.files import atomic_write
from semdict.pipeline.common.safeload import load_checkpoint, state_dict_of
from semdict.train.engine.ema import Ema
from semdict.train.engine.layers import pos2d
from semdict.train.masked.model import MaskedTokenTransformer, ModelConfig
from semdict.train.masked.vocab import LEASE, MAGE, SORCEN, Vocab

VOCABS = {"mage": MAGE, "sorcen": SORCEN, "lease": LEASE}
DECODER_ROWS = {"mage": 257, "sorcen": 257, "lease": 385}
GRID, CELLS = 16, 256
HEADS = {768: 12, 1024: 16}  # of the released encoders; a checkpoint does not hold head counts
DECODER_HEADS = {768: 16, 1024: 16}

# published prefix of a tensor's name -> prefix in this project; other tensors are not used by the model
PREFIXES = {
    "token_emb.word_embeddings.": "token_emb.word.",
    "token_emb.position_embeddings.": "token_emb.position.",
    "token_emb.LayerNorm.": "token_emb.norm.",
    "blocks.": "blocks.",
    "norm.": "norm.",
    "decoder_embed.": "decoder_embed.",
    "decoder_pos_embed_learned": "decoder_position.weight",
    "decoder_blocks.": "decoder_blocks.",
    "decoder_norm.": "decoder_norm.",
    "mlm_layer.fc.": "token_head.fc.",
    "mlm_layer.ln.": "token_head.norm.",
    "mlm_layer.bias": "token_head.bias",
    "proj_to_dino.0.": "proj_to_dino.",
    "dec_to_dino.": "dec_to_dino.",
    "projector.projector.": "projector.",
    "predictor.projector.": "predictor.",
}
TEACHER = {"blocks_momentum.": "parts.blocks.", "momentum_projector.projector.": "parts.projector."}


@dataclass
class Kept:
    """Tensors of a released file that the model does not use, by their published names, and the file's epoch."""

    family: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    epoch: int = 0


def load_released(
    path: str | os.PathLike, num_heads: int | None = None, decoder_num_heads: int | None = None
) -> MaskedTokenTransformer:
    """Read a published MAGE, Sorcen or LEASE checkpoint, or one written by `save_released`; evaluation mode, CPU.

    Head counts are not in a checkpoint: those of the released widths (768, 1024) are known, others must be passed.
    `model.released` keeps what the model does not use. WeightsError names both sides when the file is of another family
    or size. The model offers family, mask_token, codebook_size, features and logits.
    """
    path = Path(path)
    contents = load_checkpoint(path)
    state = state_dict_of(contents, path)
    family = _family(path, state)
    config = _config(path, state, family, num_heads, decoder_num_heads)
    model = MaskedTokenTransformer(config)
    ours = {_renamed(name, PREFIXES): (name, value) for name, value in state.items() if _renamed(name, PREFIXES)}
    _fill(path, model, ours)
    if model.pos2d is not None and "pos2d" in state:
        _expect(path, "pos2d", state["pos2d"], (1, *model.pos2d.shape))
        model.pos2d.copy_(state["pos2d"][0])
    used = {name for name, _ in ours.values()}
    epoch = contents.get("epoch", 0)
    kept = {name: value for name, value in state.items() if name not in used}
    model.released = Kept(family, kept, epoch if isinstance(epoch, int) else 0)
    return model.eval()


def released_teacher(model: MaskedTokenTransformer) -> Ema:
    """Sorcen's averaged copy as a file stored it, to hand to `semdict.train.masked.objectives.Sorcen(teacher=...)`."""
    kept = getattr(model, "released", None)
    teacher = Ema(model, ("blocks", "projector"))
    ours = {_renamed(k, TEACHER): v for k, v in (kept.tensors if kept else {}).items() if _renamed(k, TEACHER)}
    if ours.keys() != teacher.state_dict().keys():
        raise WeightsError("this model was not read from a Sorcen checkpoint with its teacher (blocks_momentum.*)")
    teacher.load_state_dict(ours)
    return teacher


def save_released(
    model: MaskedTokenTransformer,
    path: str | os.PathLike,
    family: str,
    teacher: Ema | None = None,
    centroids: Tensor | None = None,
) -> None:
    """Write `model` in the published layout of `family` ({"model": tensors by published name, "epoch": int}).

    A model from `load_released` is written with the same tensors, unused ones included. A model trained here gets the
    published vocabulary (unused rows zero) and zeros for tensors of the layout that nothing uses. `teacher`: the
    average of a Sorcen run; by default the file's own, else a copy of the student. `centroids`: (K, D), stored as unit
    rows, needed for LEASE unless the model's file had them. WeightsError when the model is of another family, grid or
    code count.
    """
    c = model.config
    kept = getattr(model, "released", None) or Kept(family)
    if (c.family, kept.family, c.grid, c.vocab.codes) != (family, family, GRID, VOCABS[family].codes):
        raise WeightsError(
            f"{path}: the {family} layout holds grid {GRID} and {VOCABS[family].codes} codes, "
            f"this is a {c.family} model with grid {c.grid} and {c.vocab.codes} codes"
        )
    tensors = {**_unused(model, family, centroids, kept), **kept.tensors, **_published(model, family)}
    if family == "sorcen" and (teacher or "blocks_momentum.0.norm1.weight" not in kept.tensors):
        averaged = (teacher or Ema(model, ("blocks", "projector"))).state_dict()
        tensors.update({_renamed(name, _inverse(TEACHER)): value for name, value in averaged.items()})
    if centroids is not None and family == "lease":
        tensors["dino_codebook"] = torch.nn.functional.normalize(centroids.float(), dim=1)
    whole = {name: value.detach().cpu().clone() for name, value in tensors.items()}
    with atomic_write(path) as staged, staged.open("wb") as file:  # torch would store the temporary name of a path
        torch.save({"model": whole, "epoch": kept.epoch}, file)


def _family(path: Path, state: dict[str, Tensor]) -> str:
    """The family of a state dict, from its token table and the tensors that only one family has."""
    table = state.get("token_emb.word_embeddings.weight")
    rows = table.shape[0] if table is not None else None
    if rows == LEASE.rows and "proj_to_dino.0.weight" in state:
        return "lease"
    if rows == SORCEN.rows and "predictor.projector.0.weight" in state:
        return "sorcen"
    if rows == MAGE.rows and "proj_to_dino.0.weight" not in state:
        return "mage"
    got = f"a token table of {rows} rows" if rows else "no token_emb.word_embeddings.weight"
    first = ", ".join(list(state)[:3]) or "no tensors"
    raise WeightsError(
        f"{path} is not a released checkpoint of MAGE or Sorcen ({MAGE.rows} rows) or LEASE ({LEASE.rows} rows, "
        f"proj_to_dino.0.weight): it has {got}; first tensors: {first}"
    )


def _config(
    path: Path, state: dict[str, Tensor], family: str, heads: int | None, decoder_heads: int | None
) -> ModelConfig:
    """The configuration from the tensors' shapes; head counts from the caller or the released sizes."""
    width = state["token_emb.word_embeddings.weight"].shape[1]
    if "decoder_embed.weight" not in state:
        raise WeightsError(f"{path} has no decoder (decoder_embed.weight): an encoder alone is not enough")
    decoder_width = state["decoder_embed.weight"].shape[0]
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return ModelConfig(
        family=family,
        vocab=VOCABS[family],
        width=width,
        depth=_depth(state, "blocks."),
        heads=_heads(path, "num_heads", heads, HEADS, width),
        decoder_width=decoder_width,
        decoder_depth=_depth(state, "decoder_blocks."),
        decoder_heads=_heads(path, "decoder_num_heads", decoder_heads, DECODER_HEADS, decoder_width),
        mlp_ratio=shapes.get("blocks.0.mlp.fc1.weight", (4 * width,))[0] // width,
        grid_code=family == "lease",
        visible="add" if family == "lease" else "replace",
        decoder_rows=shapes.get("decoder_pos_embed_learned", (1, DECODER_ROWS[family]))[1],
        encoder_projection=shapes.get("proj_to_dino.0.weight", (0,))[0],
        decoder_projection=shapes.get("dec_to_dino.weight", (0,))[0],
        projector=_head_widths(shapes, "projector.projector"),
        predictor=_head_widths(shapes, "predictor.projector"),
    )


def _heads(path: Path, name: str, heads: int | None, known: dict[int, int], width: int) -> int:
    if heads is None and width not in known:
        raise WeightsError(
            f"{path}: width {width} is none of the released {sorted(known)}, and a checkpoint does not hold its head "
            f"count; pass {name}="
        )
    heads = known[width] if heads is None else heads
    if heads < 1 or width % heads:
        raise WeightsError(f"{path}: {name} {heads} does not divide the width {width}")
    return heads


def _depth(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max((int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix)), default=-1)


def _head_widths(shapes: dict[str, tuple], name: str) -> tuple[int, int] | None:
    first, last = shapes.get(f"{name}.0.weight"), shapes.get(f"{name}.3.weight")
    return (first[0], last[0]) if first and last else None


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    """`name` with its prefix replaced, "" where it has none of `prefixes`."""
    for theirs, ours in prefixes.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return ""


def _inverse(prefixes: dict[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in prefixes.items()}


def _fill(path: Path, model: MaskedTokenTransformer, ours: dict[str, tuple[str, Tensor]]) -> None:
    """Load the tensors; WeightsError names those that are missing, unexpected or of another shape."""
    want = model.state_dict()
    if missing := sorted(want.keys() - ours.keys()):
        names = ", ".join(_renamed(name, _inverse(PREFIXES)) for name in missing[:4])
        raise WeightsError(f"{path} lacks {len(missing)} tensors of a {model.family} checkpoint: {names}")
    if unexpected := sorted(ours.keys() - want.keys()):
        raise WeightsError(
            f"{path} holds tensors no {model.family} checkpoint has: {', '.join(ours[n][0] for n in unexpected[:4])}"
        )
    for name, (theirs, value) in ours.items():
        shape = tuple(want[name].shape)
        flat = {"decoder_position.weight": (1, *shape), "token_head.bias": (1, 1, *shape)}
        _expect(path, theirs, value, flat.get(name, shape))
    model.load_state_dict({name: value.reshape(want[name].shape) for name, (_, value) in ours.items()})


def _expect(path: Path, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != tuple(shape):
        raise WeightsError(f"{path}: {name} has shape {tuple(value.shape)}, the other tensors need {tuple(shape)}")


def _published(model: MaskedTokenTransformer, family: str) -> dict[str, Tensor]:
    """The model's own tensors under their published names, in the published vocabulary and shapes."""
    vocab, names = model.config.vocab, _inverse(PREFIXES)
    tensors = {_renamed(name, names): value for name, value in model.state_dict().items()}
    for name in ("token_emb.word_embeddings.weight", "mlm_layer.bias"):
        tensors[name] = _reorder(tensors[name], vocab, VOCABS[family])
    tensors["mlm_layer.bias"] = tensors["mlm_layer.bias"][None, None]
    position = tensors["decoder_pos_embed_learned"]
    missing = max(0, DECODER_ROWS[family] - position.shape[0])
    tensors["decoder_pos_embed_learned"] = torch.cat([position, position.new_zeros(missing, position.shape[1])])[None]
    return tensors


def _reorder(table: Tensor, vocab: Vocab, want: Vocab) -> Tensor:
    """A table of `vocab` with its rows where `want` has them; rows that are never used are zero."""
    if vocab == want:
        return table
    moved = table.new_zeros(want.rows, *table.shape[1:])
    moved[: want.codes] = table[: want.codes]
    moved[want.cls], moved[want.mask] = table[vocab.cls], table[vocab.mask]
    return moved


def _unused(model: MaskedTokenTransformer, family: str, centroids: Tensor | None, kept: Kept) -> dict[str, Tensor]:
    """Tensors that the published classes expect in a file though nothing reads them."""
    if kept.tensors:
        return {}
    c = model.config
    tensors = {
        "token_emb.position_ids": torch.arange(CELLS + 1)[None],
        "cls_token": torch.zeros(1, 1, c.width),
        "mask_token": torch.zeros(1, 1, c.decoder_width),
    }
    if family == "lease":
        if centroids is None:
            raise WeightsError("the LEASE layout holds the centroids: pass centroids=")
        return {
            **tensors,
            "pos2d": pos2d(c.width, GRID)[None],
            "dec_to_dino.weight": torch.zeros(c.encoder_projection, c.decoder_width),
        }
    for name, width in (("pos_embed", c.width), ("decoder_pos_embed", c.decoder_width)):
        tensors[name] = torch.cat([torch.zeros(1, width), pos2d(width, GRID)])[None]
    patch = {"patch_embed.proj.weight": (c.width, 3, 16, 16), "patch_embed.proj.bias": (c.width,)}
    pixels = {"decoder_pred.weight": (3 * 16 * 16, c.decoder_width), "decoder_pred.bias": (3 * 16 * 16,)}
    return {**tensors, **{name: torch.zeros(shape) for name, shape in {**patch, **pixels}.items()}}
