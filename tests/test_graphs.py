"""A training step as one CUDA graph: what can be tested without a GPU, and on a GPU, that it is the same step."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import glow_kernels as gk
from glow_kernels.models import Glow
from glow_kernels.training.config import TrainingConfig
from glow_kernels.training.distributed import SINGLE_PROCESS, Ranks
from glow_kernels.training.ema import MovingAverage
from glow_kernels.training.objective import Objective
from glow_kernels.training.update import Update

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
SMALL: dict[str, Any] = {"flow_steps": 3, "levels": 2, "hidden_channels": 8, "weight_decay": 0.1, "ema": 0.9}


def make_update(model: Glow, *, capture: bool, ranks: Ranks = SINGLE_PROCESS, **changes: Any) -> Update:
    config = TrainingConfig(**{**SMALL, **changes})
    return Update(Objective(model, config), model, MovingAverage(model, config.ema), config, ranks, capture)


def make_model(device: str = "cpu", memory: str = "store") -> Glow:
    torch.manual_seed(0)
    model = Glow(1, 8, 3, 2, 8, memory=memory).to(device)
    model.initialize(torch.rand(16, 1, 8, 8, device=device) - 0.5)
    return model


def weights(update: Update) -> dict[str, Tensor]:
    model, average = update.model.state_dict(), update.average.model.state_dict()
    return {**model, **{f"average.{name}": value for name, value in average.items()}}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("memory", ["store", "anchor"])
def test_device_decides_as_the_host_does(memory: str, device: str) -> None:
    """Ten steps, of which the third and the last are bad; on a GPU, all except the first three are replayed."""
    host_model = make_model(device, memory)
    device_model = copy.deepcopy(host_model)
    by_host, by_device = make_update(host_model, capture=False), make_update(device_model, capture=True)
    for number in range(10):
        x = torch.rand(5, 1, 8, 8, device=device) - 0.5
        if number in (2, 9):
            x[0, 0, 0, 0] = torch.nan
        before = copy.deepcopy(weights(by_device))
        for update in (by_host, by_device):
            update(x, None, 1e-3 * (number + 1), 1.0)
        if number in (2, 9):
            assert all(torch.equal(value, before[name]) for name, value in weights(by_device).items())
    assert_close(weights(by_device), weights(by_host))
    pairs = list(zip(by_device.outcomes(), by_host.outcomes(), strict=True))
    assert [not ours.is_finite for ours, _ in pairs] == [number in (2, 9) for number in range(10)]
    for ours, theirs in pairs:
        assert ours == pytest.approx(theirs, rel=1e-3, nan_ok=True)
    assert by_device.is_settled
    assert by_device.reason == ("" if device == "cuda" else "a CUDA graph needs inputs on a CUDA device, got cpu")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"optimizer": "adamax"}, "adamax cannot leave out a step on the device: use adam"),
        ({"ranks": Ranks(0, 2)}, "several processes have to agree on every step"),
    ],
)
def test_what_has_to_wait_for_the_host_says_so(changes: dict[str, Any], reason: str) -> None:
    update = make_update(make_model(), capture=True, **changes)
    assert (update.decides_on_host, update.is_settled, update.reason) == (True, True, reason)


class NoWaiting(TorchDispatchMode):
    """Refuses operators that make the host wait for the device: they read values, or sizes depend on values."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags
        # States of random generators are byte tensors on the host, also for devices.
        if waits and args[0].dtype != torch.uint8:
            raise AssertionError(f"{function} depends on the values of tensors")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory", ["store", "checkpoint", "anchor", "invert"])
def test_no_operation_of_a_step_depends_on_data(memory: str) -> None:
    model = make_model(memory=memory)
    update, waiting = make_update(model, capture=True), make_update(model, capture=False)
    x = torch.rand(5, 1, 8, 8) - 0.5
    with NoWaiting():
        update(x, None, 1e-3, 1.0)
        with pytest.raises(AssertionError, match="depends on the values"):
            waiting(x, None, 1e-3, 1.0)


