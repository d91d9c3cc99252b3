"""Triton's cache, filled from a profile; a cubin is compiled here without any GPU."""

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from runtime.kernels.cache import KernelCache
from snapshots.profiles import KernelFile, ProfileUnusable, check_kernels

ENTRY = "A" * 52


def test_kernels_of_a_profile_are_not_compiled_again(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.runtime.kernels.compile_twice", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if "TRITON" not in name}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    without, with_profile, damaged = map(int, output.stdout.splitlines()[-1].split())
    assert (without, with_profile) == (1, 0)
    assert damaged == 1  # it is compiled again, and its bytes go nowhere
    # The intermediate forms, most of an entry, are of no use to a start.
    assert len(list((tmp_path / "second").glob("*/*"))) == 3


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kernel_file(name: str, content: bytes) -> KernelFile:
    return KernelFile(path=f"{ENTRY}/{name}", size_bytes=len(content), sha256="")


def test_a_library_that_was_loaded_from_the_cache_is_recorded(cache: Path) -> None:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    [some, *_] = (Path(os.__file__).parent / "lib-dynload").glob(f"*{suffix}")
    loaded, lying_there = cache / ENTRY / f"launcher{suffix}", cache / ENTRY / f"other{suffix}"
    loaded.parent.mkdir(parents=True)
    shutil.copy(some, loaded)
    shutil.copy(some, lying_there)
    ctypes.CDLL(str(loaded))
    contents = KernelCache().collect()
    assert contents == {f"{ENTRY}/launcher{suffix}": some.read_bytes()}
    check_kernels({path: len(content) for path, content in contents.items()})


def test_what_triton_has_is_left_alone(cache: Path) -> None:
    (cache / ENTRY).mkdir(parents=True)
    for name in ("k.json", "__grp__k.json", "launcher.so"):
        (cache / ENTRY / name).write_bytes(b"its own")

    def read(_file: KernelFile) -> bytes:
        raise AssertionError("nothing is needed")

    KernelCache().seed([kernel_file("k.json", b"ours"), kernel_file("k.cubin", b"ours")], read)
    KernelCache().seed([kernel_file("launcher.so", b"ours")], read)
    assert not (cache / ENTRY / "k.cubin").exists()


def test_kernels_are_seeded_if_none_is_left_out(cache: Path) -> None:
    kernels, before = KernelCache(), KernelCache().is_seeded
    good, bad = kernel_file("launcher.so", b"good"), kernel_file("other.so", b"bad")

    def read(file: KernelFile) -> bytes:
        if file is bad:
            raise ProfileUnusable("damaged")
        return b"good"

    kernels.seed([good], read)
    with_all = kernels.is_seeded
    assert kernels.collect() == {good.path: b"good"}, "a later start needs what this one had"
    (cache / good.path).unlink()
    kernels.seed([good, bad], read)
    assert (before, with_all, kernels.is_seeded) == (False, True, False)


def test_a_cache_that_cannot_be_written_to_is_a_reason(cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(ProfileUnusable, match="Triton's cache"):
        KernelCache().seed([kernel_file("launcher.so", b"")], lambda _file: b"")
