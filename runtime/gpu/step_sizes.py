"""How many tokens a step runs, by what an H200's products do well."""

PREFILL_TOKENS_BESIDE_DECODES = 480
"""Roughly. More would be faster a token, and decodes wait for it."""
PREFILL_TOKENS_ALONE = 4096
"""A token takes 3 % less time than in steps of 1,024."""

# Products of the tokens between two sizes take as long as those of the next one, or longer: up to
# so many tokens, sizes are so far apart.
GPU_STEPS = ((384, 64), (1024, 128), (PREFILL_TOKENS_ALONE, 512))
CPU_STEPS = ((PREFILL_TOKENS_ALONE, 4),)


def tokens_beside(num_decodes: int) -> int:
    """Return the tokens of a step that runs decodes and prompts, so that none are padding."""
    _, step = GPU_STEPS[1]
    return step * round((num_decodes + PREFILL_TOKENS_BESIDE_DECODES) / step)


def mixed_sizes(budget: int, *, is_gpu: bool) -> tuple[int, ...]:
    """Return the sizes of steps with prompts; the last one holds the whole budget."""
    steps = GPU_STEPS if is_gpu else CPU_STEPS
    sizes = [steps[0][1]]
    while sizes[-1] < budget:
        size = sizes[-1]
        sizes.append(size + next((step for end, step in steps if size < end), steps[-1][1]))
    return tuple(sizes)
