"""Real controllers and runtimes on loopback, with the small real model."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from functions.loader import load_file
from functions.spec import FunctionSpec
from tests.conftest import REPOSITORY

START_TIMEOUT_S = 30.0
SETTLE_TIMEOUT_S = 30.0


class Node:
    """A home directory and the controller that runs on it, if one does."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.url = ""
        self.environment = {"COLDSPARK_HOME": str(home), "COLDSPARK_STANDBY_REPLICAS": "0"}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start a controller on a free port and wait until it is ready."""
        with (self.home / "controller.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "controller.cli.app", "up", "--port", "0"],
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.url = self._address()
        wait_for(lambda: httpx.get(f"{self.url}/readyz").status_code == 200, "readiness")

    def kill(self) -> None:
        """Kill the controller without warning; runtimes stay."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def terminate(self) -> int:
        """End the controller in order and return its exit status; runtimes stay."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(60)

    def get(self, path: str, **params: Any) -> Any:
        """Return the JSON answer of an admin endpoint."""
        answer = httpx.get(self.url + path, params=params, timeout=60.0)
        answer.raise_for_status()
        return answer.json()

    def view(self, name: str = "smollm2") -> Any:
        """Return a function's view."""
        return self.get(f"/api/v1/functions/{name}")

    def figures(self) -> dict[str, float]:
        """Return all metrics, each the sum over its labels."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
        found: defaultdict[str, float] = defaultdict(float)
        for sample in (sample for family in families for sample in family.samples):
            found[sample.name] += sample.value
        return found

    def deploy(self, spec: FunctionSpec, backend: str = "process") -> None:
        """Deploy a function and wait for its snapshot."""
        body = {"spec": spec.to_json(), "backend": backend}
        answer = httpx.put(f"{self.url}/api/v1/functions/{spec.name}", json=body, timeout=60.0)
        assert answer.is_success, answer.text
        wait_for(lambda: self.view(spec.name)["snapshot_state"] == "ready", "the snapshot")

    def operate(self, operation: str, name: str = "smollm2") -> Any:
        """Warm, park or stop a function."""
        answer = httpx.post(f"{self.url}/api/v1/functions/{name}/{operation}", timeout=120.0)
        assert answer.is_success, answer.text
        return answer.json()

    def client(self) -> openai.OpenAI:
        """Return the official SDK, which never retries here."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    def coldspark(self, *arguments: str) -> str:
        """Run the command line against this node and return what it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "controller.cli.app", *arguments],
            env=os.environ | self.environment | {"COLDSPARK_URL": self.url},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ask(self, question: str = "What is the capital of France?", max_tokens: int = 20) -> str:
        """Return a greedy answer."""
        with self.client() as client:
            completion = client.chat.completions.create(
                model="smollm2",
                messages=[{"role": "user", "content": question}],
                max_tokens=max_tokens,
                temperature=0,
            )
        return completion.choices[0].message.content or ""

    def runtimes(self) -> list[psutil.Process]:
        """Return the runtime servers of this home that are alive."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def clean_up(self) -> None:
        """Leave no process behind, whatever happened."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for process in self.runtimes():
            process.kill()
        wait_for(lambda: not self.runtimes(), "the end of all processes")

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            is_alive = process.status() != psutil.STATUS_ZOMBIE
            return is_alive and any(str(self.home) in part for part in process.cmdline())
        except psutil.NoSuchProcess:
            return False

    def _address(self) -> str:
        """Read from the log where the newest controller listens."""
        assert self._process is not None
        already = (self.home / "controller.log").read_text().count('"listening"')
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            lines = (self.home / "controller.log").read_text().splitlines()
            urls = [line.split('"url": "')[1].split('"')[0] for line in lines if '"url": "' in line]
            if len(urls) > already:
                return urls[-1]
            time.sleep(0.05)
        raise AssertionError((self.home / "controller.log").read_text()[-2000:])


def wait_for(is_done: Callable[[], Any], what: str, timeout_s: float = SETTLE_TIMEOUT_S) -> Any:
    """Return the first true answer."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if answer := is_done():
                return answer
        except (httpx.TransportError, psutil.NoSuchProcess):
            pass
        time.sleep(0.05)
    raise AssertionError(f"waited {timeout_s} s for {what}")


@pytest.fixture
def node(smollm2_snapshot: Path) -> Iterator[Node]:
    """A running controller whose store, shared with other tests, already has the real model."""
    with home_directory() as home:
        (home / "snapshots").symlink_to(smollm2_snapshot.parent)
        with running_node(home) as node:
            yield node


@pytest.fixture
def node_with_own_store(smollm2_snapshot: Path) -> Iterator[Node]:
    """A running controller whose store has the real model and may be damaged; no file is shared."""
    with home_directory() as home:
        as_built = shutil.ignore_patterns("profiles")  # not what other tests have left
        shutil.copytree(
            smollm2_snapshot, home / "snapshots" / smollm2_snapshot.name, ignore=as_built
        )
        with running_node(home) as node:
            yield node


@contextmanager
def home_directory() -> Iterator[Path]:
    """Give a home with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="cs-") as directory:
        yield Path(directory)


@contextmanager
def running_node(home: Path) -> Iterator[Node]:
    """Run a controller on a home and leave nothing of it behind."""
    node = Node(home)
    try:
        node.start()
        yield node
    finally:
        node.clean_up()


@pytest.fixture
def spec() -> FunctionSpec:
    """The small real model as the repository ships it."""
    return load_file(REPOSITORY / "functions" / "smollm2.yaml")


def with_scaling(spec: FunctionSpec, **scaling: object) -> FunctionSpec:
    """Return a spec with some of its scaling section replaced."""
    changed = spec.scaling.model_dump() | scaling
    return FunctionSpec.model_validate(spec.model_dump() | {"scaling": changed})
