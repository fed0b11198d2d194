"""MoEless (arXiv 2603.06350): how many replicas an expert gets, where, and who computes which row.

Pure functions over one layer's loads, shared by what plans and simulates and by what serves.
docs/moeless.md explains them; papers.md part B numbers what is the paper's and what is ours.
"""
