"""Training on two ranks: the same run as on one process, one writer, one message, and no rank left hanging.

Every scenario has two new processes on the CPU, with the environment that ``torchrun`` would give them.
Most runs are in float64, where rounding cannot hide a gradient with a wrong weight.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_cli import TINY, WRITTEN, cli, save_images
from test_trainer import before_step, make_config, make_data, send, steps_of, values_of
from torch import Tensor
from torch.distributed.tensor import DTensor

from glow_kernels.errors import DataError, GlowKernelsError, UsageError
from glow_kernels.training import checkpoint, distributed, gallery, metrics
from glow_kernels.training.config import TrainingConfig
from glow_kernels.training.distributed import SINGLE_PROCESS, Ranks, connected, full_tensor, local_device
from glow_kernels.training.run_folder import BEST, LAST
from glow_kernels.training.trainer import MAX_NON_FINITE, Trainer

RANKS = 2
# A batch of five is two images for one rank and three for the other.
LONG: dict[str, Any] = {"batch_size": 5, "iterations": 12, "validate_every": 4, "log_every": 1, "clip": 0.5}
KINDS: dict[str, dict[str, Any]] = {
    "adam": {**LONG},
    "adamax, conditional, decay": {**LONG, "optimizer": "adamax", "conditional": True, "weight_decay": 0.1},
}
WRAPPERS = {"ddp": False, "fsdp": True}
TIME_LIMIT = 150.0
# Imported before forking; otherwise every process of every scenario would spend seconds on them.
IMPORTED_LATE = (
    "safetensors.torch",
    "torch._dynamo",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
)


def new_trainer(folder: Path, ranks: Ranks = SINGLE_PROCESS, *, resume: bool = False, **changes: Any) -> Trainer:
    config = make_config(**{**LONG, **changes})
    return Trainer(config, make_data(), folder, resume=resume, show_progress=False, ranks=ranks)


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all weights and averaged weights, unsharded."""
    models = {"model": trainer.model, "average": trainer.average.model}
    return {
        f"{kind}.{name}": full_tensor(value).clone()
        for kind, m in models.items()
        for name, value in m.state_dict().items()
    }


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# The scenarios: functions that the ranks run, which return what the tests check.


def train(folder: Path, ranks: Ranks, **changes: Any) -> dict[str, Any]:
    trainer = new_trainer(folder, ranks, **changes)
    initial = weights_of(trainer)
    complete = trainer.train()
    final = weights_of(trainer)
    return {"initial": initial, "final": final, "complete": complete, "held": values_held(trainer)}


def values_held(trainer: Trainer) -> dict[str, int]:
    """The numbers of values that this process keeps."""
    moments = [moment for state in trainer.optimizer.state.values() for name, moment in state.items() if name != "step"]
    tensors = {"model": trainer.model.parameters(), "average": trainer.average.model.parameters(), "optimizer": moments}
    return {
        kind: sum(tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel() for tensor in values)
        for kind, values in tensors.items()
    }


def stop_by_a_signal_on_the_second_rank(folder: Path, ranks: Ranks) -> dict[str, Any]:
    trainer = new_trainer(folder, ranks, resume=True)
    started_at = trainer.progress.iteration
    if ranks.rank == 1:
        before_step(trainer, send(signal.SIGTERM, at=8))
    return {"started_at": started_at, "complete": trainer.train(), "progress": trainer.progress}


def poison(folder: Path, ranks: Ranks, steps: range) -> dict[str, Any]:
    """Train with NaN in one image of the second rank in these steps."""
    trainer = new_trainer(folder, ranks)
    draw_batch = trainer._batch

    def poisoned(indices: Tensor) -> tuple[Tensor, Tensor | None]:
        x, labels = draw_batch(indices)
        if ranks.rank == 1 and trainer.progress.iteration + 1 in steps:
            x[0, 0, 0, 0] = torch.nan
        return x, labels

    trainer._batch = poisoned  # type: ignore[method-assign]
    trainer.train()
    return {"final": weights_of(trainer), "progress": trainer.progress}


def fail(folder: Path, ranks: Ranks, error: Exception) -> None:
    """Train until step 3, where the second rank raises ``error`` while the first one is in a collective."""
    trainer = new_trainer(folder, ranks)

    def raise_on_the_second_rank(step: int) -> None:
        if ranks.rank == 1 and step == 3:
            raise error

    before_step(trainer, raise_on_the_second_rank)
    trainer.train()


def be_killed(folder: Path, ranks: Ranks) -> None:
    trainer = new_trainer(folder, ranks)
    if ranks.rank == 1:
        before_step(trainer, send(signal.SIGKILL, at=3))
    trainer.train()


