from controller.scaling.reuse import HALF_LIFE_S, CallRate


def called(*moments: float) -> CallRate:
    rate = CallRate()
    for moment in moments:
        rate.note(moment)
    return rate


def test_what_was_never_called_is_not_expected_to_be() -> None:
    assert called().reuse_probability(1e6) == 0.0


def test_steady_calls_give_their_rate() -> None:
    rate = called(*range(0, 20 * int(HALF_LIFE_S), 60))
    probability = rate.reuse_probability(20 * HALF_LIFE_S)
    assert 0.60 < probability < 0.66, "one a minute: 1 - 1/e within a minute"


def test_more_calls_make_another_likelier_and_time_makes_it_less_likely() -> None:
    once, often = called(0.0), called(0.0, 1.0, 2.0)
    assert often.reuse_probability(2.0) > once.reuse_probability(2.0)
    assert once.reuse_probability(2.0) > once.reuse_probability(HALF_LIFE_S) > 0.0
