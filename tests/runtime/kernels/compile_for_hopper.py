"""Compile the Hopper kernel for a GPU that need not be there; a program, without the interpreter.

Prints the bytes of the machine code of each type and head.
"""

from collections.abc import Mapping

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from runtime.kernels import hopper_attention as hopper

POINTERS = {"qkv_ptr", "out_ptr"}


def compile_for(name: str, dtype: gl.dtype, head_dim: int) -> int:
    """Return the size of the machine code."""
    kernel = hopper._hopper_kernel
    layout = gl.NVMMASharedLayout.get_default_for([hopper.PIECE, head_dim], dtype)
    constants: Mapping[str, int] = {
        "TABLE_STRIDE": 128,
        "NUM_HEADS": 32,
        "NUM_KV_HEADS": 8,
        "HEAD_DIM": head_dim,
        "PAGE": hopper.PIECE,
        "QUERIES": hopper.QUERIES,
        "KEYS": hopper.KEYS,
        "PIECE": hopper.PIECE,
        "SLOTS": hopper.SLOTS,
        "REGISTERS": hopper.REGISTERS,
        "num_warps": hopper.NUM_WARPS,
    }
    types = dict.fromkeys(kernel.arg_names, "*i32") | dict.fromkeys(constants, "constexpr")
    types |= dict.fromkeys(POINTERS, f"*{name}") | {"scale": "fp32"}
    types["kv_tiles"] = f"tensordesc<{name}[{hopper.PIECE}, {head_dim}],{layout!r}>"
    places = {argument: (index,) for index, argument in enumerate(kernel.arg_names)}
    source = GluonASTSource(
        kernel,
        types,
        {places[argument]: value for argument, value in constants.items()},
        attrs={places[pointer]: [["tt.divisibility", 16]] for pointer in POINTERS},
    )
    options = {"num_warps": hopper.NUM_WARPS}
    return len(triton.compile(source, GPUTarget("cuda", 90, 32), options).asm["cubin"])


def main() -> None:
    """Compile for every type and head that the kernel takes."""
    for name, dtype in (("bf16", gl.bfloat16), ("fp16", gl.float16)):
        for head_dim in hopper.HEAD_DIMS:
            print(name, head_dim, compile_for(name, dtype, head_dim))  # noqa: T201  # its answer


if __name__ == "__main__":
    main()
