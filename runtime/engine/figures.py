"""What an engine says of itself. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFigures:
    """Load now and counts since the start, under the names of the wire's LoadFigures."""

    num_running: int
    num_waiting: int
    num_kv_blocks: int
    num_free_kv_blocks: int
    num_preemptions: int
    num_prompt_tokens: int
    num_cached_prompt_tokens: int
    num_output_tokens: int
    num_steps: int
    num_late_compilations: int
