"""`python -m zerolite.medqa.generate`."""

import sys

from zerolite.medqa.generate.command import main

sys.exit(main())
