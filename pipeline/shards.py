"""Token shards, format 1: the door. Write, open, verify; `shards/README.md` says the format in words."""

from pipeline.shards_format import FILL, FORMAT, VERSION, Block, NotShardsError, ShardSpec
from pipeline.shards_read import LazyArray, LoadedTokens, TokenShards, open_shards
from pipeline.shards_verify import Report, verify_shards
from pipeline.shards_write import count_tokens, write_shards

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
