"""Calls to embed inside an engine process: many texts, one answer, all of them or none."""

from collections.abc import Iterator, Sequence

from runtime.engine.pooling import Pooled, PoolingRequest
from runtime.engine.sequence import SequenceKey
from runtime.engine_api import StepEngine
from runtime.errors import InvalidSequence, RuntimeFault, TextFailed
from runtime.ipc import MAX_PAYLOAD_BYTES
from runtime.rpc import inference_pb2 as pb

MAX_TEXTS = 4096
MAX_ANSWER_BYTES = MAX_PAYLOAD_BYTES - MAX_TEXTS * 8  # what is around each vector is less


class Embeds:
    """All calls under way in one engine.

    Args:
        engine: Embeds their texts.
    """

    def __init__(self, engine: StepEngine) -> None:
        self._engine = engine
        self._missing: dict[int, int] = {}
        self._embeddings: dict[int, list[bytes]] = {}

    @property
    def has_calls(self) -> bool:
        """Whether a call waits for its answer."""
        return bool(self._missing)

    def start(self, call_id: int, request: pb.EmbedRequest) -> None:
        """Submit the texts of a call.

        Raises:
            InvalidSequence: A text cannot be embedded, or there are none or too many.
        """
        if not 1 <= len(request.texts) <= MAX_TEXTS:
            raise InvalidSequence(f"{len(request.texts)} texts: send 1 to {MAX_TEXTS} in a call")
        try:
            for index, text in enumerate(request.texts):
                self._engine.submit_text(
                    PoolingRequest(
                        key=SequenceKey(call_id, index),
                        token_ids=list(text.token_ids),
                        dimensions=request.dimensions,
                    )
                )
        except BaseException:
            self._engine.cancel_stream(call_id)
            raise
        self._missing[call_id] = len(request.texts)
        self._embeddings[call_id] = [b""] * len(request.texts)

    def cancel(self, call_id: int) -> None:
        """Drop what is left of a call; one that is over is left alone."""
        if self._missing.pop(call_id, None) is not None:
            del self._embeddings[call_id]
            self._engine.cancel_stream(call_id)

    def take(
        self, pooled: Sequence[Pooled]
    ) -> Iterator[tuple[int, pb.EmbedResponse | RuntimeFault]]:
        """Take what a step has embedded; yield the calls that are over with their answers."""
        for one in pooled:
            call_id = one.key.stream_id
            if call_id not in self._missing:
                continue  # one of its texts has failed before
            if one.error:
                self.cancel(call_id)
                yield call_id, TextFailed(f"text {one.key.sequence_id}: {one.error}")
                continue
            num_texts, most = len(self._embeddings[call_id]), MAX_ANSWER_BYTES // len(one.embedding)
            if num_texts > most:
                self.cancel(call_id)
                yield (
                    call_id,
                    InvalidSequence(
                        f"{num_texts} texts, with vectors of {len(one.embedding)} bytes: send at most "
                        f"{most} in a call"
                    ),
                )
                continue
            self._embeddings[call_id][one.key.sequence_id] = one.embedding
            self._missing[call_id] -= 1
            if not self._missing[call_id]:
                del self._missing[call_id]
                yield call_id, pb.EmbedResponse(embeddings=self._embeddings.pop(call_id))
