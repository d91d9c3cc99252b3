"""Compile the Hopper kernels for a GPU that need not be there; a program, without the interpreter.

Prints the bytes of the machine code of each kernel, type and size.
"""

from collections.abc import Mapping

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from runtime.kernels import hopper_attention as attention
from runtime.kernels import hopper_gated_product as product

DTYPES = {"bf16": gl.bfloat16, "fp16": gl.float16}


def compile_attention(dtype: str, head_dim: int) -> int:
    """Return the size of the machine code."""
    constants = {
        "TABLE_STRIDE": 128,
        "NUM_HEADS": 32,
        "NUM_KV_HEADS": 8,
        "HEAD_DIM": head_dim,
        "PAGE": attention.PIECE,
        "KEYS": attention.KEYS,
        "SLOTS": attention.SLOTS,
        "REGISTERS": attention.REGISTERS,
        "num_warps": attention.NUM_WARPS,
    }
    types = {"out_ptr": f"*{dtype}", "num_units": "i32", "scale": "fp32"}
    types |= dict.fromkeys(("q_tiles", "kv_tiles"), tiles(dtype, attention.PIECE, head_dim))
    return code_size(attention._hopper_kernel, types, constants, otherwise="*i32")


def compile_gated_product(dtype: str, width: int) -> int:
    """Return the size of the machine code."""
    constants = {
        "SLOTS": product.WIDTHS[width],
        "TILE_ROWS": product.TILE_ROWS,
        "UNIT": product.UNIT,
        "REGISTERS": product.REGISTERS,
        "num_warps": product.NUM_WARPS,
    }
    types = {
        "x_tiles": tiles(dtype, product.TOKENS, product.INPUTS),
        "weight_tiles": tiles(dtype, width, product.INPUTS),
        "out_tiles": tiles(dtype, product.TOKENS // 2, width),
    }
    return code_size(product._gated_product_kernel, types, constants, otherwise="i32")


def tiles(dtype: str, num_rows: int, num_columns: int) -> str:
    """Return the type of a matrix in tiles of this shape."""
    shape = [num_rows, num_columns]
    layout = gl.NVMMASharedLayout.get_default_for(shape, DTYPES[dtype])
    return f"tensordesc<{dtype}{shape},{layout!r}>"


def code_size(
    kernel: GluonJITFunction,
    types: Mapping[str, str],
    constants: Mapping[str, int],
    *,
    otherwise: str,
) -> int:
    """Compile a kernel whose other arguments are of the type `otherwise`."""
    rest = dict.fromkeys(kernel.arg_names, otherwise)
    all_types = {**rest, **types, **dict.fromkeys(constants, "constexpr")}
    places = {argument: (index,) for index, argument in enumerate(kernel.arg_names)}
    pointers = [name for name, type_ in types.items() if type_.startswith("*")]
    source = GluonASTSource(
        kernel,
        all_types,
        {places[argument]: value for argument, value in constants.items()},
        attrs={places[pointer]: [["tt.divisibility", 16]] for pointer in pointers},
    )
    options = {"num_warps": constants["num_warps"]}
    return len(triton.compile(source, GPUTarget("cuda", 90, 32), options).asm["cubin"])


def main() -> None:
    """Compile for every type and size that the kernels take."""
    for dtype in DTYPES:
        for head_dim in attention.HEAD_DIMS:
            print("attention", dtype, head_dim, compile_attention(dtype, head_dim))  # noqa: T201
        for width in product.WIDTHS:
            print("product", dtype, width, compile_gated_product(dtype, width))  # noqa: T201


if __name__ == "__main__":
    main()
