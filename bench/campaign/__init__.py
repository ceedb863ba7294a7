"""All evidence that a GPU can give in some minutes: `python -m bench.campaign --minutes 9 --out DIR --resume`.

`plan` lists what is to be done, the most telling first. `worker` is a process that does it, item by item, and tells
what it is at; `processes` starts workers and notices when one crashes or hangs; `gpu_tests` runs the tests that need a
GPU; `runner` is the campaign: it never touches the GPU itself, so nothing that happens there can end it.
"""
