"""Profiles beside a snapshot: written whole, found by fingerprint, refused for a reason."""

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snapshots import profiles
from snapshots.profiles import (
    ColdStartTimes,
    MemoryPlan,
    Profile,
    ProfileUnusable,
    StepSize,
    find_profile,
    kernel_files,
    read_kernel,
    read_profiles,
    scan_profiles,
    write_profile,
)

HERE = {"device": "NVIDIA H200", "torch": "2.11.0", "engine.block_size": "64"}
ENTRY = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567ABCDEFGHIJKLMNOPQRST"
KERNELS = {f"{ENTRY}/norm.cubin": b"\x7fELF", f"{ENTRY}/norm.json": b"{}"}


@pytest.fixture
def made() -> Profile:
    return Profile(
        fingerprint=HERE,
        memory=MemoryPlan(weights_bytes=7, kv_cache_bytes=8, num_kv_blocks=9, max_model_len=4096),
        steps=(
            StepSize(num_tokens=4, num_tiles=0, count=90),
            StepSize(num_tokens=64, num_tiles=17, count=2),
        ),
        kernels=kernel_files(KERNELS),
        cold_starts={"parked": ColdStartTimes(count=3, total_s=0.6, phases={"first_token": 0.1})},
    )


def test_what_was_written_is_found(made: Profile, tmp_path: Path) -> None:
    write_profile(tmp_path, made, KERNELS)
    found = find_profile(tmp_path, dict(reversed(HERE.items())))
    assert found == made
    assert {file.path: read_kernel(tmp_path, found, file) for file in found.kernels} == KERNELS


def test_another_machines_profile_is_ignored_with_its_reason(made: Profile, tmp_path: Path) -> None:
    with pytest.raises(ProfileUnusable, match="no profile has been recorded yet"):
        find_profile(tmp_path, HERE)
    write_profile(tmp_path, replace(made, fingerprint=HERE | {"torch": "2.12.0", "device": "A100"}))
    write_profile(tmp_path, replace(made, fingerprint=HERE | {"device": "NVIDIA H100"}))
    with pytest.raises(ProfileUnusable) as caught:
        find_profile(tmp_path, HERE)
    # The nearest one, and only what differs.
    assert str(caught.value) == "the profile is of device 'NVIDIA H100', here 'NVIDIA H200'"


def test_a_property_the_recorder_did_not_know_differs_too(made: Profile, tmp_path: Path) -> None:
    write_profile(tmp_path, made)
    with pytest.raises(ProfileUnusable, match=r"driver '', here 'CUDA 13\.0'"):
        find_profile(tmp_path, HERE | {"driver": "CUDA 13.0"})


