import pytest

from runtime.engine.block_manager import BlockManager
from runtime.engine.sequence import Sequence
from tests.runtime.engine.sequences import new_sequence


def new_blocks(num_blocks: int = 8, *, caching: bool = True) -> BlockManager:
    return BlockManager(num_blocks, 4, enable_prefix_caching=caching)


def compute(blocks: BlockManager, sequence: Sequence) -> None:
    """Give a sequence its blocks and let its tokens be computed."""
    blocks.share_prefix(sequence)
    blocks.grow(sequence, sequence.num_tokens)
    sequence.num_computed_tokens = sequence.num_tokens
    blocks.publish(sequence, sequence.num_tokens)


def counts(blocks: BlockManager) -> tuple[int, int, int]:
    return blocks.num_free_blocks, blocks.num_used_blocks, blocks.num_cached_blocks


def test_table_grows_by_whole_blocks() -> None:
    blocks, sequence = new_blocks(), new_sequence(range(5))
    blocks.grow(sequence, 5)
    assert len(sequence.block_ids) == 2
    blocks.grow(sequence, 8)
    assert len(sequence.block_ids) == 2
    blocks.grow(sequence, 9)
    assert len(set(sequence.block_ids)) == 3


def test_growth_beyond_what_is_available_is_foreseen() -> None:
    blocks, sequence = new_blocks(2), new_sequence(range(9))
    assert blocks.can_grow(sequence, 8)
    assert not blocks.can_grow(sequence, 9)


def test_released_full_blocks_are_shared_with_an_equal_prefix() -> None:
    blocks, first = new_blocks(), new_sequence(range(10))
    compute(blocks, first)
    shared = first.block_ids[:2]
    blocks.release(first)
    assert counts(blocks) == (6, 0, 2)
    second = new_sequence([*range(8), 99])
    blocks.share_prefix(second)
    assert second.block_ids == shared
    assert second.num_computed_tokens == 8
    assert counts(blocks) == (6, 2, 0)


def test_live_sequences_share_blocks_until_the_last_lets_go() -> None:
    blocks, first, second = new_blocks(), new_sequence(range(9)), new_sequence(range(9))
    compute(blocks, first)
    compute(blocks, second)
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[2] != first.block_ids[2]
    blocks.release(first)
    assert counts(blocks) == (5, 3, 0)
    blocks.release(second)
    assert counts(blocks) == (6, 0, 2)


def test_last_token_is_never_served_from_the_cache() -> None:
    blocks = new_blocks()
    compute(blocks, first := new_sequence(range(8)))
    blocks.release(first)
    blocks.share_prefix(second := new_sequence(range(8)))
    assert second.num_computed_tokens == 4


def test_blocks_are_not_shared_before_they_are_computed() -> None:
    blocks, first, second = new_blocks(), new_sequence(range(9)), new_sequence(range(9))
    blocks.grow(first, 9)
    blocks.publish(first, 6)
    blocks.share_prefix(second)
    assert second.block_ids == first.block_ids[:1]


def test_equal_tokens_after_another_prefix_are_not_shared() -> None:
    blocks = new_blocks()
    compute(blocks, first := new_sequence([1, 1, 1, 1, 5, 6, 7, 8, 9]))
    blocks.release(first)
    compute(blocks, second := new_sequence([2, 2, 2, 2, 5, 6, 7, 8, 9]))
    assert blocks.num_used_blocks == 3
    assert second.num_published_blocks == 2
    blocks.release(second)
    blocks.share_prefix(third := new_sequence([5, 6, 7, 8, 9]))
    assert third.block_ids == []


def test_tokens_with_the_same_hash_are_told_apart() -> None:
    assert hash((-1, 0, 0, 0)) == hash((-2, 0, 0, 0)), "the collision this test is about"
    blocks = new_blocks()
    compute(blocks, first := new_sequence([-1, 0, 0, 0, 7]))
    blocks.release(first)
    blocks.share_prefix(second := new_sequence([-2, 0, 0, 0, 7]))
    assert second.block_ids == []


