"""Improvements that the report lists for several dialects; tests demonstrate each of them on the original code."""

from __future__ import annotations

NO_SYNC = "ActNorm does not wait for the device to ask whether it is initialised"
STABLE = "log s is computed as log(sigmoid), not as the log of a sigmoid that may have underflowed"
DOUBLE = "log|det W| is computed in float64"
DOUBLE_INVERSE = "the inverse of the 1x1 convolution is computed in float64"
