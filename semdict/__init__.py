"""semdict: image datasets as pairs of aligned token ids, and trainers for them.

The functions that other programs use are importable from here. Importing the package itself is cheap: each function
brings its libraries when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from semdict.pipeline.shards import open_shards
    from semdict.pipeline.tokenizers import load_features, load_tokenizer

__version__ = "0.1.0"
__all__ = ["load_features", "load_model", "load_tokenizer", "open_shards"]

_MODULES = {
    "load_features": "semdict.pipeline.tokenizers",
    "load_tokenizer": "semdict.pipeline.tokenizers",
    "open_shards": "semdict.pipeline.shards",
}
# kind of a model file -> class that it is opened as
_MODELS = {
    "semdict-pretrained": ("semdict.train.masked.model", "MaskedTokenTransformer"),
    "semdict-conditional": ("semdict.train.masked.class_conditional_model", "ConditionalTransformer"),
    "semdict-classifier": ("semdict.train.eval.classifier", "Classifier"),
    "semdict-vcq-tokenizer": ("semdict.train.vcq.tokenizer", "Tokenizer1d"),
    "semdict-ar": ("semdict.train.ar.model", "ArModel"),
}


def load_model(
    path: str, num_heads: int | None = None, decoder_num_heads: int | None = None, device: str = "cpu"
) -> "nn.Module":
    """The model in a run's folder, in its file, or in a released MAGE, Sorcen or LEASE checkpoint.

    Frozen, in evaluation mode: a MaskedTokenTransformer, ConditionalTransformer, Classifier, Tokenizer1d or ArModel.
    Head counts are needed only for released checkpoints of unpublished widths. WeightsError for another file.
    """
    from semdict.pipeline.common.errors import WeightsError
    from semdict.train.engine import model_file
    from semdict.train.masked.released import load_released

    kind = model_file.model_kind(path)
    if kind is None:
        model = load_released(model_file.model_path(path), num_heads, decoder_num_heads).to(device).eval()
    elif kind not in _MODELS:
        raise WeightsError(f"{path} holds a model of the unknown kind {kind!r}; known: {', '.join(_MODELS)}")
    else:
        module, name = _MODELS[kind]
        model, _ = model_file.load_model(path, getattr(import_module(module), name), device)
    return model.requires_grad_(False)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
