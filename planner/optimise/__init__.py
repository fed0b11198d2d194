"""Remoe's optimisation (A.3 to A.12): cost and latency models, and what minimises them."""
