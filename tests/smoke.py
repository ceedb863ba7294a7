"""The few tests that find most defects, for a Triton that is not tested in full: `python -m tests.smoke`.

They are those that catch the defects of `tests.mutants`, in the interpreter and compiled ahead of time; what follows on
the command line goes to pytest.
"""

from __future__ import annotations

import os
import sys


def main() -> int:
    """The exit status of pytest."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import pytest
    import torch
    import triton

    from tests.mutants import TESTS

    print(f"smoke: Triton {triton.__version__}, torch {torch.__version__}", flush=True)
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "--schedules", "2", *TESTS, *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
