"""`python -m ban_fast` is the command `ban-fast`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
