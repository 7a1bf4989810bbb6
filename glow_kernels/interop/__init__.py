"""Make existing Glow code faster (:func:`accelerate`, :func:`restore`) and convert its weights (:func:`convert`).

Each dialect has a module that describes its layers and computes them with the operators; the other modules recognise,
probe, prove, patch and report. No other project is imported.
"""

from glow_kernels.interop.convert import Conversion, convert
from glow_kernels.interop.engine import accelerate, restore
from glow_kernels.interop.proof import Agreement
from glow_kernels.interop.report import LayerReport, Report

__all__ = ["Agreement", "Conversion", "LayerReport", "Report", "accelerate", "convert", "restore"]
