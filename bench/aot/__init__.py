"""Proof without a GPU that the kernels compile for every target, without spills and within each device's limits.

`python -m bench.aot` runs it; `cases` says what is launched where, `compiler` compiles it, `checks` judges.
"""
