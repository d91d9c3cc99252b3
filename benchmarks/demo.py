"""The whole life of a function on this machine: `make demo`, or `make serve` to keep it up.

Cold start, warm call, idle, parked, woken, stopped, up from standby, and what it cost, with a real model and the official
OpenAI SDK.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from benchmarks.local import REPOSITORY, Controller, running_controller, smollm2

IDLE_TIMEOUT_S = 3.0
JOURNAL_TIMEOUT_S = 15.0
SERVE_PORT = 8000
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stay", action="store_true", help="keep serving afterwards")
    parser.add_argument("--backend", default="process", choices=["process", "docker"])
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _exit)
    console = Console()
    home = Path(os.environ.get("COLDSPARK_HOME", REPOSITORY / ".coldspark" / "demo")).resolve()
    spec = smollm2(idle_timeout=IDLE_TIMEOUT_S)
    console.rule("the snapshot, built once")
    coldspark("snapshots", "build", spec.model.source, COLDSPARK_HOME=str(home))
    port = SERVE_PORT if arguments.stay else 0
    with running_controller(home, port=port) as controller:
        console.print(f"controller at {controller.url}, its log is {home / 'controller.log'}")
        controller.deploy(spec, arguments.backend)
        Demonstration(console, controller, spec.name, arguments.backend).run()
        if arguments.stay:
            console.rule("serving until Ctrl-C")
            console.print(f"dashboard {controller.url}/ and base_url {controller.url}/v1")
            signal.sigwait({signal.SIGINT, signal.SIGTERM})


class Demonstration:
    """One function from nothing to parked and back, with what a client sees of it."""

    def __init__(self, console: Console, controller: Controller, name: str, backend: str) -> None:
        self._console = console
        self._controller = controller
        self._client = controller.client()
        self._name = name
        self._backend = backend

    def run(self) -> None:
        """Show it all."""
        console = self._console
        console.rule("first call: nothing is running")
        with self._timeline():
            self._ask("What is the capital of France?")
        console.rule("second call: warm")
        self._ask("Name three primary colours.")
        console.rule(f"nobody asks for {IDLE_TIMEOUT_S:g} seconds")
        self._await_parking()
        console.rule("third call: wakes it")
        with self._timeline():
            self._ask("Write one sentence about the sea.")
        console.rule("stopped: a runtime in standby takes it up")
        self._controller.operate(self._name, "stop")
        self._controller.wait_for_standby(self._backend)
        with self._timeline():
            self._ask("What is the capital of Japan?")
        console.rule("what it cost")
        coldspark("cost", COLDSPARK_URL=self._controller.url)

    def _ask(self, question: str) -> None:
        self._console.print(f"[bold]{question}[/bold]")
        started_at = time.perf_counter()
        stream = self._client.chat.completions.with_raw_response.create(
            model=self._name,
            messages=[{"role": "user", "content": question}],
            max_tokens=60,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        tier = stream.headers["x-coldspark-tier"]
        first_at, usage = None, None
        for chunk in stream.parse():
            usage = chunk.usage or usage
            for choice in chunk.choices:
                if choice.delta.content:
                    first_at = first_at or time.perf_counter()
                    self._console.print(choice.delta.content, end="", highlight=False)
        if first_at is None or usage is None:
            raise RuntimeError("the stream ended without a token")
        speed = (usage.completion_tokens - 1) / (time.perf_counter() - first_at)
        self._console.print(
            f"\n[dim]found it {tier}; first token after {first_at - started_at:.2f} s, then "
            f"{speed:.0f} tokens/s; {usage.prompt_tokens} tokens in, {usage.completion_tokens} "
            "out[/dim]"
        )

    @contextmanager
    def _timeline(self) -> Iterator[None]:
        """Print the phases of the cold start that happens inside."""
        before = self._newest_cold_start()
        yield
        deadline = time.monotonic() + JOURNAL_TIMEOUT_S
        while (start := self._newest_cold_start()) is None or start == before:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no cold start is recorded after {JOURNAL_TIMEOUT_S:g} s")
            time.sleep(0.1)  # the journal is written once a second
        table = Table("phase", "seconds", title=f"from {start['from_tier']}")
        for phase in start["phases"]:
            table.add_row(phase["name"], f"{phase['seconds']:8.3f}")
        table.add_section()
        table.add_row("total", f"{start['total_s']:8.3f}")
        self._console.print(table)

    def _newest_cold_start(self) -> dict[str, Any] | None:
        answer = self._controller.get("/api/v1/cold-starts", function=self._name, limit=1)
        starts: list[dict[str, Any]] = answer["cold_starts"]
        return starts[0] if starts else None

    def _await_parking(self) -> None:
        before = self._held(self._controller.view(self._name))
        after = self._held(self._controller.wait_for_tier(self._name, "parked", timeout_s=60.0))
        for what in before:
            self._console.print(
                f"{what}: {before[what] / MIB:.0f} MiB → {after[what] / MIB:.0f} MiB, "
                f"[bold]{(before[what] - after[what]) / MIB:.0f} MiB given back[/bold]"
            )

    def _held(self, view: dict[str, Any]) -> dict[str, int]:
        (replica,) = view["replicas"]
        memory = replica["memory"]
        return {
            "weights": memory["weights_bytes"],
            "KV cache": memory["kv_cache_bytes"],
            "processes, resident": memory["host_rss_bytes"],
        }


def coldspark(*arguments: str, **environment: str) -> None:
    """Run our command line as a user would."""
    command = [sys.executable, "-m", "controller.cli.app", *arguments]
    subprocess.run(command, env=os.environ | environment, check=True)


def _exit(number: int, _frame: object) -> NoReturn:
    """End through every `finally`, so that the controller and its runtimes end too."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
