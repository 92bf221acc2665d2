"""Campaign of faults: kills at every file event, flipped bits in every kind of file, and bad inputs, with fixed seeds.

`make campaign` runs it (`python -m tests.campaign --help`), `make test` does not. docs/reliability.md shows its counts.
"""
