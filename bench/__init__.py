"""Trains a BN-LSTM and an nn.LSTM alike on two real data sets and compares them: `python -m bench`.

`data` loads the two tasks, `training` trains and evaluates one model, `output` shows and writes what came out.
"""
