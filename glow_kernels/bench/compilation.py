"""``torch.compile`` of the textbook's operators: one compilation for all cases that can share it, on all cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch._functorch.config

from glow_kernels.bench import operators
from glow_kernels.bench.operators import Case, Function, Functions

# These directions run the same compiled graph.
_WITH_GRAPH = ("forward", "backward", "forward_backward")


class Compiler:
    """Caches compiled functions; cases that differ only in the allocator share one."""

    def __init__(self) -> None:
        self._compiled: dict[Case, Function] = {}
        # Backward alone is timed repeatedly on one graph, so it must not reuse the memory of that graph's tensors.
        torch._functorch.config.donated_buffer = False

    def functions(self, case: Case) -> Functions:
        """The textbook's functions for this case, compiled when they are first called."""
        textbook = operators.operator(case.operator).textbook
        direction = "no_grad" if case.direction == "no_grad" else "forward_backward"
        forward = self._function(textbook.forward, replace(case, direction=direction))
        return Functions(
            forward, textbook.inverse and self._function(textbook.inverse, replace(case, direction="inverse"))
        )

    def _function(self, function: Function, case: Case) -> Function:
        key = replace(case, allocator="tuned")
        if key not in self._compiled:
            self._compiled[key] = _compiled(function)
        return self._compiled[key]


def unit(case: Case) -> Case:
    """The case that represents all cases with the same compilation."""
    direction = "forward_backward" if case.direction in _WITH_GRAPH else case.direction
    return replace(case, direction=direction, allocator="tuned", threads=1)


def warm_up(cases: Sequence[Case]) -> None:
    """Compile for these cases in one process per core, to fill the compiler's cache on disk."""
    units = list(dict.fromkeys(unit(case) for case in cases))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, initializer=_start_worker) as pool:
        try:
            with _sigint_blocked():  # the workers inherit this: a terminal sends Ctrl-C to all processes
                futures = [pool.submit(_compile, one) for one in units]
            # A function that cannot be compiled fails again when it is measured, and is reported then.
            for future in futures:
                future.exception()
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Delay Ctrl-C to the end, and block it in processes started inside, on systems that support it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Child processes inherit the mask. The handler is for a signal that reaches another thread: Python runs it here.
    pending: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: pending.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
        if pending:
            signal.raise_signal(signal.SIGINT)


def _start_worker() -> None:
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1


def _compile(case: Case) -> None:
    torch.set_num_threads(case.threads)
    operator = operators.operator(case.operator)
    arguments = operator.arguments(case)
    grads = operators.upstream(operator, case, arguments)
    operators.call(Compiler().functions(case), case.direction, arguments, grads)()


def _compiled(function: Function) -> Function:
    # Give it its own code object: Dynamo tries all compilations of one code object in turn at every call.
    copy = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    # By default the generated code fixes the number of threads, so everything is compiled once for each number. Code
    # for any number was measured to take as long with two threads, and 2% longer with one.
    compiled: Function = torch.compile(copy, dynamic=False, fullgraph=True, options={"cpp.dynamic_threads": True})
    return compiled
