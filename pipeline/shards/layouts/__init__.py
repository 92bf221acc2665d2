"""One module per layout that token sets are imported from or exported to; `shards/formats.py` has the tables."""
