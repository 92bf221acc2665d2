"""Token shards, format 2: write, open, verify, import and export. `shards/README.md` describes the format."""

from semdict.pipeline.shards.format import FORMAT, VERSION, Block, NotShardsError, ShardSpec
from semdict.pipeline.shards.ids import FILL, filler, id_dtype
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
    "filler",
    "id_dtype",
    "open_shards",
    "verify_shards",
    "write_shards",
]
