"""Draws the figures of docs/memory.md from the results of the other memory scripts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

FOLDER = Path(__file__).parents[1] / "docs/memory"
# Published: InvertibleNetworks.jl, JOSS 9(99), 2024, figure 2, measured on a GPU by NVML.
NORMFLOWS = {4: 5.09, 8: 7.88, 16: 13.55, 32: 24.87, 48: 36.20}
DEEPEST = 80
INVERTIBLE_NETWORKS = {4: 5.07, 80: 5.07}


def read(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((FOLDER / f"{name}.json").read_text())
    return rows


def extrapolated(rows: list[dict[str, Any]]) -> float:
    """The peak of the deepest model: each further anchor adds exactly its state, which the tests prove."""
    if "offloaded" in rows[0]["policy"]:
        return float(rows[-1]["peak"])
    every = int(rows[0]["policy"].split()[1].rstrip(","))
    anchors = DEEPEST // every - rows[-1]["steps"] // every
    state = 8 * 3 * 256 * 256 * 4
    # The peak is either at the end of the forward, with the anchors of all levels, or in the first level's backward.
    return float(max(rows[-1]["kept"] + anchors * 1.75 * state, rows[-1]["peak"] + anchors * state))


def depth() -> None:
    figure, axes = plt.subplots(figsize=(7.6, 4.2), layout="constrained")
    rows = read("depth")
    for policy in dict.fromkeys(row["policy"] for row in rows):
        points = [(row["steps"], row["peak"] / 1e9) for row in rows if row["policy"] == policy]
        (line,) = axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=policy)
        if points[-1][0] < DEEPEST:
            peak = extrapolated([row for row in rows if row["policy"] == policy])
            axes.plot(
                [points[-1][0], DEEPEST], [points[-1][1], peak / 1e9], "o--", color=line.get_color(), fillstyle="none"
            )
    axes.plot(*zip(*NORMFLOWS.items(), strict=True), "k:", label="normflows (published)")
    axes.plot(*zip(*INVERTIBLE_NETWORKS.items(), strict=True), "k--", label="InvertibleNetworks.jl (published)")
    axes.set(yscale="log", xlabel="steps of flow per level", ylabel="peak of activations, GB")
    axes.set_title("256 x 256, batch 8, 256 hidden channels, 3 levels", fontsize=10)
    figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(FOLDER / "depth.png", dpi=150)


def drift() -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    rows = read("drift")
    for key in dict.fromkeys((row["coupling"], row["bfloat16"]) for row in rows):
        points = [(row["steps"], row["error"]) for row in rows if (row["coupling"], row["bfloat16"]) == key]
        label = f"{key[0]}, {'bfloat16' if key[1] else 'float32'} networks"
        axes.loglog(*zip(*points, strict=True), "o-", markersize=3, label=label)
    axes.set(xlabel="inverted steps in a row", ylabel="relative error of the state")
    axes.legend(fontsize=8)
    figure.savefig(FOLDER / "drift.png", dpi=150)


def poison() -> None:
    rows = read("poison32")
    policies = [name for name in rows[0] if name not in ("batch", "checkpoint")]
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    top = 1e3
    for offset, policy in enumerate(policies):
        for index, row in enumerate(rows):
            error = row[policy]
            finite = error == error and error < top
            place = index + 0.8 / len(policies) * (offset - (len(policies) - 1) / 2)
            axes.bar(
                place,
                error if finite else top,
                0.72 / len(policies),
                color=f"C{offset}",
                label=policy if index == 0 else None,
            )
            if not finite:
                axes.text(
                    place,
                    top,
                    "NaN" if error != error else f"{error:.0e}",
                    ha="center",
                    va="bottom",
                    fontsize=6,
                    rotation=90,
                )
    axes.axhline(1e-4, color="k", linewidth=0.5, linestyle=":")
    axes.set(yscale="log", ylim=(1e-8, 1e5), ylabel="relative error of the gradient")
    axes.set_xticks(range(len(rows)), [row["batch"].replace(" ", "\n", 1) for row in rows], fontsize=8)
    figure.legend(fontsize=8, loc="outside upper center", ncols=len(policies))
    figure.savefig(FOLDER / "poison.png", dpi=150)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    depth()
    drift()
    poison()
