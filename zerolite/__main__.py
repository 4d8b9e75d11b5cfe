"""`python -m zerolite`, as the console script `zerolite`."""

import sys

from zerolite.cli import main

if __name__ == "__main__":
    sys.exit(main())