def start_from_different_weights(folder: Path, ranks: Ranks) -> dict[str, Any]:
    build = TrainingConfig.build_model_for

    def build_another(config: TrainingConfig, data: Any) -> Any:
        torch.manual_seed(ranks.rank)
        return build(config, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingConfig, "build_model_for", build_another)
        return {"initial": weights_of(new_trainer(folder, ranks))}


def look_at_the_bar(folder: Path, ranks: Ranks) -> bool:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    trainer = Trainer(make_config(), make_data(), folder, ranks=ranks)
    with contextlib.redirect_stderr(Terminal()), trainer._bar() as bar:
        return not bar.disable


SCENARIOS: dict[str, Callable[[Path, Ranks], Any]] = {
    **{
        f"{wrapper} {kind}": lambda folder, ranks, changes=changes: train(folder, ranks, **changes)
        for wrapper in WRAPPERS
        for kind, changes in KINDS.items()
    },
    "ddp float32": train,
    "fsdp float32": train,
    "ddp chain": stop_by_a_signal_on_the_second_rank,
    "fsdp chain": stop_by_a_signal_on_the_second_rank,
    "ddp poison": lambda folder, ranks: poison(folder, ranks, range(3, 4)),
    "fsdp poison": lambda folder, ranks: poison(folder, ranks, range(3, 4)),
    "ddp diverge": lambda folder, ranks: poison(folder, ranks, range(3, 99)),
    "ddp unreadable": lambda folder, ranks: fail(folder, ranks, DataError("no such image")),
    "fsdp wrong use": lambda folder, ranks: fail(folder, ranks, UsageError("no such option")),
    "ddp bug": lambda folder, ranks: fail(folder, ranks, ZeroDivisionError("oops")),
    "ddp killed": be_killed,
    "ddp few images": lambda folder, ranks: new_trainer(folder, ranks, batch_size=1),
    "ddp different weights": start_from_different_weights,
    "ddp bar": look_at_the_bar,
}
# The second rank reads the run folder only to resume; otherwise it gets one that does not exist.
READS_FOLDER = ("ddp chain", "fsdp chain")


def run_all(_: int, folder: str, ports: list[int]) -> None:
    """Run all scenarios, each on forks of this process, which has imported everything."""
    os.setsid()
    torch.set_num_threads(1)
    for module in IMPORTED_LATE:
        importlib.import_module(module)
    for name in ("draw_samples", "draw_reconstruction", "draw_curve"):
        setattr(gallery, name, lambda *_, **__: 0.0)
    for name, port in zip((*SCENARIOS, *COMMANDS), ports, strict=True):
        for rank in range(RANKS):
            if os.fork() == 0:
                run_rank(name, Path(folder), rank, port)
        for _ in range(RANKS):
            os.wait()


def run_rank(name: str, folder: Path, rank: int, port: int) -> None:
    """Run one scenario as one rank, write the result to a file, and exit."""
    try:
        os.environ.update(environment(rank, port))
        if name in COMMANDS:
            result = run_command(COMMANDS[name](folder, rank))
        else:
            mine = rank == 0 or name in READS_FOLDER
            with contextlib.nullcontext() if "float32" in name else in_float64():
                result = run_scenario(name, folder / (name if mine else "second rank"))
        torch.save(result, folder / f"{name} {rank}.pt")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def run_scenario(name: str, path: Path) -> Any:
    try:
        with connected(name.startswith("fsdp")) as ranks:
            return SCENARIOS[name](path, ranks)
    except (Exception, SystemExit) as error:
        return {"kind": type(error).__name__, "message": str(error), "exit_code": getattr(error, "exit_code", None)}


COMMANDS: dict[str, Callable[[Path, int], list[str]]] = {
    "missing data": lambda folder, _: ["train", "--run-folder", f"{folder}/m", "--dataset", "array:/nowhere.npy"],
    "missing on the second rank": lambda folder, rank: [
        *("train", "--run", f"{folder}/second", *TINY, "--dataset"),
        "digits" if rank == 0 else "array:/nowhere.npy",
    ],
    "run exists": lambda folder, _: ["train", "--run", f"{folder}/exists", *TINY],
    "sample": lambda folder, _: ["sample", f"{folder}/tiny"],
    "evaluate": lambda folder, _: ["evaluate", f"{folder}/tiny"],
    "one GPU": lambda folder, _: ["train", "--run", f"{folder}/gpu", "--device", "cuda:0"],
}


