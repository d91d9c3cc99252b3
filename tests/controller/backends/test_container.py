"""What the engine is asked for, and how its answers are read."""

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pynvml
import pytest

from controller.backends.base import BackendError, RuntimeInfo, RuntimePhase, RuntimeSpec
from controller.backends.container import (
    Container,
    container_name,
    container_of,
    container_options,
    is_labelled,
)
from controller.backends.exit_tracker import ExitTracker
from controller.backends.gpu_access import GpuAccess, gpu_device_files
from tests.contracts.harnesses import spec

NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)


def options_of(runtime: RuntimeSpec, gpu_access: GpuAccess | None = None) -> dict[str, Any]:
    return container_options(
        runtime,
        cluster="test",
        directory=Path("/home/r-1"),
        gpu_access=gpu_access or GpuAccess(),
    )


def test_gpus_are_asked_for_by_uuid() -> None:
    options = options_of(replace(spec(), device_uuids=("GPU-1", "GPU-2")))
    (request,) = options["device_requests"]
    assert request["Driver"] == "nvidia"
    assert request["DeviceIDs"] == ["GPU-1", "GPU-2"]
    assert request["Capabilities"] == [["gpu", "compute", "utility"]]
    assert options["environment"]["CUDA_VISIBLE_DEVICES"] == "GPU-1,GPU-2"
    assert "NVIDIA_VISIBLE_DEVICES" not in options["environment"]


def test_gpus_are_handed_over_as_files_where_the_engine_cannot() -> None:
    access = GpuAccess(
        device_files=lambda uuids: [f"/dev/{uuid}" for uuid in uuids] + ["/dev/nvidiactl"],
        mounts=(Path("/usr/local/nvidia"),),
        kernel_cache=Path("/home/kernels"),
    )
    options = options_of(replace(spec(), device_uuids=("GPU-1",)), access)
    assert options["devices"] == ["/dev/GPU-1:/dev/GPU-1:rw", "/dev/nvidiactl:/dev/nvidiactl:rw"]
    assert "device_requests" not in options
    driver, kernels = options["mounts"][-2:]
    assert (driver["Source"], driver["Target"]) == ("/usr/local/nvidia", "/usr/local/nvidia")
    assert driver["ReadOnly"]
    assert (kernels["Source"], kernels["ReadOnly"]) == ("/home/kernels", False)
    assert options["environment"]["TRITON_CACHE_DIR"] == kernels["Target"]
    assert "devices" not in options_of(spec(), access), "only containers that use GPUs get any"
    assert len(options_of(spec(), access)["mounts"]) == 2


def test_the_files_of_a_gpu_go_by_the_driver_s_number(monkeypatch: pytest.MonkeyPatch) -> None:
    minors = {"GPU-a": 3}
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMinorNumber", lambda handle: minors[handle])
    assert gpu_device_files(["GPU-a"])[0] == "/dev/nvidia3"


def test_a_gpu_that_the_driver_does_not_know_is_named() -> None:
    with pytest.raises(BackendError, match="GPU-nowhere"):
        gpu_device_files(["GPU-nowhere"])


def test_no_gpu_means_none_whatever_the_engine_s_default() -> None:
    options = options_of(spec())
    assert not {"device_requests", "devices"} & set(options)
    assert options["environment"]["CUDA_VISIBLE_DEVICES"] == ""
    assert options["environment"]["NVIDIA_VISIBLE_DEVICES"] == "void"


def test_limits_are_set_only_where_given() -> None:
    assert not {"mem_limit", "memswap_limit", "nano_cpus"} & set(options_of(spec()))
    options = options_of(replace(spec(), cpu=0.5, memory_bytes=1 << 30))
    assert options["nano_cpus"] == 500_000_000
    assert options["mem_limit"] == options["memswap_limit"] == 1 << 30


def test_no_more_processors_are_asked_for_than_there_are() -> None:
    num_cpus = os.cpu_count() or 1
    assert options_of(replace(spec(), cpu=10_000.0))["nano_cpus"] == num_cpus * 10**9


