"""Where a pod finds the model: baked into the image, on a claim, in a node's folder, or the hub.

A source is written `image:/path`, `claim:NAME[/folder]`, `node:/path` or `hub:owner/name[@revision]`.
A claim may be a cache that is filled from elsewhere; on a local PersistentVolume it is its node's.
Knative lets pods only read a node's folder.
Every function maps the files, so that pages it never touches cost nothing, wherever they lie.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from knative.manifest import RESTRICTED, Json, Object
from remoe.errors import SettingsError

__all__ = ["MODEL_DIR", "Weights", "parse_weights"]

_MODELS = "/models"
MODEL_DIR = f"{_MODELS}/model"
_VOLUME = "model"
_SOURCE = "/source"
_CLAIM = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?)(/[^/].*)?")
_HUB = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?")
_FEATURE = "kubernetes.podspec-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A pod's volumes and mounts for the model, and the feature flags that Knative needs for them.

    `model_dir` is the folder inside the container. A `loader_source` is downloaded by an init
    container into the volume, or copied from `loader_mounts`.
    """

    model_dir: str
    volumes: tuple[Object, ...] = ()
    mounts: tuple[Object, ...] = ()
    loader_source: str | None = None
    loader_mounts: tuple[Object, ...] = ()
    flags: tuple[str, ...] = ()

    def init_containers(self, image: str, digest: str, *, memory_mib: int) -> tuple[Json, ...]:
        """What fills the volume before the function starts; nothing if it is full already."""
        if self.loader_source is None:
            return ()
        resources: Json = {"cpu": "1", "memory": f"{memory_mib}Mi"}
        arguments = [self.loader_source, self.model_dir, "--digest", digest]
        container: Object = {
            "name": "load-weights",
            "image": image,
            "command": ["python", "-m", "remoe.weights", *arguments],
            "env": [{"name": "HF_HOME", "value": "/tmp/hub"}],  # noqa: S108  # the pod's own
            "resources": {"requests": {**resources, "cpu": "50m"}, "limits": resources},
            "volumeMounts": [
                {"name": _VOLUME, "mountPath": _MODELS},
                {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
                *self.loader_mounts,
            ],
            "securityContext": RESTRICTED,
        }
        return (container,)


def parse_weights(source: str, *, cached_from: str | None = None) -> Weights:
    """Read a source; `cached_from` is what fills a claim's folder. Raises SettingsError."""
    kind, _, where = source.partition(":")
    if cached_from is not None:
        match = _CLAIM.fullmatch(where) if kind == "claim" else None
        if match is None or match[3] is None:
            raise SettingsError(
                f"weights {source!r} cannot be filled from elsewhere: write claim:NAME/folder, on "
                "a local PersistentVolume for a cache of the node (Knative lets pods only read a "
                "node's own folder)"
            )
        return _cached_claim(match[1], match[3].strip("/"), cached_from)
    if kind == "image" and where.startswith("/"):
        return Weights(model_dir=where)
    if kind == "claim" and (match := _CLAIM.fullmatch(where)):
        claim: Object = {"claimName": match[1], "readOnly": True}
        mount: Object = {"name": _VOLUME, "mountPath": MODEL_DIR, "readOnly": True}
        if match[3]:
            mount["subPath"] = match[3].strip("/")
        return Weights(
            model_dir=MODEL_DIR,
            volumes=({"name": _VOLUME, "persistentVolumeClaim": claim},),
            mounts=(mount,),
            flags=(_FEATURE + "persistent-volume-claim",),
        )
    if kind == "node" and where.startswith("/"):
        return _node_folder(where)
    if kind == "hub" and _HUB.fullmatch(where):
        return Weights(
            model_dir=MODEL_DIR,
            volumes=({"name": _VOLUME, "emptyDir": {}},),
            mounts=({"name": _VOLUME, "mountPath": _MODELS, "readOnly": True},),
            loader_source=f"hub:{where}",
            flags=(_FEATURE + "init-containers",),
        )
    raise SettingsError(
        f"weights {source!r}: write image:/path, claim:NAME[/folder], node:/path or "
        "hub:owner/name[@revision]"
    )


def _node_folder(path: str) -> Weights:
    folder = PurePosixPath(path)
    if folder.parent == folder.parent.parent or ".." in folder.parts:
        raise SettingsError(
            f"node:{path}: name a folder below the root's own, such as /var/models/m"
        )
    return Weights(
        model_dir=MODEL_DIR,
        volumes=({"name": _VOLUME, "hostPath": {"path": path, "type": "Directory"}},),
        mounts=({"name": _VOLUME, "mountPath": MODEL_DIR, "readOnly": True},),
        flags=(_FEATURE + "volumes-hostpath",),
    )


def _cached_claim(name: str, folder: str, cached_from: str) -> Weights:
    """The function reads the claim's folder, which its loader puts there whole."""
    origin = parse_weights(cached_from)
    source = origin.loader_source or (_SOURCE if origin.volumes else origin.model_dir)
    volumes: list[Object] = [{"name": _VOLUME, "persistentVolumeClaim": {"claimName": name}}]
    loader_mounts: tuple[Object, ...] = ()
    if origin.loader_source is None:
        volumes += [{**volume, "name": "source"} for volume in origin.volumes]
        loader_mounts = tuple(
            {**mount, "name": "source", "mountPath": _SOURCE} for mount in origin.mounts
        )
    own = ("persistent-volume-claim", "persistent-volume-write", "init-containers")
    flags = [*(_FEATURE + flag for flag in own), *origin.flags]
    return Weights(
        model_dir=f"{_MODELS}/{folder}",
        volumes=tuple(volumes),
        mounts=({"name": _VOLUME, "mountPath": _MODELS, "readOnly": True},),
        loader_source=source,
        loader_mounts=loader_mounts,
        flags=tuple(dict.fromkeys(flags)),
    )
