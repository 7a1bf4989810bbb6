"""What :func:`glow_kernels.accelerate` did and did not do, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from glow_kernels.interop.proof import Agreement


@dataclass(frozen=True)
class LayerReport:
    """One flow layer.

    Attributes:
        path: its name in the model, ``""`` for the model itself.
        layer: name of its class.
        dialect, kind: what it was recognised as.
        patched: whether it computes with the fused operators now.
        options: what was found by probing.
        agreement: measured differences between the original and the patched layer; None without ``verify``, if it was
            not patched, or if an earlier call patched it.
        reason: why it was not patched.
        memory: what a step that runs a network keeps for backward, ``"store"`` for everything; ``""`` for others.
        memory_reason: why it keeps everything although less was asked for.
        better: what is improved besides speed.
    """

    path: str
    layer: str
    dialect: str
    kind: str
    patched: bool
    options: str = ""
    agreement: Agreement | None = None
    reason: str = ""
    memory: str = ""
    memory_reason: str = ""
    better: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All flow layers of a model, in the model's order; ``print`` shows a table.

    Attributes:
        layers: one row for every flow layer that was recognised, patched or not.
        note: a remark on the model as a whole, such as why no layer was recognised; usually empty.
    """

    layers: tuple[LayerReport, ...] = field(default_factory=tuple)
    note: str = ""

    @property
    def patched(self) -> tuple[LayerReport, ...]:
        """The layers that compute with the fused operators now."""
        return tuple(layer for layer in self.layers if layer.patched)

    @property
    def left_alone(self) -> tuple[LayerReport, ...]:
        """The layers that were not patched, each with its ``reason``."""
        return tuple(layer for layer in self.layers if not layer.patched)

    def as_dict(self) -> dict[str, Any]:
        """``{"patched": [...], "left_alone": [...], "note": ...}``, of plain Python values."""
        return {
            "patched": [asdict(layer) for layer in self.patched],
            "left_alone": [asdict(layer) for layer in self.left_alone],
            "note": self.note,
        }

    def __str__(self) -> str:
        lines = [self.note] if self.note else []
        rows: list[tuple[str, ...]] = [
            ("layer", "recognised as", "data", "log-det", "gradient", "options, or why it is not patched")
        ]
        rows += [_row(layer) for layer in self.layers]
        if self.layers:
            widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
            for row in rows:
                cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
                lines.append("  ".join([*cells, row[-1]]).rstrip())
        lines.append(f"{len(self.patched)} of {len(self.layers)} flow layers accelerated")
        if any(layer.agreement for layer in self.patched):
            lines.append("data, log-det, gradient: largest difference from the original, relative to the values")
        better = dict.fromkeys(line for layer in self.patched for line in layer.better)
        lines += [f"better: {line}" for line in better]
        return "\n".join(lines)


def _row(layer: LayerReport) -> tuple[str, ...]:
    measured: list[dict[str, float]] = [{}, {}, {}]
    if layer.agreement is not None:
        measured = [layer.agreement.values, layer.agreement.log_dets, layer.agreement.gradients]
    text = [layer.options if layer.patched else f"not patched: {layer.reason}"]
    if layer.memory not in ("", "store"):
        text.append(f"keeps no activations ({layer.memory})")
    if layer.memory_reason:
        text.append(f"keeps its activations: {layer.memory_reason}")
    described = "; ".join(part for part in text if part)
    name = f"{layer.dialect} {layer.kind}"
    return (layer.path or "(model)", name, *map(_largest, measured), described)


def _largest(differences: dict[str, float]) -> str:
    return f"{max(differences.values()):.0e}" if differences else "-"