@pytest.mark.parametrize(("uid", "expected"), [(0, "65532:65532"), (1000, "1000:1001")])
def test_a_container_never_runs_as_root(
    uid: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: uid)
    monkeypatch.setattr(os, "getgid", lambda: 1001)
    assert options_of(spec())["user"] == expected


def test_labels_come_back_as_they_went() -> None:
    runtime = replace(spec(), device_uuids=("GPU-1", "GPU-2"))
    attributes = inspected(options_of(runtime)["labels"], "running")
    assert container_of(attributes, "unix:///s").info == RuntimeInfo(
        runtime_id="r-1",
        function=runtime.function,
        revision=runtime.revision,
        epoch=runtime.epoch,
        phase=RuntimePhase.RUNNING,
        endpoint="unix:///s",
        device_uuids=runtime.device_uuids,
    )


@pytest.mark.parametrize("status", ["exited", "dead", "removing"])
def test_an_ended_container_has_an_exit_code(status: str) -> None:
    container = container_of(inspected(options_of(spec())["labels"], status), "unix:///s")
    assert (container.info.phase, container.info.exit_code) == (RuntimePhase.EXITED, 137)
    assert container.finished_at == datetime(2026, 3, 2, 12, 0, 1, 123456, tzinfo=UTC)


def test_a_name_alone_proves_nothing() -> None:
    assert container_name("a-b", "c") == container_name("a", "b-c")
    attributes = inspected(container_options_labels("a", "b-c"), "running")
    assert is_labelled(attributes, cluster="a", runtime_id="b-c")
    assert not is_labelled(attributes, cluster="a-b", runtime_id="c")
    assert not is_labelled(inspected(None, "running"), cluster="a", runtime_id="b-c")


def test_an_exit_is_news_once() -> None:
    tracker = ExitTracker(since=NOW)
    assert tracker.update([container("a")]) == []
    ended = container("a", ended_at=NOW - timedelta(hours=1))
    assert tracker.update([ended]) == [ended]  # it ran at the last look: no clock decides
    assert tracker.update([ended]) == []


def test_what_had_ended_before_is_no_news() -> None:
    old, new = (
        container(name, ended_at=NOW + timedelta(seconds=s)) for name, s in (("a", -1), ("b", 1))
    )
    assert ExitTracker(since=NOW).update([old, new]) == [new]


def test_one_that_came_and_went_between_two_looks_is_news() -> None:
    tracker = ExitTracker(since=NOW)
    tracker.update([])
    ended = container("a", ended_at=NOW + timedelta(seconds=1))
    assert tracker.update([ended]) == [ended]


def test_a_container_removed_while_it_ran_has_exited() -> None:
    tracker = ExitTracker(since=NOW)
    tracker.update([container("a"), container("b", ended_at=NOW - timedelta(1))])
    (gone,) = tracker.update([])
    assert (gone.id, gone.info.phase, gone.info.exit_code) == ("a", RuntimePhase.EXITED, None)
    assert tracker.update([]) == []


def container(name: str, *, ended_at: datetime | None = None) -> Container:
    """Return a container, running unless it ended."""
    info = RuntimeInfo(
        runtime_id=name,
        function="f",
        revision="r",
        epoch=1,
        phase=RuntimePhase.RUNNING if ended_at is None else RuntimePhase.EXITED,
        endpoint="unix:///s",
    )
    state = "running" if ended_at is None else "exited"
    return Container(id=name, state=state, info=info, finished_at=ended_at)


def container_options_labels(cluster: str, runtime_id: str) -> dict[str, str]:
    options = container_options(
        spec(runtime_id), cluster=cluster, directory=Path("/d"), gpu_access=GpuAccess()
    )
    return dict(options["labels"])


def inspected(labels: dict[str, str] | None, status: str) -> dict[str, Any]:
    """Return what the engine says of a container."""
    return {
        "Id": "0123",
        "Config": {"Labels": labels},
        "State": {
            "Status": status,
            "ExitCode": 137,
            "FinishedAt": "2026-03-02T12:00:01.123456789Z",
        },
    }
