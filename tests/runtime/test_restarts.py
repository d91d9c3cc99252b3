from runtime.restarts import MAX_DEATHS, WINDOW_S, Restarts


def test_delays_grow_until_there_is_no_hope() -> None:
    restarts = Restarts(lambda: 0.0)
    delays = []
    for _ in range(MAX_DEATHS):
        restarts.note_death()
        assert not restarts.is_hopeless
        delays.append(restarts.delay_s)
    assert delays == [0.0, 0.5, 1.0, 2.0, 4.0]
    restarts.note_death()
    assert restarts.is_hopeless
    assert restarts.num_deaths == MAX_DEATHS + 1


def test_old_deaths_are_forgiven() -> None:
    now = 0.0
    restarts = Restarts(lambda: now)
    for _ in range(MAX_DEATHS + 1):
        restarts.note_death()
    now = WINDOW_S + 1.0
    restarts.note_death()
    assert not restarts.is_hopeless
    assert restarts.delay_s == 0.0
