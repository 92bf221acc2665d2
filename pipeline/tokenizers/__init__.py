"""Image tokenizers and feature models by file or name: `load_tokenizer`, `load_features`."""

from semdict.pipeline.tokenizers.registry import load_tokenizer
from semdict.pipeline.tokenizers.teachers import load_features

__all__ = ["load_features", "load_tokenizer"]
