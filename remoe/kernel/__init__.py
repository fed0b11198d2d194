"""Experts and projections on weights where they lie: native code, or numpy where none was built."""
