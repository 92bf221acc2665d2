"""One module per layout that token sets are imported from or exported to; `shards/convert.py` has the tables."""
