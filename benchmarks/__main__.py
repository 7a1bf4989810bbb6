"""``python -m benchmarks``: the same as ``glow-kernels bench``."""

import sys

from glow_kernels.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
