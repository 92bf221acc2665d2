"""Token shards, format 1: the door. Write, open, verify; `shards/README.md` says the format in words."""

from semdict.pipeline.shards.format import FILL, FORMAT, VERSION, Block, NotShardsError, ShardSpec
from semdict.pipeline.shards.reader import LazyArray, LoadedTokens, TokenShards, open_shards
from semdict.pipeline.shards.verify import Report, verify_shards
from semdict.pipeline.shards.writer import count_tokens, write_shards

__all__ = [
    "FILL",
    "FORMAT",
    "VERSION",
    "Block",
    "LazyArray",
    "LoadedTokens",
    "NotShardsError",
    "Report",
    "ShardSpec",
    "TokenShards",
    "count_tokens",
    "open_shards",
    "verify_shards",
    "write_shards",
]
