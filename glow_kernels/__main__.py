"""``python -m glow_kernels`` runs the command line."""

import sys

from glow_kernels.cli import main

sys.exit(main())
