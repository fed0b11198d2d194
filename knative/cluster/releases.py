"""Releases that were applied, kept in the namespace: going back needs nothing but the cluster.

Each is one immutable ConfigMap with all objects of the release, compressed; the newest is what runs.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import compress, decompress

import msgspec

from knative.cluster.api import Cluster
from knative.cluster.release import FILES
from knative.manifest import PART_OF, Object
from remoe.errors import NotFoundError

__all__ = ["Expectation", "Kept", "keep", "kept_releases", "release_before"]

_MOST_KEPT = 10
_LABELS = {**PART_OF, "app.kubernetes.io/component": "release"}
_NUMBER = "remoe.dev/release"
_EXPECTATION = "remoe.dev/expectation"


class Expectation(msgspec.Struct, frozen=True, kw_only=True):
    """What the planner expected of a usual request when this was deployed; means, warm."""

    prompt_tokens: int
    output_tokens: int
    ttft_s: float | None
    tpot_s: float | None
    cost_usd: float | None


@dataclass(frozen=True, slots=True)
class Kept:
    number: int
    objects: list[Object]
    expectation: Expectation | None


def kept_releases(cluster: Cluster, namespace: str) -> list[Kept]:
    """Oldest first."""
    return sorted(
        (_read(one) for one in cluster.list("v1", "ConfigMap", namespace, _LABELS)),
        key=lambda kept: kept.number,
    )


def release_before(cluster: Cluster, namespace: str, number: int | None = None) -> Kept:
    """The release of that number, or the one before what runs; raises NotFoundError."""
    kept = kept_releases(cluster, namespace)
    if number is None and len(kept) > 1:
        return kept[-2]
    for one in kept:
        if one.number == number:
            return one
    numbers = ", ".join(str(one.number) for one in kept) or "none"
    wanted = "an earlier release" if number is None else f"release {number}"
    raise NotFoundError(f"namespace {namespace} does not have {wanted}; kept are {numbers}")


def keep(
    cluster: Cluster, objects: Sequence[Object], namespace: str, expectation: Expectation | None
) -> None:
    """Note what was applied, unless it is what ran already, and forget the oldest.

    Files that no kept release reads go with it.
    """
    kept = kept_releases(cluster, namespace)
    plain = msgspec.to_builtins(list(objects))
    if kept and (kept[-1].objects, kept[-1].expectation) == (plain, expectation):
        return
    number = kept[-1].number + 1 if kept else 1
    new = Kept(number, plain, expectation)
    annotations = {_NUMBER: str(number)}
    if expectation is not None:
        annotations[_EXPECTATION] = msgspec.json.encode(expectation).decode()
    metadata = {**_metadata(number, namespace), "labels": _LABELS, "annotations": annotations}
    packed = b64encode(compress(msgspec.json.encode(plain), 9)).decode()
    cluster.create(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "immutable": True,
            "binaryData": {"objects": packed},
        }
    )
    old, still = kept[: 1 - _MOST_KEPT], kept[1 - _MOST_KEPT :]
    gone = {"apiVersion": "v1", "kind": "ConfigMap"}
    for release in old:
        cluster.delete({**gone, "metadata": _metadata(release.number, namespace)})
    read = {one["metadata"]["name"] for release in (*still, new) for one in release.objects}
    for one in cluster.list("v1", "ConfigMap", namespace, FILES):
        if one["metadata"]["name"] not in read:
            cluster.delete(one)


def _metadata(number: int, namespace: str) -> dict[str, str]:
    return {"name": f"remoe-release-{number}", "namespace": namespace}


def _read(one: Object) -> Kept:
    annotations = one["metadata"]["annotations"]
    expected = annotations.get(_EXPECTATION)
    return Kept(
        int(annotations[_NUMBER]),
        msgspec.json.decode(decompress(b64decode(one["binaryData"]["objects"]))),
        msgspec.json.decode(expected, type=Expectation) if expected else None,
    )
