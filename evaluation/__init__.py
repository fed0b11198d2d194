"""The papers' experiments as commands: each table measured here, beside what was published."""
