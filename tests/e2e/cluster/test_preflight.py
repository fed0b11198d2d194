"""`remoe preflight` on a real cluster: each flag taken away is named, and its patch puts it back."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.e2e.cluster.conftest import CLAIM, Options
from tests.e2e.cluster.kubernetes import Cluster, Flags

_POD = "kubernetes.podspec-"
_CACHED = ("--weights", f"claim:{CLAIM}/model", "--cached-from", "node:/var/tmp/models/m")


@dataclass(frozen=True, slots=True)
class Flag:
    """A key that a deployment with `options` needs at `good`; `bad` is None to take it away."""

    config: str
    key: str
    good: str
    bad: str | None = None
    options: Options = ()


FLAGS = (
    Flag("config-network", "ingress-class", "kourier.ingress.networking.knative.dev"),
    Flag("config-features", _POD + "persistent-volume-claim", "enabled"),
    Flag(
        "config-features",
        _POD + "persistent-volume-write",
        "enabled",
        options=("--history-claim", CLAIM),
    ),
    Flag("config-features", _POD + "volumes-hostpath", "enabled", options=_CACHED),
    Flag("config-features", _POD + "init-containers", "enabled", options=_CACHED),
    Flag("config-autoscaler", "allow-zero-initial-scale", "true"),
    Flag("config-autoscaler", "enable-scale-to-zero", "true", "false"),
    Flag("config-defaults", "max-revision-timeout-seconds", "600", "300"),
)


@pytest.fixture(scope="module")
def flags(cluster: Cluster) -> Iterator[Flags]:
    """Every flag is as it must be."""
    with Flags(cluster) as flags:
        for flag in FLAGS:
            flags.set(flag.config, flag.key, flag.good)
        yield flags


def preflight(cluster: Cluster, *options: str) -> dict[str, str]:
    """What is MISSING, with the command that mends it."""
    done = cluster.remoe("preflight", *options, check=False)
    lines = done.stdout.splitlines()
    fixes = {
        line.partition("MISSING")[2].strip(): fix.strip()
        for line, fix in zip(lines, [*lines[1:], ""], strict=True)
        if line.lstrip().startswith("MISSING")
    }
    assert done.returncode == (1 if fixes else 0), done.stdout + done.stderr
    return fixes


@pytest.mark.usefixtures("flags")
def test_a_cluster_with_every_flag_takes_a_dry_run(cluster: Cluster, options: Options) -> None:
    assert preflight(cluster, *options) == {}
    assert "nothing was changed" in cluster.remoe("deploy", *options, "--dry-run").stdout
    assert cluster.services() == []


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.key)
def test_a_missing_flag_is_named_and_its_patch_mends_it(
    cluster: Cluster, options: Options, flags: Flags, flag: Flag
) -> None:
    wanted = (*options, *flag.options)
    usual = preflight(cluster, *wanted)  # a restricted namespace lets no node's folder be
    flags.set(flag.config, flag.key, flag.bad)
    fixes = preflight(cluster, *wanted)
    (named,) = fixes.keys() - usual.keys()
    patch = fixes[named].partition("  (or")[0]
    assert f'{{"data":{{"{flag.key}":"{flag.good}"}}}}' in patch, fixes
    subprocess.run(shlex.split(patch), check=True, timeout=60)
    assert flags.get(flag.config, flag.key) == flag.good
    assert preflight(cluster, *wanted) == usual
