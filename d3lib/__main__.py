"""`python -m d3lib` is the `d3lib` command."""

import sys

from d3lib.cli import main

sys.exit(main())
