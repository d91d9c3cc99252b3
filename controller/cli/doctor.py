"""`coldspark doctor`: can this machine serve, and if not, what is missing."""

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from controller.cli.errors import ExitCode
from controller.cli.output import (
    OutputFormat,
    OutputOption,
    human_bytes,
    print_json,
    print_table,
)
from controller.cli.up import read_settings

if TYPE_CHECKING:
    from controller.settings import Settings

GIB = 1 << 30
MAX_SOCKET_PATH_BYTES = 107  # sun_path of Linux, less its final zero
TORCH_TIMEOUT_S = 120


class Verdict(StrEnum):
    """What a check found; only `fail` makes the command fail."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    check: str
    verdict: Verdict
    detail: str
    hint: str = ""


def doctor(output: OutputOption = OutputFormat.TABLE) -> None:
    """Check this machine; fails if something it needs is missing."""
    settings = read_settings()
    findings = [check(settings) for check in CHECKS]
    if output is OutputFormat.JSON:
        print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        rows = [(f.check, f.verdict, f.detail, f.hint) for f in findings]
        print_table(("CHECK", "RESULT", "DETAIL", "HINT"), rows)
    if any(finding.verdict is Verdict.FAIL for finding in findings):
        raise typer.Exit(ExitCode.FAILURE)


def check_python(_: "Settings") -> Finding:
    """Python is a version we run on."""
    version, is_good = platform.python_version(), (3, 11) <= sys.version_info[:2] <= (3, 12)
    verdict = Verdict.OK if is_good else Verdict.FAIL
    return Finding(
        check="python",
        verdict=verdict,
        detail=version,
        hint="" if is_good else "use Python 3.11 or 3.12",
    )


def check_torch(_: "Settings") -> Finding:
    """The interpreter runtimes get can import torch."""
    command = [sys.executable, "-c", "import torch; print(torch.__version__)"]
    hint = "pip install 'coldspark[runtime,build]'; only the docker backend does without"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TORCH_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        detail = f"import takes over {TORCH_TIMEOUT_S} s"
        return Finding(check="torch", verdict=Verdict.FAIL, detail=detail, hint=hint)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding(check="torch", verdict=Verdict.FAIL, detail=reason, hint=hint)
    return Finding(check="torch", verdict=Verdict.OK, detail=done.stdout.strip())


def check_memory(_: "Settings") -> Finding:
    """There is host memory to load a model into."""
    text = Path("/proc/meminfo").read_text()
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}
    free, total = kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024
    detail = f"{human_bytes(free)} of {human_bytes(total)} available"
    if free < 2 * GIB:
        hint = "a small model needs about 2 GiB; stop something"
        return Finding(check="memory", verdict=Verdict.WARN, detail=detail, hint=hint)
    return Finding(check="memory", verdict=Verdict.OK, detail=detail)


def check_disk(settings: "Settings") -> Finding:
    """There is room for snapshots."""
    usage = shutil.disk_usage(_existing(settings.home))
    detail = f"{human_bytes(usage.free)} free under {settings.home}"
    if usage.free < GIB:
        return Finding(
            check="disk",
            verdict=Verdict.FAIL,
            detail=detail,
            hint="free some, or set COLDSPARK_HOME",
        )
    if usage.free < 20 * GIB:
        hint = "an 8B snapshot takes 16 GiB; `coldspark snapshots gc` frees unused ones"
        return Finding(check="disk", verdict=Verdict.WARN, detail=detail, hint=hint)
    return Finding(check="disk", verdict=Verdict.OK, detail=detail)


def check_shared_memory(_: "Settings") -> Finding:
    """/dev/shm can hold what processes share."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding(
            check="/dev/shm", verdict=Verdict.FAIL, detail="missing", hint="mount a tmpfs there"
        )
    free = shutil.disk_usage(path).free
    detail = f"{human_bytes(free)} free"
    if free < 256 << 20:
        hint = "containers get 64 MiB by default: docker run --shm-size=1g"
        return Finding(check="/dev/shm", verdict=Verdict.WARN, detail=detail, hint=hint)
    return Finding(check="/dev/shm", verdict=Verdict.OK, detail=detail)


