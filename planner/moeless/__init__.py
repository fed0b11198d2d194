"""MoEless by simulation: what balancing experts would save on any number of GPUs (papers.md B)."""
