"""Training on several processes started by ``torchrun``, one rank per device.

Every rank draws the same joint batch with the same noise and computes its share of it. So N ranks see the data that one
process would see, and a checkpoint does not depend on the number of ranks. Whatever decides how a run goes on (losses,
gradient norms, signals, validations) is reduced over all ranks before any of them acts on it.

Weights are either replicated on every rank (DDP; Li et al., "PyTorch Distributed", 2020) or sharded over all of them
(FSDP2; Rajbhandari et al., "ZeRO", 2020, stage 3), together with gradients, optimizer state and moving average.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from glow_kernels.errors import GlowKernelsError, TrainingError, UsageError
from glow_kernels.models import Glow
from glow_kernels.nn import FlowStep, SplitPrior, TopPrior

LAUNCH = "torchrun --nproc-per-node=N -m glow_kernels train"
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
CONNECT_TIMEOUT = timedelta(minutes=5)
# Key in the store under which the first rank to fail registers; only that rank reports its error.
FAILURE = "glow_kernels/failure"
# Methods besides forward before which FSDP must gather weights. None of them calls another.
ENTRY_POINTS = ("log_prob", "log_prob_and_logits", "encode", "decode")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; by default it is the only one.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        fsdp: shard the weights over the ranks instead of replicating them on each.
    """

    rank: int = 0
    size: int = 1
    fsdp: bool = False

    @property
    def is_writer(self) -> bool:
        """Whether this is the one rank that writes files and talks to the user."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's part of ``count`` items; the sizes of the parts differ by at most one."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all ranks, in float64 on the host; bit for bit the same on every rank."""
        total = values.detach().to("cpu", torch.float64, copy=True)
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank. No rank returns before all have called, so this is also a barrier."""
        return flag if self.size == 1 else self.sum(torch.tensor(float(flag))).item() > 0

    def check_batch(self, images: int) -> None:
        """Raise a UsageError unless a joint batch of ``images`` has at least one image for every rank."""
        if images < self.size:
            raise UsageError(
                f"a batch of {images} images cannot be split over {self.size} ranks: use a larger --batch-size, "
                "more images or fewer ranks"
            )

    @torch.no_grad()
    def broadcast_weights(self, model: nn.Module) -> None:
        """Give every rank the weights of rank 0: the same seed may give slightly different ones on other hardware."""
        if self.size == 1:
            return
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                dist.broadcast(tensor, 0)

    def wrap(self, objective: nn.Module, device: torch.device) -> nn.Module:
        """``objective`` as a module whose backward averages the gradients over all ranks."""
        if self.fsdp:
            return self.shard(objective, device)
        if self.size == 1:
            return objective
        # Gradients that are views of the buckets avoid a second copy of all gradients.
        devices = [device] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(objective, device_ids=devices, gradient_as_bucket_view=True)
        # Buffers of a Glow are constant. Set as an attribute, since torch 2.13 has renamed the argument.
        wrapped.broadcast_buffers = False
        return wrapped

    def shard(self, module: nn.Module, device: torch.device) -> nn.Module:
        """With FSDP, shard in place a Glow or a module that wraps one, each flow step as a unit; else do nothing."""
        if not self.fsdp:
            return module
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(device.type, (self.size,))
        for step in module.modules():
            if isinstance(step, FlowStep):
                fully_shard(step, mesh=mesh)
                register_fsdp_forward_method(step, "inverse")
        # By default FSDP keeps the root module's weights gathered after a forward, which changes parameters().
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        if isinstance(module, Glow):
            for name in ENTRY_POINTS:
                register_fsdp_forward_method(module, name)
        return module


SINGLE_PROCESS = Ranks()


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor; if ``tensor`` is sharded, every rank must call this."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of :func:`glow_kernels.training.checkpoint.flatten_optimizer`, sharded like the parameters."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    result = dict(tensors)
    for name, tensor in tensors.items():
        parameter = parameters[int(name.split(".")[1])]
        if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
            # Every rank has read the file, so nothing has to be sent.
            result[name] = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return result


@contextmanager
def streamed_to_device(model: Glow, device: torch.device) -> Iterator[None]:
    """Run ``model``, which is on the host, on ``device``, moving the weights of only one step there at a time."""
    handles = []
    for unit in model.modules():
        if isinstance(unit, (FlowStep, SplitPrior, TopPrior)):
            handles.append(unit.register_forward_pre_hook(lambda module, _: _move(module, device)))
            handles.append(unit.register_forward_hook(lambda module, *_: _move(module, torch.device("cpu"))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _move(module: nn.Module, device: torch.device) -> None:
    module.to(device)


def is_launched() -> bool:
    """Whether a launcher such as ``torchrun`` started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_device(name: str) -> str:
    """The device of this rank for ``--device`` ``name``: ``auto`` and ``cuda`` mean GPU number LOCAL_RANK.

    Raises:
        UsageError: ``name`` is a single GPU for several ranks, or there are fewer GPUs than ranks.
    """
    local_rank, local_size = (int(os.environ.get(key, "0")) for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and local_size > 1:
        raise UsageError(f"--device {name} is one device for {local_size} ranks: use --device cuda")
    if name != "cuda":
        return name
    if torch.cuda.is_available() and local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"{torch.cuda.device_count()} GPUs are too few for {local_size} ranks: lower --nproc-per-node, "
            "or use --device cpu"
        )
    return f"cuda:{local_rank}"


