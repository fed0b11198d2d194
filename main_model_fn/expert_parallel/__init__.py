"""Experts spread over ranks, a GPU each: replicas come and go while batches are computed.

MoEless on GPUs (papers.md B): torch.distributed carries rows and weights, any number of ranks, NCCL
on GPUs and gloo on CPUs. Needs torch and numpy alone.
"""
