"""`python -m triton_bnlstm.tuning`: see `commands`."""

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main())
