import pytest

from runtime.config import EngineConfig
from runtime.phases import PhaseLog, bring_up
from tests.fakes.engine import FakeRunner, Script


def test_a_load_tells_how_fast_bytes_moved() -> None:
    script = Script(weights_bytes=3_000_000, load_s=0.02)
    phase_log = PhaseLog()
    bring_up(FakeRunner(script, EngineConfig()), phase_log, lambda done, total: None)
    rates = {phase.name: phase.gb_per_s for phase in phase_log.phases}
    assert rates.pop("weights_read") == pytest.approx(0.15)
    assert set(rates.values()) == {0.0}, "only what took time and moved bytes has a rate"
