"""``python -m glow_kernels`` is the command line."""

import sys

from glow_kernels.cli import main

sys.exit(main())
