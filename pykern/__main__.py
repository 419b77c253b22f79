"""`python -m pykern` is the command `pykern`."""

import sys

from pykern.cli import main

sys.exit(main())