def run_command(arguments: list[str]) -> dict[str, Any]:
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code: Any = cli(*arguments)
        except SystemExit as leaving:
            code = leaving.code
    return {"code": code, "output": output.getvalue(), "errors": errors.getvalue()}


def environment(rank: int, port: int) -> dict[str, str]:
    """The variables that ``torchrun`` sets for a worker; the launcher hosts the store."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_PORT": port}
    texts = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    return texts | {name: str(number) for name, number in numbers.items()}


def new_store() -> Any:
    """The store that a launcher hosts while its workers run."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    """The same runs on one process, and the first part of the runs that the ranks resume."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_samples", "draw_reconstruction", "draw_curve"):
            patch.setattr(gallery, name, lambda *_, **__: 0.0)
        results = {"float32": train(folder / "alone float32", SINGLE_PROCESS)}
        with in_float64():
            for kind, changes in KINDS.items():
                results[kind] = train(folder / f"alone {kind}", SINGLE_PROCESS, **changes)
            for wrapper in WRAPPERS:
                trainer = new_trainer(folder / f"{wrapper} chain")
                before_step(trainer, send(signal.SIGTERM, at=4))
                assert not trainer.train()
        dataset = f"array:{save_images(folder / 'images.npz')}"
        assert cli("train", "--run", folder / "tiny", "--dataset", dataset, *TINY) == 0
    (folder / "exists").mkdir()
    (folder / "exists" / "config.json").write_text("{}")
    return results


@pytest.fixture(scope="module")
def ranks_say(folder: Path, alone: Any) -> Callable[[str], list[Any]]:
    """A function that returns the results of each rank for a scenario or a command."""
    stores = [new_store() for _ in (*SCENARIOS, *COMMANDS)]
    context = mp.spawn(run_all, args=(str(folder), [store.port for store in stores]), join=False)
    deadline = time.monotonic() + TIME_LIMIT
    while not context.join(timeout=1.0):
        if time.monotonic() > deadline:
            os.killpg(context.pids()[0], signal.SIGKILL)
            pytest.fail(f"the ranks hang; they have done {sorted(path.name for path in folder.glob('*.pt'))}")

    def read(name: str) -> list[Any]:
        # A rank that was killed leaves no file.
        files = [folder / f"{name} {rank}.pt" for rank in range(RANKS)]
        return [torch.load(file, weights_only=False) for file in files if file.exists()]

    return read


