"""Image tokenizers and feature models by file or name: `load_tokenizer`, `load_features`."""

from semdict.pipeline.tokenizers.registry import inspect_tokenizer, load_tokenizer
from semdict.pipeline.tokenizers.teachers import inspect_features, load_features

__all__ = ["inspect_features", "inspect_tokenizer", "load_features", "load_tokenizer"]
