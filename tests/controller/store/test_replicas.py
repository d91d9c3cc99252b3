from dataclasses import replace

from sqlalchemy import Connection

from controller.store.replicas import Replicas, StoredReplica

REPLICA = StoredReplica(
    id="r1",
    function="smol",
    revision="a",
    backend="process",
    state="starting",
    epoch=3,
    devices=("gpu0", "gpu1"),
    created_us=10,
    updated_us=10,
)


def test_written_replica_comes_back(connection: Connection) -> None:
    Replicas(connection).upsert(REPLICA)
    assert list(Replicas(connection).list()) == [REPLICA]


def test_second_write_replaces_all_but_the_time_of_creation(connection: Connection) -> None:
    Replicas(connection).upsert(REPLICA)
    Replicas(connection).upsert(
        replace(REPLICA, state="ready", devices=("gpu2",), created_us=99, updated_us=20)
    )
    assert list(Replicas(connection).list()) == [
        replace(REPLICA, state="ready", devices=("gpu2",), updated_us=20)
    ]


def test_list_of_one_function(connection: Connection) -> None:
    other = replace(REPLICA, id="r0", function="other")
    Replicas(connection).upsert(REPLICA)
    Replicas(connection).upsert(other)
    assert list(Replicas(connection).list("other")) == [other]
    assert [one.id for one in Replicas(connection).list()] == ["r0", "r1"]


def test_deleted_replica_is_gone_and_deleting_twice_is_harmless(connection: Connection) -> None:
    Replicas(connection).upsert(REPLICA)
    Replicas(connection).delete("r1")
    Replicas(connection).delete("r1")
    assert list(Replicas(connection).list()) == []
