"""The same deployment on a Kubernetes cluster with Knative Serving."""

from __future__ import annotations
