"""The tables. Amounts are whole numbers (kB·s, nano-dollars, microseconds), so sums are exact."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Index, Integer, MetaData, String, Table, Text

__all__ = ["KEEP_ALIVE", "KEYS", "METADATA", "REQUESTS", "SCHEMA", "SCHEMA_VERSION"]

SCHEMA_VERSION = 1
METADATA = MetaData()

SCHEMA = Table("remoe_schema", METADATA, Column("version", Integer, primary_key=True))

# One row a generation request; the columns are `entries.Entry`'s fields.
REQUESTS = Table(
    "remoe_requests",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("request_id", String(128), nullable=False),
    Column("finished_at_us", BigInteger, nullable=False),
    Column("day", String(10), nullable=False),
    Column("key_id", String(16), nullable=False),
    Column("model", Text, nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("plan_id", String(64)),
    Column("deployment_plan_id", String(64)),
    Column("price_book", Text, nullable=False),
    Column("metered", Boolean, nullable=False),
    Column("main_gpu_kb_s", BigInteger, nullable=False),
    Column("main_cpu_kb_s", BigInteger, nullable=False),
    Column("remote_kb_s", BigInteger, nullable=False),
    Column("main_gpu_nano_usd", BigInteger, nullable=False),
    Column("main_cpu_nano_usd", BigInteger, nullable=False),
    Column("remote_nano_usd", BigInteger, nullable=False),
    Column("total_nano_usd", BigInteger, nullable=False),
    Column("resident_kb_s", BigInteger),
    Column("resident_starting_kb_s", BigInteger),
    Column("resident_nano_usd", BigInteger),
    Column("remote_calls", BigInteger, nullable=False),
    Column("remote_bytes", BigInteger, nullable=False),
    Column("local_fallbacks", BigInteger, nullable=False),
    Column("ttft_us", BigInteger),
    Column("tpot_us", BigInteger),
    Column("total_us", BigInteger, nullable=False),
    Column("main_cold_start_us", BigInteger, nullable=False),
    Column("experts_cold_start_us", BigInteger, nullable=False),
    Column("predicted_ttft_us", BigInteger),
    Column("predicted_tpot_us", BigInteger),
    Column("predicted_nano_usd", BigInteger),
    Index("remoe_requests_day_key", "day", "key_id"),
)

# Memory held while no request was there to share it; nobody's, and so on a line of its own.
KEEP_ALIVE = Table(
    "remoe_keep_alive",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("day", String(10), nullable=False, index=True),
    Column("model", Text, nullable=False),
    Column("resident_kb_s", BigInteger, nullable=False),
    Column("starting_kb_s", BigInteger, nullable=False),
    Column("resident_nano_usd", BigInteger, nullable=False),
    Column("price_book", Text, nullable=False),
)

KEYS = Table(
    "remoe_keys",
    METADATA,
    Column("id", String(16), primary_key=True),
    Column("name", Text, nullable=False),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("created_at_us", BigInteger, nullable=False),
    Column("revoked_at_us", BigInteger),
    # A JSON list of model names; null is all.
    Column("models", Text),
    Column("requests_per_minute", Integer),
    Column("tokens_per_minute", BigInteger),
    Column("nano_usd_per_day", BigInteger),
)
