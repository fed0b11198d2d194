"""The local runtime: functions as processes under a supervisor that keeps their sockets."""

from __future__ import annotations
