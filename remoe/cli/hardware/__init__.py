"""Measuring a machine for the planner: what `remoe profile hardware` does."""
