"""Compile a kernel for a GPU that need not be there, in one cache and then in another.

Run as a program, without Triton's interpreter: prints how often each cache had to compile.
"""

import os
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from runtime.kernels.cache import KernelCache
from snapshots.profiles import (
    MemoryPlan,
    Profile,
    ProfileUnusable,
    find_profile,
    kernel_files,
    read_kernel,
    write_profile,
)

HERE = {"device": "a GPU that is not there"}


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def _double(values, size: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's own types
    offsets = tl.arange(0, size)
    tl.store(values + offsets, 2 * tl.load(values + offsets))


def compile_in(cache_dir: Path, snapshot: Path) -> int:
    """Start as an engine does, with an own cache; leave a profile if there was none."""
    os.environ["TRITON_CACHE_DIR"] = str(cache_dir)
    cache = KernelCache()
    try:
        profile = find_profile(snapshot, HERE)
        cache.seed(profile.kernels, lambda file: read_kernel(snapshot, profile, file))
    except ProfileUnusable:
        pass
    source = ASTSource(_double, {"values": "*fp32"}, {"size": 32})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
    contents = cache.collect()
    memory = MemoryPlan(weights_bytes=0, kv_cache_bytes=0, num_kv_blocks=0, max_model_len=0)
    made = Profile(fingerprint=HERE, memory=memory, kernels=kernel_files(contents))
    write_profile(snapshot, made, contents)
    return cache.num_compilations


def main(home: Path) -> None:
    """Print the compilations of a first start, of one elsewhere, and of one with damage."""
    snapshot = home / "snapshot"
    first, second = (compile_in(home / name, snapshot) for name in ("first", "second"))
    for cubin in snapshot.rglob("*.cubin"):
        cubin.write_bytes(bytes(cubin.stat().st_size))
    print(first, second, compile_in(home / "third", snapshot))  # noqa: T201  # its answer


if __name__ == "__main__":
    main(Path(sys.argv[1]))
