"""Measures of token sets: entropy along the sequence, co-occurrence of the two codebooks, curves and figures."""

from semdict.pipeline.analysis.estimates import conditional_entropy

__all__ = ["conditional_entropy"]
