"""Existing Glow code before and after ``accelerate``: time of a training step and memory of activations.

    python benchmarks/drop_in.py [--threads 1] [--steps 14] [--tuned] [--only rosinality normflows]

Batch 16 of 3x32x32, 8 steps in each level, width 64, float32, Adam. Models take turns; times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from dialects import audio, chrischute, openai, pclucas14, rosinality, survae, zoo

import glow_kernels as gk
from glow_kernels.bench.live_storages import LiveStorages
from glow_kernels.cli.arguments import positive

BATCH, SIZE, STEPS, LEVELS, WIDTH = 16, 32, 8, 2, 64
Loss = Callable[[nn.Module, Tensor], Tensor]
# Options of accelerate, by the heading of the column; None leaves the model unpatched.
VARIANTS: dict[str, dict[str, str] | None] = {
    "as it was": None,
    "accelerate": {},
    'memory="anchor"': {"memory": "anchor"},
}


def waveglow_loss(model: nn.Module, x: Tensor) -> Tensor:
    """The loss of images read as audio of 3072 samples, with a spectrogram of 768 frames."""
    spectrogram = x.repeat(1, 2, 1, 1).flatten(2)[:, :5, :768]
    return audio.waveglow_loss(model, spectrogram, x.flatten(1))  # type: ignore[no-any-return]


def glow_tts_loss(model: nn.Module, x: Tensor) -> Tensor:
    """The loss of images read as 256 frames of 12 channels."""
    x = F.pixel_unshuffle(x, 2).flatten(2)
    z, log_det = model(x, x.new_ones(len(x), 1, x.shape[2]))
    return (0.5 * z.square().flatten(1).sum(1) - log_det).mean()  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "rosinality": (lambda: rosinality.Glow(3, STEPS, LEVELS, filter_size=WIDTH), rosinality.loss),
    "chaiyujin": (lambda: openai.Glow(3, WIDTH, STEPS, LEVELS), openai.loss),
    "y0ast": (lambda: openai.Glow(3, WIDTH, STEPS, LEVELS, style="y0ast", LU_decomposed=True), openai.loss),
    "pclucas14": (lambda: pclucas14.Glow(3, WIDTH, STEPS, LEVELS), pclucas14.loss),
    "chrischute": (lambda: chrischute.Glow(12, WIDTH, STEPS), chrischute.loss),
    "normflows": (lambda: zoo.normflows_glow(STEPS, LEVELS, WIDTH, (3, SIZE, SIZE)), zoo.normflows_loss),
    "nflows": (lambda: zoo.nflows_glow(12, STEPS, WIDTH), zoo.standard_normal_loss),
    "FrEIA": (lambda: zoo.freia_steps(12, STEPS, WIDTH, SIZE), zoo.standard_normal_loss),
    "survae": (lambda: survae.Flow(12, WIDTH), zoo.standard_normal_loss),
    "WaveGlow": (lambda: audio.WaveGlow(n_flows=STEPS, n_layers=4, width=WIDTH), waveglow_loss),
    "Glow-TTS": (lambda: audio.FlowDecoder(12, WIDTH, STEPS), glow_tts_loss),
}


def prepared(make: Callable[[], nn.Module], loss: Loss, x: Tensor, options: dict[str, str] | None) -> nn.Module:
    """A model with initialised ActNorms, accelerated unless ``options`` is None."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        loss(model, x)
    if options is not None:
        report = gk.accelerate(model, **options)
        for row in report.left_alone:
            print(f"not patched: {row.path}: {row.reason}", file=sys.stderr)
    return model


def training_step(model: nn.Module, loss: Loss, x: Tensor) -> Callable[[], None]:
    """A function that runs one training step with Adam."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss(model, x).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def activations(model: nn.Module, loss: Loss, x: Tensor) -> tuple[float, float]:
    """MiB kept after the forward, and the peak; gradients of parameters do not count."""
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with LiveStorages([model]) as storages:
        value = loss(model, x)
        kept = storages.now
        value.backward()  # type: ignore[no-untyped-call]
    return kept / 2**20, storages.peak / 2**20


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--steps", type=positive, default=14)
    parser.add_argument("--tuned", action="store_true", help="with glow_kernels.tune_allocator()")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.tuned:
        gk.tune_allocator()
    x = torch.randn(BATCH, 3, SIZE, SIZE)
    print("| model | speed | with anchors | kept, MiB | with anchors | most at once, MiB | with anchors |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.only:
        make, loss = MODELS[name]
        models = [prepared(make, loss, x, variant) for variant in VARIANTS.values()]
        calls = [training_step(model, loss, x) for model in models]
        times: list[list[float]] = [[] for _ in calls]
        for number in range(options.steps + 2):
            for call, measured in zip(calls, times, strict=True):
                start = time.perf_counter()
                call()
                if number >= 2:
                    measured.append(time.perf_counter() - start)
        before, *after = (statistics.median(measured) for measured in times)
        memory = [activations(model, loss, x) for model in models]
        speeds = " | ".join(f"{before / value:.2f}x" for value in after)
        kept, peak = (f"{row[0]:.1f} to {row[1]:.1f} | {row[2]:.1f}" for row in zip(*memory, strict=True))
        print(f"| {name} | {speeds} | {kept} | {peak} |", flush=True)


if __name__ == "__main__":
    main()
