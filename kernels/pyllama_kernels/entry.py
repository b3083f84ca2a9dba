"""Entries: the compiled functions that the op loop calls by their address.

An entry does one part of an op. Each is compiled by itself: the op loop knows no kernel, a new op
needs no change to it, and a program loads only what it calls. An entry has these arguments:

    op       a row of the table, see `optable`
    step     int64, the words of a step
    part     this part
    parts    all parts of the op
    thread   who does it

The entry of matrix products has its first unit for `part`, and for `parts` the one after its last.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from collections.abc import Callable
from functools import cached_property
from typing import Any

from numba import from_dtype, int64, types
from numba.core import cgutils
from numba.extending import intrinsic

from pyllama_kernels.jit import kernel
from pyllama_kernels.optable import OP

_ARGUMENTS = (from_dtype(OP), types.Array(int64, 1, "C"), int64, int64, int64)


class Entry:
    """A function that the op loop can call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__name__
        self.function = kernel(function)

    @cached_property
    def address(self) -> int:
        """Where its machine code is; loaded from the cache or compiled when first asked for."""
        self.function.compile(_ARGUMENTS)
        code = self.function.overloads[_ARGUMENTS]
        address: int = code.library.get_pointer_to_function(code.fndesc.llvm_func_name)
        return address


ENTRIES: dict[str, Entry] = {}


def entry(function: Callable[..., Any]) -> Entry:
    """Makes a function an entry, which rows of the table find by its name."""
    if function.__name__ in ENTRIES:
        raise ValueError(f"there is an entry {function.__name__} already")
    ENTRIES[function.__name__] = Entry(function)
    return ENTRIES[function.__name__]


@intrinsic
def call(typingctx, address, op, step, part, parts, thread):
    """Calls the entry at an address."""

    def codegen(context, builder, signature, args):
        convention = context.call_conv
        kind = convention.get_function_type(types.none, _ARGUMENTS)
        result = cgutils.alloca_once(builder, kind.args[0].pointee)
        problem = cgutils.alloca_once(builder, kind.args[1].pointee)
        packed = context.get_arg_packer(_ARGUMENTS).as_arguments(builder, args[1:])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [result, problem, *packed])
        return context.get_dummy_value()

    return types.void(int64, *_ARGUMENTS), codegen
