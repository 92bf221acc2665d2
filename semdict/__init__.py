"""semdict: image datasets as pairs of aligned token ids, and trainers for them.

The functions that other programs use are importable from here. Importing the package itself is cheap: each function
brings its libraries when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semdict.pipeline.shards import open_shards
    from semdict.pipeline.tokenizers import load_features, load_tokenizer
    from semdict.train.masked.model import MaskedTokenTransformer

__version__ = "0.1.0"
__all__ = ["load_features", "load_model", "load_tokenizer", "open_shards"]

_MODULES = {
    "load_features": "semdict.pipeline.tokenizers",
    "load_tokenizer": "semdict.pipeline.tokenizers",
    "open_shards": "semdict.pipeline.shards",
}


def load_model(
    path: str, num_heads: int | None = None, decoder_num_heads: int | None = None, device: str = "cpu"
) -> "MaskedTokenTransformer":
    """The masked model in a run's folder, in its model.pt or in a released MAGE, Sorcen or LEASE checkpoint.

    Frozen, in evaluation mode. Head counts are needed only for released checkpoints of unpublished widths. WeightsError
    for another file.
    """
    from semdict.train.masked.encoder import load_encoder

    return load_encoder(path, num_heads, decoder_num_heads, device).model


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
