"""Tests of the papers' tables, on tiny inputs."""
