"""``python -m pyro_invman``."""

import sys

from pyro_invman.cli import main

if __name__ == "__main__":
    sys.exit(main())
