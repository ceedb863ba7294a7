"""What the library is worth: how well it learns, and how fast it is.

`python -m bench` trains a BN-LSTM and an nn.LSTM alike on two real data sets (`data`, `training`, `output`).

`python -m bench.campaign` and `pytest bench` measure speed and memory: `cases` says of what, `providers` of whom
(`loops`, `peers`), `problem` makes a case's weights, data and float64 results, `measure` checks and times (`timing`),
`ceilings` and `floor` tell what a device would allow, `layouts`, `stages` and `profiling` where the time goes.
`records` is the file that a campaign leaves, and `python -m bench.report` turns it into README's tables and plots.

`python -m bench.reference_path` compares eager loops on a CPU; `python -m bench.aot` compiles the kernels.
"""
