"""One description of each function, rendered to Knative Services or run as local processes."""

from __future__ import annotations
