import pytest

from controller.page_cache.choice import MUCH_BETTER, Candidate, choose


def file(path: str, num_bytes: int, reuse: float) -> Candidate:
    return Candidate(path=path, num_bytes=num_bytes, reuse_probability=reuse)


def test_the_likeliest_files_that_fit_are_held() -> None:
    files = [file("a", 60, 0.1), file("b", 60, 0.9), file("c", 30, 0.05)]
    assert choose(files, (), budget_bytes=100) == {"b": 60, "c": 30}


def test_all_deployed_files_are_held_when_there_is_room_even_if_nobody_calls() -> None:
    assert choose([file("a", 60, 0.0), file("b", 40, 0.0)], (), 100) == {"a": 60, "b": 40}


@pytest.mark.parametrize(("advantage", "expected"), [(-0.01, "held"), (0.01, "other")])
def test_what_is_held_stays_unless_another_is_much_likelier(
    advantage: float, expected: str
) -> None:
    files = [file("held", 60, 0.3), file("other", 60, 0.3 + MUCH_BETTER + advantage)]
    assert choose(files, {"held"}, 100) == {expected: 60}


def test_files_of_functions_that_are_gone_are_let_go() -> None:
    assert choose([], {"a"}, 100) == {}


def test_nothing_is_held_without_a_budget() -> None:
    assert choose([file("a", 1, 1.0)], (), 0) == {}
