"""The compiled part of the kernel; build.py makes the library from the C files here."""

from __future__ import annotations

from pathlib import Path

__all__ = ["LIBRARY"]

LIBRARY = Path(__file__).with_name("libremoe_kernel.so")
