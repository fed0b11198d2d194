"""Keys: the secret is nowhere in the books, and revoking is for good."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from remoe.accounts.keys import create_key, hash_key, list_keys, revoke_key
from remoe.errors import NotFoundError


def test_a_key_is_kept_as_its_hash(engine: Engine) -> None:
    key, secret = create_key(
        engine, "ada", models=["a/b"], requests_per_minute=3, nano_usd_per_day=5
    )
    (listed,) = list_keys(engine)
    assert listed == key
    assert listed.sha256 == hash_key(secret)
    assert len(secret) > 45
    with engine.connect() as connection:
        (row,) = connection.exec_driver_sql("SELECT * FROM remoe_keys")
    assert secret not in str(row)
    assert listed.may_use("a/b")
    assert not listed.may_use("other")


def test_two_keys_are_never_the_same(engine: Engine) -> None:
    secrets = {create_key(engine, "twice")[1] for _ in range(5)}
    assert len(secrets) == 5
    assert all(key.may_use("anything") for key in list_keys(engine))


def test_revoking(engine: Engine) -> None:
    key, _ = create_key(engine, "gone")
    revoke_key(engine, key.id)
    assert list_keys(engine) == []
    assert list_keys(engine, revoked=True)[0].revoked_at_us is not None
    with pytest.raises(NotFoundError, match="no active key"):
        revoke_key(engine, key.id)
