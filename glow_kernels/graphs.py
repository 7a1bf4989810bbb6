"""A whole training step as one CUDA graph: one launch instead of thousands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from glow_kernels.ops._checks import check_tensor, check_whole


class CapturedStep:
    """A training step that is captured as a CUDA graph and from then on replayed.

    Every call is one step. The first ``warmup`` calls run normally, so that libraries and the optimizer allocate their
    persistent state. The next call is captured; each later one copies its inputs into the graph's input tensors and
    replays it. If the step cannot be captured, every call runs normally, and :attr:`reason` says why. A call whose
    inputs have other shapes, types or devices also runs normally.

    Args:
        step: a function of tensors that returns a tensor or a tuple of tensors: forward, backward and optimizer, or any
            part of these. It must do the same work at every call and must not wait for the device (no ``item()``, no
            branch on a value). A number that changes, such as a learning rate, must be a tensor. If it computes
            gradients, it must start with ``zero_grad(set_to_none=True)``; the optimizer must be made with
            ``capturable=True``. If the optimizer is not part of the step, inputs must always have the same shapes: a
            call with other shapes makes new gradient tensors, while later replays still write to the old ones.
        warmup: number of calls before the capture, at least 1.

    Raises:
        TypeError, ValueError: ``step`` is not callable, or ``warmup`` not a whole number of at least 1.

    Example::

        @gk.CapturedStep
        def step(x):
            optimizer.zero_grad(set_to_none=True)
            loss = model.bits_per_dim(x).mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        for x in batches:
            loss = step(x)  # overwritten by the next call
    """

    def __init__(self, step: Callable[..., Any], *, warmup: int = 3) -> None:
        if not callable(step):
            raise TypeError(f"step must be callable, got {type(step).__name__}")
        check_whole("warmup", warmup, 1)
        self._step = step
        self._calls_before = warmup  # negative once a capture has been tried, or is impossible
        self._inputs: list[Tensor] = []
        self._outputs: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self.reason = "it has not been called often enough"

    @property
    def is_settled(self) -> bool:
        """Whether it has been decided if calls replay a graph; :attr:`reason` says why not, and is empty if they do."""
        return self._calls_before < 0

    def __call__(self, *inputs: Tensor) -> Any:
        """One step; the next one may overwrite the returned tensors.

        Args:
            inputs: tensors on one device, with the same shapes and types at every call.

        Raises:
            TypeError: an input is not a tensor.
        """
        if self._graph is None and not self._may_capture(inputs):
            return self._step(*inputs)
        if self._graph is None:
            return self._first_on_side_stream(inputs) if self._calls_before > 0 else self._capture(inputs)
        if [_kind(tensor) for tensor in inputs] != [_kind(tensor) for tensor in self._inputs]:
            return self._step(*inputs)
        for kept, tensor in zip(self._inputs, inputs, strict=True):
            kept.copy_(tensor, non_blocking=True)
        self._graph.replay()
        return self._outputs

    def _may_capture(self, inputs: Sequence[Tensor]) -> bool:
        for number, tensor in enumerate(inputs):
            check_tensor(f"input {number}", tensor)
        others = {tensor.device.type for tensor in inputs} - {"cuda"}
        if self._calls_before >= 0 and (others or not inputs):
            self._calls_before = -1
            self.reason = f"a CUDA graph needs inputs on a CUDA device, got {', '.join(sorted(others)) or 'none'}"
        return self._calls_before >= 0

    def _first_on_side_stream(self, inputs: Sequence[Tensor]) -> Any:
        self._calls_before -= 1
        device = inputs[0].device
        side, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(main)
        with torch.cuda.stream(side):
            outputs = self._step(*inputs)
        main.wait_stream(side)
        return outputs

    def _capture(self, inputs: Sequence[Tensor]) -> Any:
        self._calls_before = -1
        self._inputs = [tensor.clone() for tensor in inputs]
        graph, device = torch.cuda.CUDAGraph(), inputs[0].device
        # Not the default capture stream of torch.cuda.graph: it is on the device that was current at its first use.
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        try:
            # The outer context restores the stream: torch.cuda.graph leaves its own current if the capture fails.
            # "thread_local": calls of other threads, such as a DataLoader's pinning thread, would otherwise break the
            # capture and fail.
            with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._outputs = self._step(*self._inputs)
        except RuntimeError as error:
            self.reason = f"the step cannot be recorded: {str(error).splitlines()[0]}"
            torch.cuda.synchronize(device)
            return self._step(*inputs)
        self.reason = ""
        self._graph = graph
        graph.replay()
        return self._outputs


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device
