from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.controller.gateway.jobs.responses.helpers import CALL
from tests.controller.gateway.test_tools import THINKING_TEMPLATE, Speaker
from tests.fakes.tokenizers import write_snapshot


@pytest.fixture
def function(snapshot: Path, byte_level: Tokenizer) -> Speaker:
    return Speaker(snapshot, byte_level, "It is warm, 東京 too.")


@pytest.fixture
def thinker(tmp_path: Path, byte_level: Tokenizer) -> Speaker:
    snapshot = write_snapshot(
        tmp_path / "it@0", byte_level, eos_token="<|im_end|>", chat_template=THINKING_TEMPLATE
    )
    return Speaker(snapshot, byte_level, f"Hm, a city.\n</think>\n\nI see.\n{CALL}")