def assert_weights_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# The same run as on one process


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_ranks_are_one_process_up_to_the_order_of_sums(
    wrapper: str, kind: str, folder: Path, alone: Any, ranks_say: Any
) -> None:
    first, second = ranks_say(f"{wrapper} {kind}")
    expected = alone[kind]
    assert_weights_close(first["initial"], expected["initial"], 1e-12)
    # The classification loss is always in float32.
    assert_weights_close(first["final"], expected["final"], 1e-7 if "conditional" in kind else 1e-9)
    for part in ("initial", "final"):
        assert all(torch.equal(first[part][name], value) for name, value in second[part].items())
    for key in ("train_bits_per_dim", "gradient_norm", "learning_rate", "validation_bits_per_dim"):
        got, alone_got = (values_of(folder / run, key) for run in (f"{wrapper} {kind}", f"alone {kind}"))
        assert len(got) == (3 if key.startswith("validation") else 12)
        assert got == pytest.approx(alone_got, rel=1e-10), key
    assert max(values_of(folder / f"{wrapper} {kind}", "gradient_norm")) > LONG["clip"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_losses_in_float32_agree_to_rounding(wrapper: str, folder: Path, alone: Any, ranks_say: Any) -> None:
    first, _ = ranks_say(f"{wrapper} float32")
    # Final weights may differ: Adam divides by the size of a gradient, which amplifies rounding in gradients near zero.
    assert_weights_close(first["initial"], alone["float32"]["initial"], 1e-5)
    for key in ("train_bits_per_dim", "validation_bits_per_dim"):
        got, expected = (values_of(folder / run, key) for run in (f"{wrapper} float32", "alone float32"))
        assert got == pytest.approx(expected, rel=1e-5)


def test_fsdp_keeps_half_of_everything_on_each_rank(alone: Any, ranks_say: Any) -> None:
    first, second = (rank["held"] for rank in ranks_say("fsdp adam"))
    for kind, all_of_it in alone["adam"]["held"].items():
        assert first[kind] + second[kind] == all_of_it
        assert max(first[kind], second[kind]) < 0.55 * all_of_it


def test_every_rank_starts_from_the_weights_of_the_first(ranks_say: Any) -> None:
    first, second = ranks_say("ddp different weights")
    assert all(torch.equal(value, second["initial"][name]) for name, value in first["initial"].items())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_run_goes_from_one_process_to_two_ranks_and_back(
    wrapper: str, folder: Path, ranks_say: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in ranks_say(f"{wrapper} chain"):
        assert rank["started_at"] == 4
        assert (rank["complete"], rank["progress"].iteration) == (False, 8)
    for name in ("draw_samples", "draw_reconstruction", "draw_curve"):
        monkeypatch.setattr(gallery, name, lambda *_, **__: 0.0)
    with in_float64():
        trainer = new_trainer(folder / f"{wrapper} chain", resume=True)
        assert trainer.progress.iteration == 8
        assert trainer.train()
    expected, _ = checkpoint.load(folder / "alone adam" / LAST)
    got, _ = checkpoint.load(folder / f"{wrapper} chain" / LAST)
    assert_weights_close(got, expected, 1e-9)
    for key in ("train_bits_per_dim", "gradient_norm", "validation_bits_per_dim"):
        runs = (values_of(folder / run, key) for run in (f"{wrapper} chain", "alone adam"))
        assert next(runs) == pytest.approx(next(runs), rel=1e-10)
    assert steps_of(folder / f"{wrapper} chain", "gradient_norm") == list(range(1, 13))


# One decision, one writer


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_bad_step_on_one_rank_is_skipped_by_all(wrapper: str, folder: Path, ranks_say: Any) -> None:
    first, second = ranks_say(f"{wrapper} poison")
    assert (first["progress"].skipped, first["progress"].updates) == (1, 11)
    assert (second["progress"].skipped, second["progress"].updates) == (1, 11)
    assert all(value.isfinite().all() for value in first["final"].values())
    assert all(torch.equal(value, second["final"][name]) for name, value in first["final"].items())
    records = [record for record in metrics.read(folder / f"{wrapper} poison") if "train_bits_per_dim" in record]
    assert [record["step"] for record in records if record["train_bits_per_dim"] is None] == [3]


def test_only_the_first_rank_writes(folder: Path, ranks_say: Any) -> None:
    ranks_say("ddp adam")
    assert not (folder / "second rank").exists()
    assert {LAST, BEST} < {path.name for path in (folder / "ddp adam").iterdir()}


def test_only_the_first_rank_shows_a_bar(ranks_say: Any) -> None:
    assert ranks_say("ddp bar") == [True, False]


# One message


@pytest.mark.parametrize(
    ("scenario", "kind", "message", "exit_code"),
    [
        ("ddp unreadable", "GlowKernelsError", "rank 1: no such image", 1),
        ("fsdp wrong use", "GlowKernelsError", "rank 1: no such option", 2),
        ("ddp bug", "RuntimeError", "rank 1: ZeroDivisionError: oops", None),
    ],
)
def test_error_on_one_rank_is_named_there_and_ends_the_other_silently(
    scenario: str, kind: str, message: str, exit_code: int | None, ranks_say: Any
) -> None:
    first, second = ranks_say(scenario)
    assert second == {"kind": kind, "message": message, "exit_code": exit_code}
    assert (first["kind"], first["message"]) == ("SystemExit", str(exit_code or 1))


def test_a_rank_that_is_killed_ends_the_other_with_a_message(folder: Path, ranks_say: Any) -> None:
    first = ranks_say("ddp killed")[0]
    assert (first["kind"], first["exit_code"]) == ("TrainingError", 1)
    assert first["message"].startswith("rank 0: another rank exited without a message, perhaps killed")
    assert checkpoint.load(folder / "ddp killed" / LAST)


@pytest.mark.parametrize(
    ("scenario", "pattern", "exit_code"),
    [
        ("ddp diverge", rf"rank \d: {MAX_NON_FINITE} steps in a row gave a non-finite loss.*at iteration 7;", 1),
        ("ddp few images", r"rank \d: a batch of 1 images cannot be split over 2 ranks: use a larger --batch-size", 2),
    ],
)
def test_error_on_all_ranks_is_reported_once(scenario: str, pattern: str, exit_code: int, ranks_say: Any) -> None:
    told, silent = sorted(ranks_say(scenario), key=lambda result: result["kind"])
    assert (told["kind"], told["exit_code"]) == ("GlowKernelsError", exit_code)
    assert re.match(pattern, told["message"])
    assert (silent["kind"], silent["message"]) == ("SystemExit", str(exit_code))


@pytest.mark.parametrize(
    ("command", "pattern", "code"),
    [
        ("missing data", r"error: rank \d: /nowhere.npy .*does not exist", 1),
        ("missing on the second rank", r"error: rank 1: /nowhere.npy .*does not exist", 1),
        ("run exists", r"error: rank 0: .*already holds a run", 2),
        ("sample", r"error: rank \d: glow-kernels sample runs in one process: start it without torchrun", 2),
        ("one GPU", r"error: rank \d: --device cuda:0 is one device for 2 ranks", 2),
    ],
)
def test_bad_run_ends_all_ranks_with_one_line_and_its_exit_code(
    command: str, pattern: str, code: int, ranks_say: Any
) -> None:
    results = ranks_say(command)
    assert [result["code"] for result in results] == [code] * RANKS
    lines = [line for result in results for line in (result["output"] + result["errors"]).splitlines()]
    assert len(lines) == 1, lines
    assert re.match(pattern, lines[0])


def test_ranks_share_the_evaluation_and_one_of_them_prints_it(
    folder: Path, ranks_say: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    told, silent = ranks_say("evaluate")
    assert (told["code"], silent["code"], silent["output"]) == (0, 0, "")
    assert cli("evaluate", folder / "tiny") == 0
    assert told["output"] == capsys.readouterr().out


def test_fsdp_without_a_launcher_is_a_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("train", "--fsdp", "--run", tmp_path / "run", *TINY) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: --fsdp .*torchrun --nproc-per-node=N -m glow_kernels train --fsdp \.\.\.\n", error)
    assert not (tmp_path / "run").exists()


def test_launcher_that_does_not_say_how_to_connect_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli("train", *TINY) == 2
    assert "did not set MASTER_ADDR, MASTER_PORT" in capsys.readouterr().err


@pytest.mark.parametrize("failed", [True, False])
def test_a_rank_that_cannot_connect_leaves_the_message_to_one_that_has_failed(
    failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first rank may connect, fail and exit before the second has opened all of its sockets.
    store = dist.HashStore()
    if failed:
        store.set(distributed.FAILURE, "0 2")
    for name, value in environment(1, 0).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(store, 1, RANKS)]))
    monkeypatch.setattr(dist, "init_process_group", mock.Mock(side_effect=RuntimeError("Gloo: closed by peer")))
    monkeypatch.setattr(signal, "signal", mock.Mock())
    with pytest.raises(SystemExit if failed else GlowKernelsError) as caught, connected():
        pass
    assert str(caught.value) == ("2" if failed else "rank 1: cannot reach the other ranks: Gloo: closed by peer")


def test_out_of_memory_on_a_rank_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment(0, 0).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_connect", lambda: (dist.HashStore(), 0, 1))
    monkeypatch.setattr(signal, "signal", mock.Mock())
    monkeypatch.setattr(Trainer, "train", mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    assert cli("train", "--run", tmp_path / "run", "--device", "cpu", *TINY) == 1
    error = capsys.readouterr().err
    assert re.fullmatch("error: out of memory: rank 0: OutOfMemoryError: .*; use --memory anchor [^\n]*\n", error)


def test_torchrun_trains_a_sharded_model_and_leaves_a_complete_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = f"array:{save_images(tmp_path / 'images.npz')}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command = ["-m", "glow_kernels", "train", "--fsdp", "--run-folder", str(tmp_path / "run"), "--dataset", dataset]
    result = subprocess.run([*torchrun, *command, *TINY], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == WRITTEN
    assert len(re.findall("training a Glow of .* by 2 processes", result.stdout)) == 1
    assert len(re.findall("iteration 6: validation", result.stdout)) == 1
    assert len(re.findall("test bits/dim", result.stdout)) == 1
    bits = re.search(r"test bits/dim +(\S+)", result.stdout)
    assert bits is not None
    # The report also uses 102 draws for each of 40 images.
    assert cli("evaluate", tmp_path / "run", "--draws", 102) == 0
    assert float(capsys.readouterr().out.split()[0]) == pytest.approx(float(bits[1]), abs=2e-4)


# Devices


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [("auto", 4, "cuda:3"), ("auto", 0, "cpu"), ("cuda", 4, "cuda:3"), ("cpu", 4, "cpu"), ("cuda", 0, "cuda:3")],
)
def test_every_rank_has_its_own_device(name: str, gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert local_device(name) == expected


def test_more_ranks_than_gpus_is_a_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="2 GPUs are too few for 4 ranks"):
        local_device("cuda")


@pytest.mark.parametrize("count", [2, 5, 7, 256])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_a_partition_into_parts_of_nearly_equal_size(count: int, size: int) -> None:
    parts = [list(range(count))[Ranks(rank, size).share(count)] for rank in range(size)]
    assert [index for part in parts for index in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
