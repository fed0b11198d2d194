"""API keys: made of 256 random bits, shown once, and kept as a SHA-256 hash.

A slow, salted hash protects passwords, which can be guessed; a random key cannot, and is looked up
with every request.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from typing import Any

import msgspec
from sqlalchemy import Engine, Row, insert, select, update

from remoe.accounts.schema import KEYS
from remoe.errors import NotFoundError

__all__ = ["ApiKey", "create_key", "hash_key", "list_keys", "revoke_key"]

_PREFIX = "sk-remoe-"


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """What a key may do; None is no limit. `models` None is all models."""

    id: str
    name: str
    sha256: str
    created_at_us: int
    revoked_at_us: int | None = None
    models: list[str] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    nano_usd_per_day: int | None = None

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


def hash_key(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def create_key(
    engine: Engine,
    name: str,
    *,
    models: list[str] | None = None,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    nano_usd_per_day: int | None = None,
) -> tuple[ApiKey, str]:
    """Make a key; returns it and its secret, which is kept nowhere."""
    secret = _PREFIX + secrets.token_urlsafe(32)
    key = ApiKey(
        id=f"key-{secrets.token_hex(4)}",
        name=name,
        sha256=hash_key(secret),
        created_at_us=time.time_ns() // 1000,
        models=models,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        nano_usd_per_day=nano_usd_per_day,
    )
    values = msgspec.structs.asdict(key)
    values["models"] = None if models is None else msgspec.json.encode(models).decode()
    with engine.begin() as connection:
        connection.execute(insert(KEYS).values(values))
    return key, secret


def list_keys(engine: Engine, *, revoked: bool = False) -> list[ApiKey]:
    """The keys in order of creation, revoked ones only if asked for."""
    columns = [KEYS.c[name] for name in ApiKey.__struct_fields__]
    query = select(*columns).order_by(KEYS.c.created_at_us)
    if not revoked:
        query = query.where(KEYS.c.revoked_at_us.is_(None))
    with engine.connect() as connection:
        return [_key(row) for row in connection.execute(query)]


def revoke_key(engine: Engine, key_id: str) -> None:
    """End a key for good; its requests stay in the ledger. Raises NotFoundError."""
    with engine.begin() as connection:
        done = connection.execute(
            update(KEYS)
            .where(KEYS.c.id == key_id, KEYS.c.revoked_at_us.is_(None))
            .values(revoked_at_us=time.time_ns() // 1000)
        )
    if done.rowcount == 0:
        raise NotFoundError(
            f"there is no active key '{key_id}'; `remoe key list` shows those there are"
        )


def _key(row: Row[tuple[Any, ...]]) -> ApiKey:
    key = ApiKey(**dict(zip(ApiKey.__struct_fields__, row, strict=True)))
    models = None if key.models is None else msgspec.json.decode(str(key.models), type=list[str])
    return msgspec.structs.replace(key, models=models)
