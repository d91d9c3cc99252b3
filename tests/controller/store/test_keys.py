from dataclasses import replace

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from controller.store.errors import NotStored
from controller.store.keys import Keys, StoredKey

KEY = StoredKey(id="k1", name="laptop", key_hash="ab" * 32, created_us=10, expires_us=99)


def test_key_is_found_by_its_hash(connection: Connection) -> None:
    Keys(connection).create(KEY)
    assert Keys(connection).find(KEY.key_hash) == KEY
    assert Keys(connection).find("cd" * 32) is None


def test_two_keys_cannot_have_one_hash(connection: Connection) -> None:
    Keys(connection).create(KEY)
    with pytest.raises(IntegrityError):
        Keys(connection).create(replace(KEY, id="k2"))


def test_keys_are_listed_oldest_first(connection: Connection) -> None:
    older = replace(KEY, id="k0", key_hash="cd" * 32, created_us=5)
    Keys(connection).create(KEY)
    Keys(connection).create(older)
    assert list(Keys(connection).list()) == [older, KEY]


def test_revoked_key_is_still_found_with_its_first_date(connection: Connection) -> None:
    Keys(connection).create(KEY)
    Keys(connection).revoke("k1", at_us=50)
    Keys(connection).revoke("k1", at_us=60)
    found = Keys(connection).find(KEY.key_hash)
    assert found is not None
    assert found.revoked_us == 50


def test_revoking_an_unknown_key_is_an_error(connection: Connection) -> None:
    with pytest.raises(NotStored, match="'k9'"):
        Keys(connection).revoke("k9", at_us=50)
