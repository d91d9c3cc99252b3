import random

import torch
from torch import Tensor

from runtime.kernels.batch_inputs import ModelInputs, expand_batch, expand_batch_reference
from tests.runtime.kernels.device import DEVICE

BLOCK_SIZE = 16
NUM_ROWS = 9
MAX_BLOCKS = 40


def random_records(rng: random.Random) -> tuple[list[list[int]], list[int], int]:
    """Return records, the numbers they refer to, and how many tokens they have."""
    records: list[list[int]] = []
    numbers: list[int] = []
    query_start = 0
    for row in rng.sample(range(NUM_ROWS), 6):
        num_tokens = rng.choice([1, 1, 2, 150, 300])
        num_given = num_tokens - rng.randrange(2)
        start = rng.randrange(300)
        first_block = rng.randrange(20)
        num_blocks = rng.choice([0, 1, 20])
        offset = len(numbers)
        record = [row, start, query_start, num_tokens, num_given, offset, first_block, num_blocks]
        records.append(record)
        numbers += [rng.randrange(1000) for _ in range(num_blocks + num_given)]
        query_start += num_tokens
    records.append([NUM_ROWS, -9, query_start, 9, 0, 0, 0, 0])
    return records, numbers, query_start + 9


def on_device(values: list[int] | list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def test_expanded_batch_is_that_of_the_reference() -> None:
    for seed in range(3):
        records, numbers, num_tokens = random_records(random.Random(seed))
        tables = torch.randint(0, 99, (NUM_ROWS + 1, MAX_BLOCKS), dtype=torch.int32)
        last_tokens = torch.randint(0, 99, (NUM_ROWS + 1,), dtype=torch.int32)
        results = []
        for expand, device in ((expand_batch, DEVICE), (expand_batch_reference, "cpu")):
            inputs = ModelInputs.allocate(num_tokens, len(records), device)
            own_tables = tables.to(device, copy=True)
            expand(
                on_device([len(records)]).to(device),
                on_device(records).to(device),
                on_device(numbers).to(device),
                own_tables,
                last_tokens.to(device),
                inputs,
                max_records=len(records) + 3,
                block_size=BLOCK_SIZE,
            )
            results.append([*(x.cpu() for x in inputs), own_tables.cpu()])
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)
        assert results[0][2][-9:].tolist() == [-1] * 9, "padding has no place in the cache"
        assert results[0][4][-1] == 0, "and nothing to attend to"
