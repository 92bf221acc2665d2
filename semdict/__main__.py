"""`python -m semdict` is `semdict`."""

import sys

from semdict.cli import main

sys.exit(main())
