"""What the engines of one function say of themselves, as series that outlive any one of them."""

from controller.metrics import Metrics
from runtime.rpc import inference_pb2 as pb


class EngineFigures:
    """Sums the engines' load, and adds up what each has done since it was heard of last.

    Args:
        function: Whose engines.
        metrics: Where the series are.
    """

    def __init__(self, function: str, metrics: Metrics) -> None:
        self._function = function
        self._metrics = metrics
        self._loads: dict[str, pb.LoadFigures] = {}

    def update(self, replica_id: str, load: pb.LoadFigures) -> None:
        """Take a replica's newest figures; an engine that was started anew counts from 0."""
        known = self._loads.get(replica_id, pb.LoadFigures())
        if load == known:
            return
        is_new = load.num_steps < known.num_steps
        self._loads[replica_id] = load
        self._metrics.add_engine_events(
            self._function,
            {
                name: getattr(load, name) - (0 if is_new else getattr(known, name))
                for name in self._metrics.engine_events
            },
        )
        self._publish()

    def drop(self, replica_id: str) -> None:
        """Forget a replica that is gone; what it did stays counted."""
        if self._loads.pop(replica_id, None) is not None:
            self._publish()

    def _publish(self) -> None:
        loads = self._loads.values()
        num_blocks = sum(load.num_kv_blocks for load in loads)
        num_free = sum(load.num_free_kv_blocks for load in loads)
        self._metrics.set_engine_load(
            self._function,
            running=sum(load.num_running for load in loads),
            waiting=sum(load.num_waiting for load in loads),
            kv_usage=(num_blocks - num_free) / num_blocks if num_blocks else 0.0,
        )