@contextmanager
def connected(fsdp: bool = False) -> Iterator[Ranks]:
    """The ranks that were launched together, connected; or this process alone.

    An error in the body ends every rank: the first to fail raises it with its rank in the message, the others exit
    silently with the same exit code. With gloo they notice at their next collective; with NCCL, whose collectives
    cannot detect a lost rank, the launcher ends them.

    Raises:
        UsageError: ``fsdp`` without a launcher, or a launcher that does not set how to connect.
        TrainingError: the other ranks cannot be reached, or one ended without reporting an error.
    """
    if not is_launched():
        if fsdp:
            raise UsageError(f"--fsdp shards a model over several processes: start them with {LAUNCH} --fsdp ...")
        yield SINGLE_PROCESS
        return
    store, rank, size = _connect()
    try:
        yield Ranks(rank, size, fsdp)
    except Exception as error:
        raise _joint_error(error, store, rank) from error
    dist.destroy_process_group()


def _connect() -> tuple[Any, int, int]:
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise UsageError(f"the launcher did not set {', '.join(missing)}: start with {LAUNCH} ...")
    if not dist.is_available():
        raise UsageError("this build of torch has no distributed training: train on one process")
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        store, rank, size = next(rendezvous("env://", timeout=CONNECT_TIMEOUT))
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise TrainingError(f"rank {os.environ['RANK']} cannot reach the other ranks: {error}") from error
    try:
        # Gloo is always there too: decisions are reduced on the host, wherever the model computes.
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", store=store, rank=rank, world_size=size)
    except (dist.DistError, RuntimeError, ValueError) as error:
        # Another rank may have connected, failed and exited already; then its error is the one to report.
        raise _joint_error(TrainingError(f"cannot reach the other ranks: {error}"), store, rank) from error
    return store, rank, size


def _joint_error(error: Exception, store: Any, rank: int) -> BaseException:
    """The exception to raise for ``error`` on this rank, given what other ranks have raised."""
    # The launcher sends SIGTERM to all ranks once one has exited, but the rank with the message must live to print it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    exit_code = getattr(error, "exit_code", 1)
    mine = f"{rank} {exit_code}"
    try:
        first = store.compare_set(FAILURE, "", mine).decode()
    except (dist.DistError, RuntimeError):
        first = mine  # The rank that hosted the store has exited.
    if first != mine:
        return SystemExit(int(first.split()[1]))
    if _is_lost_contact(error):
        why = "another rank exited without a message, perhaps killed: continue from the last checkpoint with --resume"
        return TrainingError(f"rank {rank}: {why} ({str(error).splitlines()[0]})")
    if not isinstance(error, (GlowKernelsError, OSError)):
        return RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")
    joint = GlowKernelsError(f"rank {rank}: {error}")
    joint.exit_code = exit_code
    return joint


def _is_lost_contact(error: Exception) -> bool:
    # Gloo raises plain RuntimeErrors.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
