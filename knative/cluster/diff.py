"""What a release would change, field by field, over the fields that it owns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from knative.cluster.api import Cluster
from knative.manifest import PART_OF, Object

__all__ = ["Change", "field_changes", "release_changes"]


@dataclass(frozen=True, slots=True)
class Change:
    """`before` is None where nothing was, `after` where nothing will be; both are JSON."""

    kind: str
    name: str
    path: str
    before: str | None
    after: str | None


def release_changes(
    cluster: Cluster, objects: Sequence[Object], *, namespace: str
) -> Iterator[Change]:
    """Compare with what runs; Services that would go are one change each."""
    services = set()
    for one in objects:
        metadata, kind = one["metadata"], one["kind"]
        now = cluster.get(one["apiVersion"], kind, metadata["name"], namespace)
        if kind == "Service":
            services.add(metadata["name"])
        if now is None:
            yield Change(kind, metadata["name"], "", None, "created")
            continue
        for path, before, after in field_changes(now, one):
            yield Change(kind, metadata["name"], path, before, after)
    for old in cluster.list("serving.knative.dev/v1", "Service", namespace, PART_OF):
        name = old["metadata"]["name"]
        if name not in services:
            yield Change("Service", name, "", "runs", None)


def field_changes(
    now: object, wanted: object, path: str = ""
) -> Iterator[tuple[str, str | None, str | None]]:
    """Where they differ, as (path, before, after); what only the cluster has does not count.

    Lists of named things (containers, variables, volumes) are compared by name, and what is no
    longer in one counts, because it would go.
    """
    if isinstance(wanted, Mapping) and isinstance(now, Mapping):
        for key, value in wanted.items():
            yield from field_changes(now.get(key), value, f"{path}.{key}" if path else key)
        return
    named_now, named = _by_name(now), _by_name(wanted)
    if named is not None and named_now is not None:
        for name in dict.fromkeys([*named_now, *named]):
            place = f"{path}[{name}]"
            if name not in named:
                yield place, _json(named_now[name]), None
            else:
                yield from field_changes(named_now.get(name), named[name], place)
        return
    if isinstance(wanted, (list, tuple)) and isinstance(now, list) and len(now) == len(wanted):
        for index, (before, after) in enumerate(zip(now, wanted, strict=True)):
            yield from field_changes(before, after, f"{path}[{index}]")
        return
    if now != wanted and not (now is None and wanted in ({}, [], ())):
        yield path, None if now is None else _json(now), _json(wanted)


def _by_name(value: object) -> dict[str, object] | None:
    if not isinstance(value, (list, tuple)) or not value:
        return None
    if not all(isinstance(item, Mapping) and "name" in item for item in value):
        return None
    return {item["name"]: item for item in value}


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
