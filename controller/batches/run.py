"""One batch on its way: checked, run a few requests at a time, put together.

The task that runs a batch owns it. What is done is what its spool says, so a controller that
starts again goes on where the last line was written.
"""

import asyncio
import json
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from controller.batches.access import transact
from controller.batches.batch import EXPIRING, BatchStatus, last_status, moved
from controller.batches.calls import Caller, InnerAnswer, InnerCall
from controller.batches.files import FileStore
from controller.batches.lines import BatchInput, LineError, read_input
from controller.batches.policy import Allowance, Situation, allowance
from controller.batches.spool import Answer, Spool
from controller.batches.threads import open_in_thread
from controller.clock import Clock, unix_us
from controller.errors import ApiError, InternalError, ModelNotFound, StoreUnavailable
from controller.scaling.generation import FunctionRegistry, ServedFunction
from controller.store.batches import Batches, StoredBatch
from controller.store.database import Database
from controller.store.files import StoredFile

log = structlog.get_logger(__name__)

PASSING = frozenset({408, 429, 503, 504})
"""Statuses that say nothing of the request: it is asked again until the deadline."""
DOUBTFUL = frozenset({500, 502})
"""Statuses that the request itself may have caused: it is asked again a few times."""
MAX_DOUBTFUL = 3
FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
QUIET_S = 10.0  # without a request that may run, until the batch's files are closed
BATCH_PRIORITY = 1_000_000  # after whatever an interactive request is likely to ask for
SAVE_S = 1.0  # between two times that progress is written down
STORE_PAUSE_S = 1.0
OUTPUT_PURPOSE = "batch_output"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchNode:
    """What all batches of one controller share.

    Attributes:
        started: Requests of batches under way, by function.
    """

    database: Database
    files: FileStore
    registry: FunctionRegistry
    clock: Clock
    call: Caller
    max_line_bytes: int
    started: Counter[str] = field(default_factory=Counter)


