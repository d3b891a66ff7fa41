"""`python -m ban_fast` is the command `ban-fast`."""

from .cli import main
from .cli.ranks import leave

if __name__ == "__main__":
    leave(main())
