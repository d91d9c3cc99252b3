"""A runtime as a container: what is asked of the engine, and what its answer means. Pure."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from docker.types import DeviceRequest, LogConfig, Mount

from controller.backends.base import RuntimeInfo, RuntimePhase, RuntimeSpec
from controller.backends.directories import SOCKET_NAME
from controller.backends.gpu_access import GpuAccess

LABEL_PREFIX = "io.coldspark."
RUNTIME_ID_LABEL = f"{LABEL_PREFIX}runtime-id"
RUNTIME_MOUNT = "/run/coldspark"
STORE_MOUNT = "/snapshots"
KERNEL_MOUNT = "/kernel-cache"
UNPRIVILEGED_ID = 65532
CPU_PERIOD_US = 100_000
MAX_PROCESSES = 4096  # threads count, and a library starts one for each core
SCRATCH = "rw,exec,nosuid,nodev,mode=1777,size=1g"  # kernels are compiled to and loaded from /tmp
LOG_FILES = {"max-size": "8m", "max-file": "2"}
ENDED = frozenset({"exited", "dead", "removing"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A container of ours as the engine describes it."""

    id: str
    state: str
    info: RuntimeInfo
    finished_at: datetime | None = None  # by the engine's clock


def container_name(cluster: str, runtime_id: str) -> str:
    """Return the one name a runtime's container can have, so that none is created twice."""
    return f"coldspark-{cluster}-{runtime_id}"


def owner_ids() -> tuple[int, int]:
    """Return the user and group runtimes run as: ours, unless we are root."""
    if os.getuid() == 0:
        return UNPRIVILEGED_ID, UNPRIVILEGED_ID
    return os.getuid(), os.getgid()


def container_options(
    spec: RuntimeSpec, *, cluster: str, directory: Path, gpu_access: GpuAccess
) -> dict[str, Any]:
    """Return the arguments of `containers.create`, but for the image and its entry point."""
    uid, gid = owner_ids()
    options: dict[str, Any] = {
        "name": container_name(cluster, spec.runtime_id),
        "command": [
            *("--runtime-id", spec.runtime_id),
            *("--socket", f"{RUNTIME_MOUNT}/{SOCKET_NAME}"),
            *("--store", STORE_MOUNT),
        ],
        "labels": _labels(spec, cluster),
        "environment": _environment(spec),
        "user": f"{uid}:{gid}",
        "read_only": True,
        "tmpfs": {"/tmp": SCRATCH},
        "network_mode": "none",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "pids_limit": MAX_PROCESSES,
        "init": True,
        "restart_policy": {"Name": "no"},
        "log_config": LogConfig(type=LogConfig.types.JSON, config=LOG_FILES),
        "mounts": [
            Mount(RUNTIME_MOUNT, str(directory), type="bind"),
            Mount(STORE_MOUNT, str(spec.snapshot_store), type="bind", read_only=True),
        ],
    }
    if spec.device_uuids:
        _add_gpus(options, spec.device_uuids, gpu_access)
    if spec.memory_bytes is not None:
        options |= {"mem_limit": spec.memory_bytes, "memswap_limit": spec.memory_bytes}
    if spec.cpu is not None:
        # The engine refuses more than the machine has.
        options["nano_cpus"] = round(min(spec.cpu, os.cpu_count() or 1) * 1e9)
    return options


def resized(*, cpu: float | None, memory_bytes: int | None) -> dict[str, int]:
    """Return the arguments of `update_container` that set these limits."""
    changes: dict[str, int] = {}
    if cpu is not None:
        cores = min(cpu, os.cpu_count() or 1)
        changes |= {"cpu_period": CPU_PERIOD_US, "cpu_quota": round(cores * CPU_PERIOD_US)}
    if memory_bytes is not None:
        changes |= {"mem_limit": memory_bytes, "memswap_limit": memory_bytes}
    return changes


def container_of(attributes: Mapping[str, Any], endpoint: str) -> Container:
    """Return a container from what the engine says when it is inspected.

    Args:
        attributes: The engine's description.
        endpoint: Where its runtime is reached.
    """
    labels, state = attributes["Config"]["Labels"], attributes["State"]
    has_exited = state["Status"] in ENDED
    return Container(
        id=attributes["Id"],
        state=state["Status"],
        finished_at=datetime.fromisoformat(state["FinishedAt"]) if has_exited else None,
        info=RuntimeInfo(
            runtime_id=labels[RUNTIME_ID_LABEL],
            function=labels[f"{LABEL_PREFIX}function"],
            revision=labels[f"{LABEL_PREFIX}revision"],
            epoch=int(labels[f"{LABEL_PREFIX}epoch"]),
            phase=RuntimePhase.EXITED if has_exited else RuntimePhase.RUNNING,
            endpoint=endpoint,
            device_uuids=tuple(filter(None, labels[f"{LABEL_PREFIX}devices"].split(","))),
            exit_code=state["ExitCode"] if has_exited else None,
        ),
    )


def cluster_filter(cluster: str) -> dict[str, Any]:
    """Return the engine's filter for the containers of a cluster."""
    return {"label": [f"{LABEL_PREFIX}cluster={cluster}"]}


def is_labelled(attributes: Mapping[str, Any], *, cluster: str, runtime_id: str) -> bool:
    """Return whether a container is this runtime of this cluster, not just named like it."""
    labels = attributes["Config"]["Labels"] or {}
    wanted = {f"{LABEL_PREFIX}cluster": cluster, RUNTIME_ID_LABEL: runtime_id}
    return wanted.items() <= labels.items()


def _labels(spec: RuntimeSpec, cluster: str) -> dict[str, str]:
    labels = {
        "cluster": cluster,
        "function": spec.function,
        "revision": spec.revision,
        "epoch": str(spec.epoch),
        "runtime-id": spec.runtime_id,
        "devices": ",".join(spec.device_uuids),
    }
    return {LABEL_PREFIX + name: value for name, value in labels.items()}


def _environment(spec: RuntimeSpec) -> dict[str, str]:
    own = {"HOME": "/tmp", "CUDA_VISIBLE_DEVICES": ",".join(spec.device_uuids)}
    if not spec.device_uuids:
        own["NVIDIA_VISIBLE_DEVICES"] = "void"  # even where GPUs are given to every container
    return own | dict(spec.env)


def _add_gpus(options: dict[str, Any], uuids: Sequence[str], access: GpuAccess) -> None:
    if access.device_files is None:
        capabilities = [["gpu", "compute", "utility"]]
        request = DeviceRequest(driver="nvidia", device_ids=list(uuids), capabilities=capabilities)
        options["device_requests"] = [request]
    else:
        options["devices"] = [f"{file}:{file}:rw" for file in access.device_files(uuids)]
    for path in access.mounts:
        options["mounts"].append(Mount(str(path), str(path), type="bind", read_only=True))
    if access.kernel_cache is not None:
        options["mounts"].append(Mount(KERNEL_MOUNT, str(access.kernel_cache), type="bind"))
        options["environment"]["TRITON_CACHE_DIR"] = KERNEL_MOUNT
