from pathlib import Path

import pytest

from tests.fuzz.product import fuzz

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(300)]


def test_no_request_the_document_allows_gets_an_answer_it_does_not(smollm2_snapshot: Path) -> None:
    done = fuzz(num_examples=1, seed=1, snapshots=smollm2_snapshot.parent)
    assert done.returncode == 0, done.stdout[-8000:]
    assert "Tested: 0" not in done.stdout
