"""Proof without a GPU that the kernels compile for every target, without spills and within each device's limits.

`python -m bench.aot` runs it; `cases` says what is launched where, `compiler` compiles it, `checks` judges.
`python -m bench.aot atlas` writes a table of it, `atlas.tsv`: `atlas` says what is in it, `rows` compares with before.
`machine` reads machine code and finds the time loop in it, `meeting` follows the grid barrier through the PTX.
"""
