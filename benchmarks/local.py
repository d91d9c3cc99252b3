"""A controller of our own on this machine, for demonstrations and measurements."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from functions.loader import load_file
from functions.spec import FunctionSpec

REPOSITORY = Path(__file__).parents[1]
SMOLLM2 = REPOSITORY / "functions" / "smollm2.yaml"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Controller:
    """A running controller."""

    url: str
    home: Path
    pid: int

    def get(self, path: str, **params: Any) -> Any:
        """Return the JSON answer of an admin endpoint."""
        answer = httpx.get(self.url + path, params=params, timeout=60.0)
        answer.raise_for_status()
        return answer.json()

    def view(self, name: str) -> Any:
        """Return a function's view."""
        return self.get(f"/api/v1/functions/{name}")

    def operate(self, name: str, operation: str) -> Any:
        """Warm, park, stop or profile a function."""
        answer = httpx.post(f"{self.url}/api/v1/functions/{name}/{operation}", timeout=900.0)
        answer.raise_for_status()
        return answer.json()

    def time_operation(self, name: str, operation: str) -> float:
        """Do it, and return the seconds between request and answer, by a client that is connected.

        To make a client takes some 30 ms.
        """
        with httpx.Client(base_url=self.url, timeout=900.0) as client:
            client.get("/readyz")
            began = time.perf_counter()
            client.post(f"/api/v1/functions/{name}/{operation}").raise_for_status()
            return time.perf_counter() - began

    def deploy(self, spec: FunctionSpec, backend: str = "process") -> None:
        """Deploy a function and return when its snapshot is ready."""
        body = {"spec": spec.to_json(), "backend": backend}
        answer = httpx.put(f"{self.url}/api/v1/functions/{spec.name}", json=body, timeout=60.0)
        answer.raise_for_status()
        while (view := self.view(spec.name))["snapshot_state"] == "building":
            time.sleep(0.2)
        if view["snapshot_state"] != "ready":
            raise RuntimeError(f"no snapshot of {spec.name!r}: {view['last_error']}")

    def wait_for_tier(self, name: str, tier: str, timeout_s: float) -> Any:
        """Return the function's view once it is in a tier."""
        deadline = time.monotonic() + timeout_s
        while (view := self.view(name))["tier"] != tier or any(
            replica["state"] == "parking" for replica in view["replicas"]
        ):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name!r} is {view['tier']}, not {tier}, after {timeout_s} s")
            time.sleep(0.05)
        return view

    def wait_for_standby(self, backend: str = "process", timeout_s: float = 60.0) -> None:
        """Return once a runtime is in standby."""
        deadline = time.monotonic() + timeout_s
        while not self.get("/api/v1/status")["standbys"].get(backend, {}).get("ready"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no standby of {backend!r} after {timeout_s} s")
            time.sleep(0.05)

    def wait_for_host_cache(self, timeout_s: float = 120.0) -> None:
        """Return once weights are in pinned memory, as far as its budget goes."""
        deadline = time.monotonic() + timeout_s
        while True:
            cache = self.get("/api/v1/status")["host_cache"]
            if 0 < cache["wanted_bytes"] == cache["pinned_bytes"]:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"weights are not pinned after {timeout_s} s: {cache}")
            time.sleep(0.1)

    def client(self) -> openai.OpenAI:
        """Return the official SDK, pointed at this controller."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="not-needed", max_retries=0)


@contextmanager
def running_controller(
    home: Path,
    *,
    port: int = 0,
    log: Path | None = None,
    command: Sequence[str] = ("-m", "controller.cli.app", "up"),
    num_standbys: int = 1,
    host_cache_bytes: int = 0,
) -> Iterator[Controller]:
    """Run a controller on a home directory and stop it, with its runtimes, at the end.

    Args:
        home: Where it lives; created if need be.
        port: 0 for any free one.
        log: Where its output goes; None for a file in the home directory.
        command: Arguments to Python that start it.
        num_standbys: Runtimes it keeps without a model.
        host_cache_bytes: Memory in which it holds weights.
    """
    home.mkdir(parents=True, exist_ok=True)
    log_path = log or home / "controller.log"
    environment = os.environ | {
        "COLDSPARK_HOME": str(home),
        "COLDSPARK_PORT": str(port or _free_port()),
        "COLDSPARK_STOP_RUNTIMES_ON_EXIT": "true",
        "COLDSPARK_STANDBY_REPLICAS": str(num_standbys),
        "COLDSPARK_HOST_CACHE_BYTES": str(host_cache_bytes),
    }
    url = f"http://127.0.0.1:{environment['COLDSPARK_PORT']}"
    with log_path.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        _wait_ready(url, process, log_path)
        yield Controller(url=url, home=home, pid=process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def smollm2(**scaling: object) -> FunctionSpec:
    """Return the small model's spec with some of its scaling section replaced."""
    spec = load_file(SMOLLM2)
    changed = spec.scaling.model_dump() | scaling
    return FunctionSpec.model_validate(spec.model_dump() | {"scaling": changed})


def _wait_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", timeout=2.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise RuntimeError(f"the controller did not start; the end of {log}:\n{_tail(log)}")


def _tail(path: Path, num_lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-num_lines:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
