import pytest

from controller.host_cache.choice import MUCH_BETTER, Candidate, Holding, choose


def file(path: str, num_bytes: int, reuse: float) -> Candidate:
    return Candidate(path=path, num_bytes=num_bytes, reuse_probability=reuse)


def sizes(chosen: dict[str, Holding]) -> dict[str, int]:
    return {path: holding.num_bytes for path, holding in chosen.items()}


def test_the_likeliest_files_that_fit_are_held() -> None:
    files = [file("a", 60, 0.1), file("b", 60, 0.9), file("c", 30, 0.05)]
    assert sizes(choose(files, (), budget_bytes=100)) == {"b": 60, "c": 30}


def test_all_deployed_files_are_held_when_there_is_room_even_if_nobody_calls() -> None:
    assert sizes(choose([file("a", 60, 0.0), file("b", 40, 0.0)], (), 100)) == {"a": 60, "b": 40}


@pytest.mark.parametrize(("advantage", "expected"), [(-0.01, "held"), (0.01, "other")])
def test_what_is_held_stays_unless_another_is_much_likelier(
    advantage: float, expected: str
) -> None:
    files = [file("held", 60, 0.3), file("other", 60, 0.3 + MUCH_BETTER + advantage)]
    assert sizes(choose(files, {"held"}, 100)) == {expected: 60}


def test_files_of_functions_that_are_gone_are_let_go() -> None:
    assert sizes(choose([], {"a"}, 100)) == {}


def test_nothing_is_held_without_a_budget() -> None:
    assert sizes(choose([file("a", 1, 1.0)], (), 0)) == {}


def test_a_file_of_two_functions_counts_once_and_as_the_more_wanted() -> None:
    shared = [file("shared", 60, 0.1), file("shared", 60, 0.9), file("other", 60, 0.5)]
    assert sizes(choose(shared, (), budget_bytes=100)) == {"shared": 60}
    assert sizes(choose(shared, (), budget_bytes=120)) == {"shared": 60, "other": 60}


def test_what_any_gpu_reads_is_pinned() -> None:
    for_gpu = Candidate(path="both", num_bytes=1, reuse_probability=0.0, is_for_gpu=True)
    chosen = choose([for_gpu, file("both", 1, 0.0), file("other", 1, 0.0)], (), 2)
    assert chosen == {
        "both": Holding(num_bytes=1, is_pinned=True),
        "other": Holding(num_bytes=1, is_pinned=False),
    }
