"""Existing Glow code made faster: :func:`accelerate`, :func:`restore`, and what they report; :func:`convert`.

A file per dialect says what its layers look like and how they are computed with the operators; the others recognise,
probe, prove, patch and report. No other project is imported.
"""

from glow_kernels.interop.convert import Conversion, convert
from glow_kernels.interop.engine import accelerate, restore
from glow_kernels.interop.proof import Agreement
from glow_kernels.interop.report import LayerReport, Report

__all__ = ["Agreement", "Conversion", "LayerReport", "Report", "accelerate", "convert", "restore"]
