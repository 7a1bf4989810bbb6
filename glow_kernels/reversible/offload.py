"""Anchors in host memory: copied out during forward, asynchronously, and prefetched one ahead in backward."""

from __future__ import annotations

import torch
from torch import Tensor

from glow_kernels.reversible.tensors import is_graph_retained


class OffloadedAnchors:
    """The anchors of one forward, which backward fetches from the last to the first.

    On CUDA they are copied on a separate stream, to and from pinned memory, which PyTorch's allocator reuses.

    Args:
        device: device of the states.

    Raises:
        RuntimeError: a CUDA graph is being captured; replays would copy into memory that has been reused since.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = None
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("offload_anchors=True cannot be captured in a CUDA graph")
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._anchors: list[Tensor | None] = []
        self._fetched: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}

    def store(self, state: Tensor) -> int:
        """Copy ``state`` to the host, and return the number to fetch it by."""
        if self._stream is None:
            anchor = state.to("cpu", copy=True)
        else:
            anchor = torch.empty_like(state, device="cpu", pin_memory=True)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                anchor.copy_(state, non_blocking=True)
            state.record_stream(self._stream)  # its memory is not reused before it is copied
        self._anchors.append(anchor)
        return len(self._anchors) - 1

    def fetch(self, number: int) -> Tensor:
        """The state of that number, on the device; also starts to copy the one before it.

        It is dropped, unless backward retains the graph.
        """
        state, arrival = self._fetched.pop(number) if number in self._fetched else self._start_fetch(number)
        if not is_graph_retained():
            self._anchors[number] = None
        if number:
            self._fetched[number - 1] = self._start_fetch(number - 1)
        if arrival is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(arrival)
            state.record_stream(current)
        return state

    def _start_fetch(self, number: int) -> tuple[Tensor, torch.cuda.Event | None]:
        anchor = self._anchors[number]
        assert anchor is not None
        if self._stream is None:
            return anchor.to(self._device, copy=True), None
        with torch.cuda.stream(self._stream):
            state = anchor.to(self._device, non_blocking=True)
            return state, self._stream.record_event()
