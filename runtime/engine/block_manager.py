"""KV blocks: who holds which, and which content can be used again. No torch, no tensors.

A block is in exactly one place:

    free    no content worth keeping
    used    in the block table of one sequence, or of several that share a prefix
    cached  in no table, content known; reused on a prefix hit, evicted least recently used first

Content is published only after it is computed, under the key (prefix identity, token ids), where
the prefix identity is a number given to everything before the block when that was published.
The index is a dict, so a collision of hashes is settled by comparing tokens, and equal keys mean
equal content by induction. Numbers are never reused: a child of evicted content is unreachable.

PagedAttention, sections 4.2-4.4; blocks instead of pages, recompute instead of swapping.
"""

from collections import OrderedDict
from typing import NamedTuple

from runtime.engine.sequence import Sequence

ROOT_PREFIX = 0
MAX_SALTS = 4096


class BlockContent(NamedTuple):
    """What a full block holds: these tokens after that prefix."""

    prefix_id: int
    token_ids: tuple[int, ...]


class BlockManager:
    """Hands out blocks and takes them back.

    Args:
        num_blocks: Blocks in the KV cache.
        block_size: Tokens per block.
        enable_prefix_caching: Whether content is kept for later sequences.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._enable_prefix_caching = enable_prefix_caching
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._num_references = [0] * num_blocks
        self._contents: list[BlockContent | None] = [None] * num_blocks
        self._prefix_ids = [ROOT_PREFIX] * num_blocks
        self._index: dict[BlockContent, int] = {}
        self._last_prefix_id = ROOT_PREFIX
        self._roots: OrderedDict[str, int] = OrderedDict()

    @property
    def num_free_blocks(self) -> int:
        """Blocks without content."""
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that only the prefix cache keeps."""
        return len(self._cached)

    @property
    def num_available_blocks(self) -> int:
        """Blocks a sequence can get now."""
        return len(self._free) + len(self._cached)

    @property
    def num_used_blocks(self) -> int:
        """Blocks in at least one block table."""
        return self.num_blocks - self.num_available_blocks

    def fits(self, num_tokens: int) -> bool:
        """Return whether a sequence alone could hold that many tokens."""
        return num_tokens <= self.num_blocks * self.block_size

    def share_prefix(self, sequence: Sequence) -> None:
        """Start a block table with the longest cached prefix of the sequence's tokens.

        At least one token is left to compute, so that there are logits to sample from.
        """
        assert not sequence.block_ids, "a prefix can only start a table"
        if not self._enable_prefix_caching:
            return
        for index in range((len(sequence.token_ids) - 1) // self.block_size):
            block_id = self._index.get(self._content(sequence, index))
            if block_id is None:
                return
            self._take(block_id)
            sequence.block_ids.append(block_id)
            sequence.prefix_id = self._prefix_ids[block_id]
            sequence.num_published_blocks += 1
            sequence.num_computed_tokens += self.block_size

    def can_share_next(self, sequence: Sequence, running: Sequence) -> bool:
        """Return whether the next block that a running sequence publishes can be shared.

        Its tokens are all known, so it will be published without the sequence.
        """
        if not self._enable_prefix_caching or sequence.cache_salt != running.cache_salt:
            return False
        index = running.num_published_blocks
        start, end = index * self.block_size, (index + 1) * self.block_size
        return (
            end < len(sequence.token_ids)
            and sequence.token_ids[start:end] == running.token_ids[start:end]
            and sequence.token_ids[:start] == running.token_ids[:start]
            and self._content(running, index) not in self._index
        )

    def can_grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Return whether `grow` would find the blocks it needs."""
        return self._num_missing(sequence, num_tokens) <= self.num_available_blocks

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Extend the block table until it holds `num_tokens` tokens; see `can_grow`."""
        for _ in range(self._num_missing(sequence, num_tokens)):
            block_id = self._free.pop() if self._free else self._evict()
            self._num_references[block_id] = 1
            sequence.block_ids.append(block_id)

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Make the full blocks among the first `num_tokens` tokens, all computed, findable."""
        if not self._enable_prefix_caching:
            return
        for index in range(sequence.num_published_blocks, num_tokens // self.block_size):
            content = self._content(sequence, index)
            # A twin computed at the same time may be first: ours stays private, its identity
            # carries the chain on.
            known_id = self._index.get(content)
            if known_id is None:
                known_id = sequence.block_ids[index]
                self._publish_block(known_id, content)
            sequence.prefix_id = self._prefix_ids[known_id]
            sequence.num_published_blocks += 1

    def release(self, sequence: Sequence, *, keep_content: bool = True) -> None:
        """Take back all blocks of a sequence, its last ones to be evicted first.

        Args:
            sequence: Left with an empty table and nothing computed.
            keep_content: False if what it computed must not be served to others.
        """
        for block_id in reversed(sequence.block_ids):
            if not keep_content:
                self._forget(block_id)
            self._drop(block_id)
        sequence.block_ids.clear()
        sequence.num_computed_tokens = 0
        sequence.num_published_blocks = 0
        sequence.prefix_id = ROOT_PREFIX

    def _num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        return max(0, -(-num_tokens // self.block_size) - len(sequence.block_ids))

    def _content(self, sequence: Sequence, index: int) -> BlockContent:
        start = index * self.block_size
        token_ids = tuple(sequence.token_ids[start : start + self.block_size])
        prefix_id = sequence.prefix_id if index else self._root(sequence.cache_salt)
        return BlockContent(prefix_id, token_ids)

    def _root(self, salt: str) -> int:
        """Return the identity of nothing before; a salt that was forgotten gets another one."""
        if not salt:
            return ROOT_PREFIX
        if salt not in self._roots:
            if len(self._roots) == MAX_SALTS:
                self._roots.popitem(last=False)
            self._last_prefix_id += 1
            self._roots[salt] = self._last_prefix_id
        self._roots.move_to_end(salt)
        return self._roots[salt]

    def _publish_block(self, block_id: int, content: BlockContent) -> None:
        self._last_prefix_id += 1
        self._index[content] = block_id
        self._contents[block_id] = content
        self._prefix_ids[block_id] = self._last_prefix_id

    def _take(self, block_id: int) -> None:
        if self._num_references[block_id] == 0:
            del self._cached[block_id]
        self._num_references[block_id] += 1

    def _drop(self, block_id: int) -> None:
        self._num_references[block_id] -= 1
        if self._num_references[block_id] > 0:
            return
        if self._contents[block_id] is None:
            self._free.append(block_id)
        else:
            self._cached[block_id] = None

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        self._forget(block_id)
        return block_id

    def _forget(self, block_id: int) -> None:
        content = self._contents[block_id]
        if content is not None:
            del self._index[content]
            self._contents[block_id] = None
