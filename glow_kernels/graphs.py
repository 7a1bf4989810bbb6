"""A whole training step as one CUDA graph: one launch instead of thousands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from glow_kernels.ops._checks import check_tensor, check_whole


class CapturedStep:
    """A step of a training loop that records itself as a CUDA graph and from then on replays it.

    Every call is one step. The first ``warmup`` calls run normally, so that libraries and the optimizer allocate their
    state; the next one is recorded; each later one copies its inputs to where the graph reads them and replays it. A
    call with inputs of other shapes runs normally. So does every call if the step cannot be recorded; :attr:`reason`
    then says why.

    Args:
        step: a function of tensors that returns a tensor or a tuple of tensors: forward, backward and optimizer, or
            any part of it. It must do the same work at every call and must not wait for the device (no ``item()``, no
            branch on a value). A number that changes, such as a learning rate, must be a tensor. If it computes
            gradients it must start with ``zero_grad(set_to_none=True)``; its optimizer needs ``capturable=True``. If
            the optimizer is outside of it, all inputs must have one shape: a call with another shape makes new
            gradient tensors, while the graph continues to write the old ones.
        warmup: calls before the recording, at least 1.

    Raises:
        TypeError, ValueError: ``step`` is not callable, or ``warmup`` is not a whole number of at least 1.

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
        self._calls_before = warmup  # below 0 once a recording has been tried, or cannot be
        self._inputs: list[Tensor] = []
        self._outputs: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self.reason = "it has not been called often enough"

    @property
    def is_settled(self) -> bool:
        """Whether recording has been tried, or cannot be; if it failed :attr:`reason` says why, else that is empty."""
        return self._calls_before < 0

    def __call__(self, *inputs: Tensor) -> Any:
        """One step; what it returns may be overwritten by the next one.

        Args:
            inputs: tensors on one device, of the same shapes and types at every call.

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
        # Not PyTorch's own stream for this, which is on the device that was current when it was first used.
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        try:
            # Where it fails, torch.cuda.graph leaves its stream in use. Other threads go on meanwhile: that of a
            # DataLoader that pins memory would break the recording and fail.
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