def test_every_call_is_one_step() -> None:
    total = torch.zeros(())
    step = gk.CapturedStep(lambda x: total.add_(x), warmup=2)
    assert not step.is_settled
    for _ in range(6):
        result = step(torch.ones(()))
    assert result.item() == 6
    assert step.is_settled
    with pytest.raises(TypeError, match="input 1 must be a tensor, got float"):
        step(torch.ones(()), 0.5)
    with pytest.raises(ValueError, match="warmup must be at least 1, got 0"):
        gk.CapturedStep(lambda x: x, warmup=0)
    with pytest.raises(TypeError, match=r"warmup must be a whole number, got 2\.5"):
        gk.CapturedStep(lambda x: x, warmup=2.5)
    with pytest.raises(TypeError, match="step must be callable, got int"):
        gk.CapturedStep(3)


def test_inputs_are_needed_to_know_the_device() -> None:
    step = gk.CapturedStep(lambda: torch.ones(()))
    step()
    assert step.reason == "a CUDA graph needs inputs on a CUDA device, got none"


def test_the_graph_is_made_on_the_device_of_the_inputs_beside_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """It need not be the current device, on which the graph would be empty."""
    devices = []

    def graph(_: Any, stream: Any, capture_error_mode: str) -> AbstractContextManager[None]:
        assert capture_error_mode == "thread_local"
        devices.append(stream.device)
        return nullcontext()

    def stream(device: torch.device | None = None) -> mock.MagicMock:
        devices.append(device)
        return mock.MagicMock(device=device)

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.MagicMock)
    step = gk.CapturedStep(lambda x: x * 2, warmup=1)
    with FakeTensorMode():
        x = torch.ones(3, device="cuda:1")
        for _ in range(2):
            step(x)
    assert step.reason == ""
    assert devices == 4 * [x.device]


def test_a_failed_recording_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.graph does not restore the stream if it cannot end the recording."""
    current: list[Any] = ["main"]

    class Using:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.stream

        def __exit__(self, *_: object) -> None:
            current[0] = self.before

    class Recording(Using):
        def __init__(self, _: Any, stream: Any, capture_error_mode: str) -> None:
            super().__init__(stream)

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    for name in ("Stream", "current_stream", "CUDAGraph", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", Using)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    used = []
    step = gk.CapturedStep(lambda x: used.append(current[0]), warmup=1)
    with FakeTensorMode():
        for _ in range(3):
            step(torch.ones(3, device="cuda:0"))
    assert step.reason == "the step cannot be recorded: operation failed due to a previous error during capture"
    assert used[2:] == ["main", "main"]


@needs_gpu
def test_graph_takes_new_inputs_and_other_shapes_run_as_they_are() -> None:
    step = gk.CapturedStep(lambda x: x * 2, warmup=1)
    for number in range(5):
        assert torch.equal(step(torch.full((3,), float(number), device="cuda")).cpu(), torch.full((3,), 2.0 * number))
    assert step.reason == ""
    assert step(torch.ones(4, device="cuda")).shape == (4,)


@needs_gpu
def test_step_that_waits_for_the_device_runs_without_a_graph() -> None:
    step = gk.CapturedStep(lambda x: x * x.sum().item(), warmup=1)
    for _ in range(4):
        assert torch.equal(step(torch.ones(3, device="cuda")).cpu(), torch.full((3,), 3.0))
    assert step.reason.startswith("the step cannot be recorded: ")


def test_command_line_says_why_there_is_no_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from glow_kernels.cli import main

    settings = {"flow-steps": 1, "levels": 1, "hidden-channels": 4, "iterations": 3, "batch-size": 8, "device": "cpu"}
    options = [f"--{name}={value}" for name, value in settings.items()]
    main(["train", "--run", str(tmp_path / "run"), "--cuda-graph", *options])
    printed = "".join(capsys.readouterr())
    assert "training without a CUDA graph: a CUDA graph needs inputs on a CUDA device, got cpu" in printed
