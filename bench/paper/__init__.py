"""The paper's claims, and the question that it left open, answered with data.

Cooijmans et al. 2016 (arXiv 1603.09025). Each experiment is a module with the same few names (see `experiment`), run by
`python -m bench.paper NAME`; what they found is told in README.md beside this file.
"""
