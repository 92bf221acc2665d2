"""semdict: image datasets as pairs of aligned token dictionaries, and trainers for them."""

__version__ = "0.1.0"