def changed(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update({key: value})


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "version": changed("format_version", 2),
    "kind": changed("steps", {"a": 1}),
    "negative": changed("steps", [{"num_tokens": -1, "num_tiles": 0, "count": 1}]),
    "unknown field": changed("memory", {"weights_bytes": 1, "more": 2}),
    "missing": lambda content: content.pop("memory"),
    "forged fingerprint": changed("fingerprint", {"device": "another"}),
    "endless time": lambda c: c["cold_starts"]["parked"].update(total_s=float("inf")),
    "path": changed("kernels", [{"path": "../../x.so", "size_bytes": 1, "sha256": ""}]),
    "group": changed(
        "kernels", [{"path": f"{ENTRY}/__grp__norm.json", "size_bytes": 1, "sha256": ""}]
    ),
    "too large": changed(
        "kernels", [{"path": f"{ENTRY}/a.so", "size_bytes": 1 << 40, "sha256": ""}]
    ),
    "list": lambda content: content.update(cold_starts=[]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_profile_is_refused(name: str, made: Profile, tmp_path: Path) -> None:
    write_profile(tmp_path, made, KERNELS)
    file = tmp_path / "profiles" / made.key / "profile.json"
    content = json.loads(file.read_text())
    DAMAGE[name](content)
    file.write_text(json.dumps(content))
    with pytest.raises(ProfileUnusable):
        find_profile(tmp_path, HERE)
    assert read_profiles(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"1", b"[" * 100_000])
def test_what_is_no_profile_is_refused(content: bytes, made: Profile, tmp_path: Path) -> None:
    write_profile(tmp_path, made)
    (tmp_path / "profiles" / made.key / "profile.json").write_bytes(content)
    with pytest.raises(ProfileUnusable, match=r"damaged|version"):
        find_profile(tmp_path, HERE)


def test_a_kernel_that_was_changed_or_linked_elsewhere_is_refused(
    made: Profile, tmp_path: Path
) -> None:
    write_profile(tmp_path, made, KERNELS)
    cubin, metadata = made.kernels
    kernels = tmp_path / "profiles" / made.key / "kernels"
    (kernels / cubin.path).write_bytes(b"\x7fELG")
    with pytest.raises(ProfileUnusable, match="not what was recorded"):
        read_kernel(tmp_path, made, cubin)
    (tmp_path / "elsewhere").write_bytes(b"{}")
    (kernels / metadata.path).unlink()
    (kernels / metadata.path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ProfileUnusable, match="damaged"):
        read_kernel(tmp_path, made, metadata)


def test_a_write_that_fails_leaves_the_old_profile(
    made: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_profile(tmp_path, made, KERNELS)
    written: list[Path] = []
    write_bytes = Path.write_bytes

    def full_disk(path: Path, content: bytes) -> int:
        write_bytes(path, content[: len(content) // 2])
        written.append(path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_profile(tmp_path, replace(made, steps=()))
    assert find_profile(tmp_path, HERE) == made
    assert written
    assert not written[0].exists()


def test_a_new_profile_replaces_the_kernels_of_the_old_one(made: Profile, tmp_path: Path) -> None:
    write_profile(tmp_path, made, KERNELS)
    others = {f"{ENTRY[::-1]}/rope.cubin": b"new"}
    newer = replace(made, kernels=kernel_files(others))
    write_profile(tmp_path, newer, others)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["profile.json", "rope.cubin"]
    write_profile(tmp_path, replace(newer, steps=()))  # without kernels, they stay
    assert len(list(tmp_path.rglob("*.cubin"))) == 1
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o044 for path in files)  # containers read them


def test_the_oldest_profiles_go(made: Profile, tmp_path: Path) -> None:
    for number in range(profiles.MAX_PROFILES + 2):
        one = replace(made, fingerprint=HERE | {"torch": str(number)})
        write_profile(tmp_path, one)
        os.utime(tmp_path / "profiles" / one.key / "profile.json", (number, number))
    kept = [one.fingerprint["torch"] for one in read_profiles(tmp_path)]
    assert kept == [str(number) for number in reversed(range(2, profiles.MAX_PROFILES + 2))]


def test_kernels_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "MAX_KERNELS_BYTES", 10)
    with pytest.raises(ProfileUnusable, match="2 files of 12 bytes"):
        kernel_files({f"{ENTRY}/a.so": bytes(6), f"{ENTRY}/b.so": bytes(6)})
    monkeypatch.setattr(profiles, "MAX_KERNEL_FILES", 1)
    with pytest.raises(ProfileUnusable, match="at most 1 of"):
        kernel_files({f"{ENTRY}/a.so": b"", f"{ENTRY}/b.so": b""})


def test_a_damaged_profile_is_named_beside_the_others(made: Profile, tmp_path: Path) -> None:
    other = replace(made, fingerprint=HERE | {"torch": "2.12.0"})
    write_profile(tmp_path, made)
    write_profile(tmp_path, other)
    (tmp_path / "profiles" / made.key / "profile.json").write_text("{")
    found = scan_profiles(tmp_path)
    assert found[other.key] == other
    assert "damaged" in str(found[made.key])