def check_home(settings: "Settings") -> Finding:
    """The home directory can be written."""
    directory = _existing(settings.home)
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        detail = f"{directory}: {error.strerror}"
        return Finding(
            check="home",
            verdict=Verdict.FAIL,
            detail=detail,
            hint="set COLDSPARK_HOME to a directory of yours",
        )
    return Finding(check="home", verdict=Verdict.OK, detail=str(settings.home))


def check_socket_path(settings: "Settings") -> Finding:
    """The longest runtime socket path fits the kernel's limit."""
    longest = settings.runtimes_dir / ("x" * 63) / "runtime.sock"
    num_bytes = len(os.fsencode(longest))
    detail = f"up to {num_bytes} of {MAX_SOCKET_PATH_BYTES} bytes"
    if num_bytes > MAX_SOCKET_PATH_BYTES:
        hint = f"set COLDSPARK_HOME to a path shorter by {num_bytes - MAX_SOCKET_PATH_BYTES} bytes"
        return Finding(check="socket path", verdict=Verdict.FAIL, detail=detail, hint=hint)
    return Finding(check="socket path", verdict=Verdict.OK, detail=detail)


def check_gpu(_: "Settings") -> Finding:
    """An NVIDIA driver answers."""
    import pynvml  # loads the driver's library

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        detail = f"none: {error}"
        return Finding(
            check="gpu",
            verdict=Verdict.WARN,
            detail=detail,
            hint="functions with resources.gpus: 0 run on the CPU",
        )
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        names = [
            f"{pynvml.nvmlDeviceGetName(h)} {human_bytes(pynvml.nvmlDeviceGetMemoryInfo(h).total)}"
            for h in handles
        ]
        driver = pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()
    return Finding(check="gpu", verdict=Verdict.OK, detail=f"{', '.join(names)}; driver {driver}")


def check_docker(settings: "Settings") -> Finding:
    """The Docker Engine answers and has the runtime image."""
    import docker  # 0.3 s
    from docker.errors import DockerException, ImageNotFound

    try:
        engine = docker.from_env(timeout=5)
    except DockerException as error:
        detail = f"no engine: {_root_cause(error)}"
        return Finding(
            check="docker",
            verdict=Verdict.WARN,
            detail=detail,
            hint="needed for --backend docker only",
        )
    try:
        version = engine.version()["Version"]
        engine.images.get(settings.docker_image)
    except ImageNotFound:
        detail = f"no image {settings.docker_image}"
        return Finding(
            check="docker",
            verdict=Verdict.WARN,
            detail=detail,
            hint="build it: docs/guides/docker.md",
        )
    except DockerException as error:
        return Finding(
            check="docker",
            verdict=Verdict.WARN,
            detail=str(error),
            hint="needed for --backend docker only",
        )
    finally:
        engine.close()
    return Finding(
        check="docker",
        verdict=Verdict.OK,
        detail=f"engine {version}, image {settings.docker_image}",
    )


def check_port(settings: "Settings") -> Finding:
    """The port is free, or it is a controller that holds it."""
    import httpx  # 0.1 s

    from controller.settings import family_of, url_of

    url = url_of(settings.host, settings.port)
    address = url.removeprefix("http://")
    try:
        where = (settings.host, settings.port)
        with socket.create_server(where, family=family_of(settings.host)):
            return Finding(check="port", verdict=Verdict.OK, detail=f"{address} is free")
    except OSError as error:
        reason = error.strerror
    try:
        answer = httpx.get(f"{url}/api/v1/status", timeout=3, trust_env=False).text
        is_ours = '"uptime_s"' in answer or '"invalid_api_key"' in answer
    except httpx.HTTPError:
        is_ours = False
    if is_ours:
        return Finding(
            check="port", verdict=Verdict.OK, detail=f"a controller answers at {address}"
        )
    return Finding(
        check="port",
        verdict=Verdict.FAIL,
        detail=f"{address}: {reason}",
        hint="set COLDSPARK_PORT to a free one",
    )


def _root_cause(error: BaseException) -> BaseException:
    """Return what a chain of wrapped errors began with."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _existing(path: Path) -> Path:
    """Return the nearest directory above that exists."""
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


CHECKS: tuple[Callable[["Settings"], Finding], ...] = (
    check_python,
    check_torch,
    check_memory,
    check_disk,
    check_shared_memory,
    check_home,
    check_socket_path,
    check_gpu,
    check_docker,
    check_port,
)
