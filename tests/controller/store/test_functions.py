import pytest
from sqlalchemy import Connection

from controller.store.errors import NotStored
from controller.store.functions import DeployedFunction, Functions


def put(
    connection: Connection,
    name: str = "smol",
    revision: str = "a",
    backend: str = "process",
    at_us: int = 1,
) -> bool:
    spec = {"name": name, "of": revision, "nested": {"gpus": 0, "price": "0.10"}}
    return Functions(connection).put(
        name, spec=spec, revision=revision, backend=backend, at_us=at_us
    )


def current(connection: Connection) -> DeployedFunction:
    (found,) = Functions(connection).list()
    return found


def test_deployed_function_is_found_with_its_spec(connection: Connection) -> None:
    assert put(connection, at_us=5)
    found = current(connection)
    assert (found.revision, found.backend, found.created_us, found.deployed_us) == (
        "a",
        "process",
        5,
        5,
    )
    assert found.spec["nested"] == {"gpus": 0, "price": "0.10"}


def test_same_revision_again_changes_nothing(connection: Connection) -> None:
    put(connection, at_us=1)
    assert not put(connection, at_us=2)
    assert current(connection).deployed_us == 1


def test_new_revision_becomes_the_current_one(connection: Connection) -> None:
    put(connection, revision="a", at_us=1)
    assert put(connection, revision="b", at_us=2)
    found = current(connection)
    assert (found.revision, found.spec["of"], found.created_us, found.deployed_us) == (
        "b",
        "b",
        1,
        2,
    )


def test_return_to_an_old_revision_is_a_change(connection: Connection) -> None:
    for at_us, revision in enumerate("aba", start=1):
        assert put(connection, revision=revision, at_us=at_us)
    assert current(connection).spec["of"] == "a"


def test_other_backend_is_a_change(connection: Connection) -> None:
    put(connection, backend="process")
    assert put(connection, backend="docker", at_us=2)
    assert current(connection).backend == "docker"


def test_list_has_each_function_once_by_name(connection: Connection) -> None:
    put(connection, "zebra")
    put(connection, "ant", "a")
    put(connection, "ant", "b", at_us=2)
    assert [(one.name, one.revision) for one in Functions(connection).list()] == [
        ("ant", "b"),
        ("zebra", "a"),
    ]


def test_deleted_function_is_gone(connection: Connection) -> None:
    put(connection)
    Functions(connection).delete("smol", at_us=2)
    assert list(Functions(connection).list()) == []


def test_deleting_what_is_not_deployed_is_an_error(connection: Connection) -> None:
    with pytest.raises(NotStored, match="'smol'"):
        Functions(connection).delete("smol", at_us=2)


def test_function_deployed_again_keeps_the_date_of_its_first_deployment(
    connection: Connection,
) -> None:
    put(connection, at_us=1)
    Functions(connection).delete("smol", at_us=2)
    assert put(connection, at_us=9)
    found = current(connection)
    assert (found.created_us, found.deployed_us) == (1, 9)


def test_earlier_revisions_come_newest_first_and_end_with_a_deletion(
    connection: Connection,
) -> None:
    put(connection, revision="x", at_us=1)
    Functions(connection).delete("smol", at_us=2)
    for at_us, revision in enumerate("abc", start=3):
        put(connection, revision=revision, at_us=at_us)
    put(connection, "other", at_us=4)
    found = next(one for one in Functions(connection).list() if one.name == "smol")
    earlier = Functions(connection).earlier(found, limit=9)
    assert [one.revision for one in earlier] == ["b", "a"]
    assert [one.spec["of"] for one in Functions(connection).earlier(found, limit=1)] == ["b"]