class BatchRun:
    """Runs one batch to its end.

    Args:
        batch: Not ended.
        node: What it shares with the others.
    """

    def __init__(self, batch: StoredBatch, node: BatchNode) -> None:
        self.batch = batch
        self._node = node
        self._look = asyncio.Event()
        self._request_s: float | None = None
        self._running: dict[asyncio.Task[InnerAnswer], int] = {}
        self._num_doubtful: Counter[int] = Counter()
        self._num_pauses = 0
        self._paused_until = 0.0
        self._saved_at = 0.0

    def look(self) -> None:
        """Have the batch look again at what it may do."""
        self._look.set()

    async def cancel(self) -> None:
        """Ask for the end; requests that run are dropped, answers that are there are kept."""
        if self.batch.status in (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS):
            self.batch = self._moved(BatchStatus.CANCELLING)
            await transact(self._node.database, lambda c: Batches(c).put(self.batch))
            self.look()

    async def run(self) -> None:
        """Bring the batch to its end; cancelling leaves it for the next controller."""
        if self.batch.status == BatchStatus.VALIDATING and not await self._validate():
            return
        while self.batch.status != BatchStatus.FINALIZING:
            await self._until_needed()
            if await self._run_requests():
                break
        await self._finalize()

    # Before.

    async def _validate(self) -> bool:
        """Check the whole input; return whether the batch goes on."""
        found, errors = await self._read_input()
        if not errors:
            errors = self._check_served(found.model)
        if errors:
            listed = [error.to_json() for error in errors]
            self.batch = replace(self._moved(BatchStatus.FAILED), errors=listed)
        else:
            self.batch = replace(self.batch, model=found.model, num_total=len(found.custom_ids))
            if self.batch.status == BatchStatus.VALIDATING:  # else it is being cancelled
                self.batch = self._moved(BatchStatus.IN_PROGRESS)
        await self._save()
        return not errors

    async def _read_input(self) -> tuple[BatchInput, list[LineError]]:
        return await asyncio.to_thread(
            read_input,
            self._node.files.path(self.batch.input_file_id),
            self.batch.endpoint,
            max_line_bytes=self._node.max_line_bytes,
        )

    def _check_served(self, model: str) -> list[LineError]:
        try:
            self._node.registry.resolve(model)
        except ModelNotFound as error:
            return [LineError(code="model_not_found", message=error.message, param="body.model")]
        except ApiError:
            pass  # its snapshot is being built
        return []

    # Meanwhile.

    async def _until_needed(self) -> None:
        """Wait until something may run or the time is over; until then nothing is held open."""
        while self._may_go_on() and not self._room():
            await self._wait()

    def _room(self) -> int:
        function = self._function()
        num_left = self.batch.num_total - self.batch.num_completed - self.batch.num_failed
        # None left: a controller that ended before it could say so.
        if num_left <= 0:
            return 1
        return 0 if function is None else self._allowance(function, num_left).num_requests

    async def _run_requests(self) -> bool:
        """Run requests as long as any may run; return whether the batch is over."""
        found, errors = await self._read_input()
        if errors:  # it was good before
            log.error("the input of a batch is gone", batch_id=self.batch.id)
            self._note_expiry()
            return True
        spool = await open_in_thread(partial(Spool.open, *self._spool_paths), Spool.close)
        try:
            self._count(spool)
            missing = (i for i, name in enumerate(found.custom_ids) if name not in spool.done)
            pending = deque(missing)
            try:
                is_quiet = await self._run_pending(found, pending, spool)
            finally:
                await self._drop_running()
            if is_quiet:
                return False
            is_short = len(spool.done) < len(found.custom_ids)
            if is_short and self.batch.status == BatchStatus.IN_PROGRESS:
                await self._expire(found, spool)
            await asyncio.to_thread(spool.sync)
            return True
        finally:
            self._count(spool)
            await asyncio.shield(asyncio.to_thread(spool.close))

    async def _run_pending(self, found: BatchInput, pending: deque[int], spool: Spool) -> bool:
        """Run requests to the end; return whether it was left because nothing may run for long."""
        clock = self._node.clock
        active_at = clock.monotonic()
        while (pending or self._running) and self._may_go_on():
            self._start(found, pending)
            if self._running or clock.monotonic() < self._paused_until:
                active_at = clock.monotonic()
            elif clock.monotonic() - active_at >= QUIET_S:
                return True
            await self._wait()
            await self._take(found, pending, spool)
        return False

    def _may_go_on(self) -> bool:
        return self.batch.status == BatchStatus.IN_PROGRESS and self._left_s() > 0

    def _start(self, found: BatchInput, pending: deque[int]) -> None:
        """Begin as many requests as may run now."""
        if not pending or self._node.clock.monotonic() < self._paused_until:
            return
        function = self._function()
        if function is None:
            return
        allowed = self._allowance(function, len(pending) + len(self._running))
        while pending and len(self._running) < allowed.num_requests:
            index = pending.popleft()
            task = asyncio.create_task(
                self._ask(found, index, function.name, may_wake=allowed.may_wake),
                name=f"{self.batch.id}-{index}",
            )
            self._running[task] = index
            self._node.started[function.name] += 1
            task.add_done_callback(lambda _: self._ended(function.name))

    def _allowance(self, function: ServedFunction, num_left: int) -> Allowance:
        load, scaling = function.load, function.spec.scaling
        num_batched = self._node.started[function.name]
        num_strangers = max(load.in_flight + load.num_queued - num_batched, 0)
        return allowance(
            Situation(
                left_s=self._left_s(),
                window_s=(self.batch.expires_us - self.batch.created_us) / 1e6,
                num_left=num_left,
                request_s=self._request_s,
                wake_s=load.wake_s,
                num_ready=load.num_ready,
                num_others=num_strangers + num_batched - len(self._running),
                num_queued=load.num_queued,
                target_concurrency=scaling.target_concurrency,
                max_replicas=scaling.max_replicas,
            )
        )

    async def _ask(
        self, found: BatchInput, index: int, function: str, *, may_wake: bool
    ) -> InnerAnswer:
        body = await asyncio.to_thread(found.body, index)
        started = self._node.clock.monotonic()
        answer = await self._node.call(
            InnerCall(
                path=self.batch.endpoint,
                body=body,
                request_id=f"{self.batch.id}-{index}",
                key_id=self.batch.key_id,
                may_wake=may_wake,
                priority=BATCH_PRIORITY,
            )
        )
        if answer.status == 200:
            took_s = self._node.clock.monotonic() - started
            known_s = took_s if self._request_s is None else self._request_s
            self._request_s = 0.9 * known_s + 0.1 * took_s
        return answer

    async def _wait(self) -> None:
        """Return when a request is over or it is time to look again."""
        looking = asyncio.create_task(self._look.wait(), name=f"look {self.batch.id}")
        try:
            await asyncio.wait({looking, *self._running}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            looking.cancel()
        self._look.clear()

    async def _take(self, found: BatchInput, pending: deque[int], spool: Spool) -> None:
        """Write the answers that have come; what came of nothing waits for another try."""
        answers = []
        for task in [task for task in self._running if task.done()]:
            index = self._running.pop(task)
            answer = self._result_of(task)
            if self._is_to_be_asked_again(index, answer.status):
                pending.appendleft(index)
            else:
                self._num_pauses = 0
                answers.append(self._answer(found.custom_ids[index], index, answer))
        if answers:
            await asyncio.to_thread(spool.append, answers)
            self._count(spool)
            if self._node.clock.monotonic() - self._saved_at >= SAVE_S:
                await self._save()

    def _result_of(self, task: asyncio.Task[InnerAnswer]) -> InnerAnswer:
        """Return what a request has come to; one that cannot even be read must not end the rest."""
        failure = task.exception()
        if failure is None:
            return task.result()
        log.error("request of a batch failed", task=task.get_name(), exc_info=failure)
        error = InternalError(f"the controller failed; its log has request {task.get_name()!r}")
        return InnerAnswer(error.status, bytearray(json.dumps(error.envelope()).encode()))

    def _is_to_be_asked_again(self, index: int, status: int) -> bool:
        if status in DOUBTFUL:
            self._num_doubtful[index] += 1
            if self._num_doubtful[index] >= MAX_DOUBTFUL:
                return False
        elif status not in PASSING:
            return False
        now = self._node.clock.monotonic()
        if now >= self._paused_until:  # once for all that failed together
            pause_s = min(FIRST_PAUSE_S * 2.0 ** min(self._num_pauses, 16), MAX_PAUSE_S)
            self._num_pauses += 1
            self._paused_until = now + pause_s
        return True

    async def _drop_running(self) -> None:
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
        self._running.clear()

    async def _expire(self, found: BatchInput, spool: Spool) -> None:
        """Say of every request that is left that its time is over."""
        message = "this request was not executed before the completion window expired"
        error = {"code": "batch_expired", "message": message}
        answers = [
            self._line(name, index, response=b"null", error=error, is_error=True)
            for index, name in enumerate(found.custom_ids)
            if name not in spool.done
        ]
        await asyncio.to_thread(spool.append, answers)
        self._note_expiry()

    def _note_expiry(self) -> None:
        moments = {EXPIRING: self._now_us()} | dict(self.batch.moments)
        self.batch = replace(self.batch, moments=moments)

    # After.

    async def _finalize(self) -> None:
        """Make files of the answers; goes on where an earlier attempt was cut off."""
        self.batch = self._moved(BatchStatus.FINALIZING)
        await self._save()
        output_path, error_path = self._spool_paths
        output_id = await self._keep("output", output_path)
        error_id = await self._keep("errors", error_path)
        ended = self._moved(last_status(self.batch))
        self.batch = replace(ended, output_file_id=output_id, error_file_id=error_id)
        await self._save()
        log.info(
            "batch ended",
            batch_id=self.batch.id,
            status=self.batch.status,
            num_completed=self.batch.num_completed,
            num_failed=self.batch.num_failed,
        )

    async def _keep(self, kind: str, content: Path) -> str | None:
        """Return the id of a file of answers; None if there are none."""
        file_id = f"file-{self.batch.id.removeprefix('batch_')}-{kind}"
        num_bytes = await asyncio.to_thread(_size, content, self._node.files.path(file_id))
        if not num_bytes:
            await asyncio.to_thread(content.unlink, missing_ok=True)
            return None
        await self._persistently(
            lambda: self._node.files.keep(
                StoredFile(
                    id=file_id,
                    key_id=self.batch.key_id,
                    filename=f"{self.batch.id}_{kind}.jsonl",
                    purpose=OUTPUT_PURPOSE,
                    num_bytes=num_bytes,
                    created_us=self._now_us(),
                ),
                content,
            )
        )
        return file_id

    # Small things.

    @property
    def _spool_paths(self) -> tuple[Path, Path]:
        files, name = self._node.files, self.batch.id
        return files.spool_path(f"{name}.output"), files.spool_path(f"{name}.errors")

    def _function(self) -> ServedFunction | None:
        try:
            return self._node.registry.resolve(self.batch.model or "")
        except ApiError:
            return None  # deleted, or being built: it may come (back) in time

    def _ended(self, function: str) -> None:
        self._node.started[function] -= 1
        self.look()

    def _answer(self, custom_id: str, index: int, answer: InnerAnswer) -> Answer:
        body = bytes(answer.body).replace(b"\n", b" ").replace(b"\r", b" ")
        request_id = json.dumps(f"{self.batch.id}-{index}").encode()
        response = b'{"status_code":%d,"request_id":%b,"body":%b}' % (
            answer.status,
            request_id,
            body or b"null",
        )
        is_error = answer.status != 200
        return self._line(custom_id, index, response=response, error=None, is_error=is_error)

    def _line(
        self,
        custom_id: str,
        index: int,
        *,
        response: bytes,
        error: dict[str, str] | None,
        is_error: bool,
    ) -> Answer:
        line = b'{"id":%b,"custom_id":%b,"response":%b,"error":%b}\n' % (
            json.dumps(f"batch_req_{self.batch.id.removeprefix('batch_')}_{index}").encode(),
            json.dumps(custom_id).encode(),
            response,
            json.dumps(error).encode(),
        )
        return Answer(custom_id=custom_id, line=line, is_error=is_error)

    def _count(self, spool: Spool) -> None:
        self.batch = replace(
            self.batch, num_completed=spool.num_completed, num_failed=spool.num_failed
        )

    def _moved(self, status: BatchStatus) -> StoredBatch:
        return moved(self.batch, status, self._now_us())

    def _left_s(self) -> float:
        return (self.batch.expires_us - self._now_us()) / 1e6

    def _now_us(self) -> int:
        return unix_us(self._node.clock.now())

    async def _save(self) -> None:
        """Write the batch down, however long the database is away."""
        self._saved_at = self._node.clock.monotonic()
        await self._persistently(
            lambda: transact(self._node.database, lambda c: Batches(c).put(self.batch))
        )

    async def _persistently(self, work: Callable[[], Awaitable[Any]]) -> None:
        while True:
            try:
                await work()
                return
            except StoreUnavailable as error:
                log.warning(
                    "batch waits for the database", batch_id=self.batch.id, error=str(error)
                )
                await asyncio.sleep(STORE_PAUSE_S)


def _size(content: Path, kept: Path) -> int:
    """Return the size of answers, which an earlier attempt may have published already."""
    for path in (content, kept):
        if path.exists():
            return path.stat().st_size
    return 0
