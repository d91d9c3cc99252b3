"""A world of batches on a fake clock: files, a database, and calls that play a script."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from controller.batches.calls import InnerAnswer, InnerCall
from controller.batches.files import FileStore
from controller.batches.run import BatchNode
from controller.batches.service import BatchService
from controller.store.batches import StoredBatch
from controller.store.database import Database
from controller.store.files import StoredFile
from tests.fakes.clock import FakeClock
from tests.fakes.function import FakeFunction, FakeRegistry

CHAT = "/v1/chat/completions"
DAY_S = 86_400.0
Script = Callable[[str], int | asyncio.Event]


class ScriptedCaller:
    """Answers a request with the status its script gives for the content it asks about."""

    def __init__(self) -> None:
        self.calls: list[InnerCall] = []
        self.script: Script = lambda content: 200
        self.num_running = 0
        self.most_running = 0

    async def __call__(self, call: InnerCall) -> InnerAnswer:
        self.calls.append(call)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            await asyncio.sleep(0)
            content = json.loads(call.body)["content"]
            status = self.script(content)
            if isinstance(status, asyncio.Event):
                await status.wait()
                status = 200
            return InnerAnswer(status, bytearray(json.dumps({"echo": content}).encode()))
        finally:
            self.num_running -= 1

    @property
    def asked(self) -> Counter[str]:
        """How often each content was asked about."""
        return Counter(json.loads(call.body)["content"] for call in self.calls)


class BatchWorld:
    """What outlives a controller: the disk, the database, the clock; and one service at a time."""

    def __init__(self, directory: Path, *, tier: str = "ready") -> None:
        self.directory = directory
        self.database = Database.open(f"sqlite:///{directory / 'coldspark.db'}")
        self.clock = FakeClock()
        self.caller = ScriptedCaller()
        self.function = FakeFunction(Path("/nowhere"), lambda _: [], tier=tier)
        self.registry = FakeRegistry(self.function)
        self.files = FileStore(
            directory / "files",
            self.database,
            self.clock,
            max_file_bytes=1 << 24,
            max_total_bytes=1 << 28,
        )
        self.service = self.new_service()

    def new_service(self) -> BatchService:
        """Return the service of another controller on the same disk."""
        return BatchService(
            BatchNode(
                database=self.database,
                files=self.files,
                registry=self.registry,
                clock=self.clock,
                call=self.caller,
                max_line_bytes=1 << 20,
            )
        )

    async def restart(self) -> None:
        """End the controller and start another."""
        await self.service.stop()
        self.service = self.new_service()
        await self.files.clear_up()
        await self.service.start()

    async def upload(self, lines: list[dict[str, Any]], key_id: str | None = None) -> str:
        """Store an input and return its id."""
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        async with self.files.receive() as (file_id, upload):
            await upload.write(content)
            await upload.finish()
            stored = StoredFile(
                id=file_id,
                key_id=key_id,
                filename="in.jsonl",
                purpose="batch",
                num_bytes=len(content),
                created_us=0,
            )
            await self.files.keep(stored)
        return file_id

    async def create(
        self, contents: list[str], *, window_s: float = DAY_S, key_id: str | None = None
    ) -> StoredBatch:
        """Make a batch that asks about some contents, whose custom ids they are too."""
        file_id = await self.upload([request_line(content) for content in contents], key_id)
        return await self.service.create(
            key_id=key_id,
            endpoint=CHAT,
            input_file_id=file_id,
            completion_window="24h",
            window_s=window_s,
            metadata={"for": "tests"},
        )

    async def until(
        self, batch_id: str, condition: Callable[[StoredBatch], bool], *, step_s: float = 0.0
    ) -> StoredBatch:
        """Look at the batches again and again until one is as wanted."""
        batch = None
        for _ in range(2000):
            batch = await self.service.get(batch_id, key_id=None)
            if condition(batch):
                return batch
            self.clock.advance(step_s)
            await self.service.look()
            await asyncio.sleep(0.005)
        raise AssertionError(f"the batch stays {batch}")

    async def ended(self, batch_id: str, *, step_s: float = 0.0) -> StoredBatch:
        """Wait for a batch's end."""
        ends = {"completed", "failed", "expired", "cancelled"}
        return await self.until(batch_id, lambda batch: batch.status in ends, step_s=step_s)

    async def rest(self) -> None:
        """Let everything happen that can."""
        for _ in range(20):
            await self.service.look()
            await asyncio.sleep(0.005)

    def answers(self, file_id: str | None) -> list[dict[str, Any]]:
        """Return the lines of an output."""
        if file_id is None:
            return []
        lines = self.files.path(file_id).read_text().splitlines()
        return [json.loads(line) for line in lines]

    async def close(self) -> None:
        """End everything."""
        await self.service.stop()
        self.database.close()


def request_line(content: str, **changes: Any) -> dict[str, Any]:
    """Return a line of an input."""
    body = {"model": "tiny", "content": content}
    return {"custom_id": content, "method": "POST", "url": CHAT, "body": body} | changes
