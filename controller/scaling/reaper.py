"""Everything that happens by the clock: sweeps, orphans, roll-ups, schedule boundaries.

The jobs only poke the owners, who decide. Idle and park limits are also kept by each owner's own
monotonic timer, so a jump of the wall clock delays nothing.
"""

from collections.abc import Awaitable, Callable

import structlog
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.interval import IntervalTrigger

from controller.scaling.policy import cron_trigger
from functions.spec import FunctionSpec

log = structlog.get_logger(__name__)

MISFIRE_GRACE_S = 3600


class Reaper:
    """Runs the periodic jobs of one controller on the running event loop.

    Args:
        expected: Errors that come from outside and pass; told once, without a traceback.
    """

    def __init__(self, expected: type[Exception] | tuple[type[Exception], ...] = ()) -> None:
        self._expected = expected
        self._scheduler = AsyncIOScheduler(
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
        )

    def every(self, seconds: float, name: str, job: Callable[[], Awaitable[object]]) -> None:
        """Run a job again and again; a run that fails is logged and the next one comes."""
        failing = ""

        async def guarded() -> None:
            # One failed run, a database that is away say, must not end the series.
            nonlocal failing
            before, failing = failing, ""
            try:
                await job()
                if before:
                    log.info("job works again", job=name)
            except self._expected as error:
                failing = str(error)
                if failing != before:
                    log.warning("job failed, and is tried again", job=name, error=failing)
            except Exception:
                log.exception("job failed", job=name)

        self._scheduler.add_job(guarded, IntervalTrigger(seconds=seconds), id=name, name=name)

    def follow_schedules(self, spec: FunctionSpec, poke: Callable[[], None]) -> None:
        """Poke a function whenever one of its windows opens; replaces what was there before.

        Windows close without a job: every sweep asks which are open.
        """
        self.forget(spec.name)
        for index, schedule in enumerate(spec.schedules):
            self._scheduler.add_job(
                poke,
                cron_trigger(schedule),
                id=f"{spec.name}/{index}",
                name=f"window {index} of {spec.name}",
                misfire_grace_time=MISFIRE_GRACE_S,
            )

    def forget(self, function: str) -> None:
        """Drop a function's schedules."""
        for job in self._scheduler.get_jobs():
            if job.id.startswith(f"{function}/"):
                job.remove()

    def start(self) -> None:
        """Begin to run jobs."""
        self._scheduler.start()

    def stop(self) -> None:
        """Run no more jobs."""
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)
