"""At install: compile the native kernel if there is a compiler; numpy serves if there is not."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernelHook(BuildHookInterface[Any]):  # type: ignore[misc]  # untyped where absent
    """Leaves the library beside its sources, and in a wheel marks it as this platform's."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        build = _load_build(Path(self.root))
        try:
            library = build.build()
        except build.BuildError as error:
            self.app.display_warning(
                f"The native kernel was not built: {error}\n"
                "numpy computes instead, slower and with more memory. With a C compiler, "
                "`python -m remoe.kernel.native.build` builds it later."
            )
            return
        build_data["artifacts"].append(str(library.relative_to(self.root)))
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"  # ctypes: any Python, one platform


def _load_build(root: Path) -> ModuleType:
    """The build module alone: its package's dependencies are not installed yet."""
    path = root / "remoe" / "kernel" / "native" / "build.py"
    spec = importlib.util.spec_from_file_location("remoe_native_build", path)
    assert spec is not None  # noqa: S101
    assert spec.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
