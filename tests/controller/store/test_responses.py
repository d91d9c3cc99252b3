from dataclasses import replace

import pytest
from sqlalchemy import Connection

from controller.store.errors import NotStored
from controller.store.responses import EVICTED_AT_ONCE, Responses, StoredResponse

RESPONSE = StoredResponse(
    id="resp_1", key_id="k1", created_us=10, body=b"{}" * 30, conversation=b"[]" * 20
)


def kept(connection: Connection, *ids: str) -> list[str]:
    """Return which of some responses are there."""
    found = []
    for response_id in ids:
        try:
            found.append(Responses(connection).get(response_id, key_id="k1").id)
        except NotStored:
            continue
    return found


def test_response_comes_back_to_its_key_alone(connection: Connection) -> None:
    table = Responses(connection)
    table.put(RESPONSE)
    table.put(replace(RESPONSE, id="resp_2", key_id=None))
    assert table.get("resp_1", key_id="k1") == RESPONSE
    assert table.get("resp_2", key_id=None).key_id is None
    for response_id, key_id in (("resp_1", "k2"), ("resp_1", None), ("resp_2", "k1")):
        with pytest.raises(NotStored, match=response_id):
            table.get(response_id, key_id=key_id)
        with pytest.raises(NotStored, match=response_id):
            table.delete(response_id, key_id=key_id)
    table.delete("resp_1", key_id="k1")
    with pytest.raises(NotStored):
        table.delete("resp_1", key_id="k1")


def test_old_responses_are_pruned(connection: Connection) -> None:
    table = Responses(connection)
    table.put(RESPONSE)
    table.put(replace(RESPONSE, id="resp_2", created_us=20))
    table.prune(20)
    assert kept(connection, "resp_1", "resp_2") == ["resp_2"]


@pytest.mark.parametrize(
    ("max_bytes", "left"), [(300, ["a", "b", "c"]), (299, ["b", "c"]), (100, ["c"]), (99, [])]
)
def test_oldest_responses_go_when_there_is_too_much(
    connection: Connection, max_bytes: int, left: list[str]
) -> None:
    table = Responses(connection)
    for created_us, response_id in enumerate("abc"):
        table.put(replace(RESPONSE, id=response_id, created_us=created_us))
    assert table.evict(max_bytes) == 3 - len(left)
    assert kept(connection, "a", "b", "c") == left


def test_more_than_one_round_of_responses_goes(connection: Connection) -> None:
    table = Responses(connection)
    num_responses = 2 * EVICTED_AT_ONCE + 1
    for number in range(num_responses):
        table.put(replace(RESPONSE, id=f"r{number}", created_us=number))
    assert table.evict(100) == num_responses - 1
    assert kept(connection, f"r{num_responses - 1}") == [f"r{num_responses - 1}"]
    assert table.evict(100) == 0