def test_twin_computed_at_the_same_time_stays_private_and_continues_the_chain() -> None:
    blocks, first, second = new_blocks(), new_sequence(range(5)), new_sequence(range(9))
    blocks.grow(first, 5)
    blocks.grow(second, 9)
    blocks.publish(first, 5)
    blocks.publish(second, 9)
    blocks.release(first)
    blocks.release(second)
    assert blocks.num_cached_blocks == 2
    blocks.share_prefix(third := new_sequence(range(12)))
    assert third.num_computed_tokens == 8


def test_least_recently_used_content_is_evicted_first_and_leaves_before_roots() -> None:
    blocks = new_blocks(4)
    compute(blocks, old := new_sequence([1] * 9))
    blocks.release(old)
    compute(blocks, new := new_sequence([2] * 5))
    blocks.release(new)
    assert counts(blocks) == (1, 0, 3)
    blocks.grow(big := new_sequence([3] * 8), 8)
    assert blocks.num_cached_blocks == 2
    blocks.share_prefix(again := new_sequence([1] * 9))
    assert again.num_computed_tokens == 4
    blocks.release(again)
    blocks.release(big)


def test_evicted_content_is_not_found() -> None:
    blocks = new_blocks(2)
    compute(blocks, first := new_sequence(range(8)))
    blocks.release(first)
    blocks.grow(second := new_sequence([9] * 8), 8)
    blocks.release(second)
    blocks.share_prefix(third := new_sequence(range(8)))
    assert third.block_ids == []
    assert counts(blocks) == (2, 0, 0)


def test_release_without_content_forgets_shared_blocks_too() -> None:
    blocks, first, second = new_blocks(), new_sequence(range(9)), new_sequence(range(9))
    compute(blocks, first)
    compute(blocks, second)
    blocks.release(first, keep_content=False)
    blocks.share_prefix(third := new_sequence(range(9)))
    assert third.block_ids == []
    blocks.release(second)
    assert counts(blocks) == (8, 0, 0)


def test_without_prefix_caching_nothing_is_kept() -> None:
    blocks = new_blocks(caching=False)
    compute(blocks, first := new_sequence(range(8)))
    blocks.release(first)
    assert counts(blocks) == (8, 0, 0)
    blocks.share_prefix(second := new_sequence(range(8)))
    assert second.block_ids == []


@pytest.mark.parametrize(("num_tokens", "fits"), [(32, True), (33, False)])
def test_capacity_counts_all_blocks(num_tokens: int, fits: bool) -> None:
    assert new_blocks(8).fits(num_tokens) is fits


def test_salted_prefixes_are_shared_with_the_same_salt_only() -> None:
    blocks = new_blocks(32)
    for salt in ("", "a", "b"):
        sequence = new_sequence(range(10), cache_salt=salt)
        blocks.share_prefix(sequence)
        assert sequence.block_ids == [], "nobody else's"
        compute(blocks, sequence)
        blocks.release(sequence)
    for salt in ("b", "", "a"):
        again = new_sequence(range(10), cache_salt=salt)
        blocks.share_prefix(again)
        assert again.num_computed_tokens == 8
        blocks.release(again)
    other = new_sequence(range(10), cache_salt="c")
    blocks.share_prefix(other)
    assert other.num_computed_tokens == 0


def test_salts_are_forgotten_and_their_blocks_never_confused() -> None:
    blocks = new_blocks(8)
    first = new_sequence(range(10), cache_salt="first")
    compute(blocks, first)
    blocks.release(first)
    for number in range(5000):
        blocks.share_prefix(new_sequence(range(10), cache_salt=str(number)))
    again = new_sequence(range(10), cache_salt="first")
    blocks.share_prefix(again)
    assert again.num_computed_tokens == 0
    assert len(blocks._roots) <= 4096
