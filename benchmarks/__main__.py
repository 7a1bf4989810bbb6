"""``python -m benchmarks``: the table of the operators."""

from benchmarks.operators import main

main()
