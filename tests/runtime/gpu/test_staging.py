"""How a batch is described to the device."""

from runtime.engine.batch import ScheduledBatch, ScheduledSequence
from runtime.engine.sequence import SamplingParams, SequenceKey
from runtime.gpu.rows import Rows
from runtime.gpu.staging import describe
from runtime.kernels.chunk_attention import Tile

BLOCK_SIZE = 16


def scheduled(number: int, start: int, num_tokens: int, *, is_sampled: bool) -> ScheduledSequence:
    return ScheduledSequence(
        key=SequenceKey(1, number),
        number=number,
        start=start,
        token_ids=tuple(range(num_tokens)),
        num_pending_tokens=0,
        block_ids=tuple(range(100 * number, 100 * number + 1 + (start + num_tokens) // BLOCK_SIZE)),
        is_sampled=is_sampled,
        sampling=SamplingParams(),
        seed=0,
        num_preemptions=0,
    )


def test_tiles_are_of_what_is_no_decode_and_those_that_see_most_come_first() -> None:
    batch = ScheduledBatch(
        sequences=(
            scheduled(7, 300, 1, is_sampled=True),
            scheduled(8, 0, 70, is_sampled=True),
            scheduled(9, 64, 130, is_sampled=False),
            scheduled(10, 500, 1, is_sampled=True),
        )
    )
    found = describe(batch, Rows(8), tile_size=64)
    assert found.num_decodes == 1
    assert found.tiles == [
        Tile(row=3, place=201, position=500, num_queries=1),
        Tile(row=2, place=199, position=192, num_queries=2),
        Tile(row=2, place=135, position=128, num_queries=66),
        Tile(row=1, place=65, position=64, num_queries=6),
        Tile(row=2, place=71, position=64, num_queries=130),
        Tile(row=1, place=1, position=0, num_queries=70),
    ]
    assert found.num_tiles == 6


def test_a_batch_of_decodes_has_no_tiles_and_one_that_samples_less_has_room_for_one() -> None:
    decode = scheduled(1, 5, 1, is_sampled=True)
    assert describe(ScheduledBatch(sequences=(decode,)), Rows(2), 64).num_tiles == 0
    unsampled = scheduled(1, 5, 1, is_sampled=False)
    assert describe(ScheduledBatch(sequences=(unsampled,)), Rows(2), 64).num_tiles == 1
