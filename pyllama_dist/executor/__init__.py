"""Runs a node's program on its memory. Two ways: `compiled`, and `interpreter` to step through."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

from pyllama_dist.cores import available_cores
from pyllama_dist.errors import UsageError
from pyllama_dist.executor.memory import Memory
from pyllama_dist.program import AllReduce, Batch, Program
from pyllama_kernels.cpu import REFERENCE, KernelsError, choose


class Executor(AbstractContextManager["Executor"], Protocol):
    """What both executors offer.

    A step is `begin`, then `run` for each segment in order, then `end`, also after an error.
    Between segments, `reduce` makes parts of sums. Where an `AllReduce` takes its sum from is set
    in `memory.reduced` before a step.
    """

    memory: Memory

    def begin(self, batch: Batch) -> None:
        """Takes the rows that the segments will work on."""

    def run(self, segment: int) -> None:
        """Runs the ops of one segment."""

    def reduce(self, exchange: AllReduce, first: int, last: int) -> None:
        """Makes rows of a sum, from all regions of a pipe, in its region `REDUCED`.

        Args:
            exchange: of which pipe; its target is overwritten.
            first: the first row.
            last: the row after the last one.
        """

    def end(self) -> None:
        """Ends the step: threads sleep, unless the next one follows at once."""

    def close(self, error: BaseException | None = None) -> None:
        """Ends the threads."""


def make_executor(program: Program, n_threads: int) -> Executor:
    """The executor for the kernels that `kernels()` names.

    Raises:
        UsageError: `PYLLAMA_KERNELS` asks for kernels that are unknown or cannot run here.
    """
    if kernels() == REFERENCE:
        from pyllama_dist.executor.interpreter import Interpreter

        return Interpreter(program)
    from pyllama_dist.executor.compiled import CompiledExecutor

    return CompiledExecutor(program, n_threads)


def kernels() -> str:
    """The name of the kernels that run: what `PYLLAMA_KERNELS` asks for, or what suits the CPU.

    Raises:
        UsageError: they are unknown, or cannot run on this CPU.
    """
    try:
        return choose().name
    except KernelsError as error:
        raise UsageError(str(error)) from None


def prepare(notice: Callable[[str], None]) -> None:
    """Has the kernels ready: from the cache, or compiled now.

    Compiling is left to processes of its own: first the large parts, beside each other, then what
    holds them together. The compiler's memory goes with them.

    Args:
        notice: told what is going on, if it takes time.
    """
    if kernels() == REFERENCE:
        return
    from pyllama_kernels.jit import CACHE
    from pyllama_kernels.warm_up import compile_attention, compile_rest, warm_up

    done = None if CACHE is None else CACHE / "complete"
    if done is not None and not done.exists():
        notice(f"compiling {kernels()} kernels, once for this CPU; this takes some twenty seconds")
        large = [compile_attention, compile_rest] if available_cores() > 1 else []
        # If they fail, so does the call below, which can say why.
        if _in_processes(large) and _in_processes([warm_up]):
            done.touch()
    warm_up()


def _in_processes(functions: Sequence[Callable[[], None]]) -> bool:
    """Calls functions, each in a process of its own, at the same time; whether all went well."""
    with ExitStack() as stack:
        processes = []
        for function in functions:
            name = function.__name__
            code = f"from {function.__module__} import {name}; {name}()"
            process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)  # comes first, and does nothing to a process that is over
            processes.append(process)
        return all(process.wait() == 0 for process in processes)
