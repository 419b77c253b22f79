"""`python -m pykern.testing.gpu` is `pykern gpu`, without the packages that the command line needs."""

import sys

from pykern.testing.gpu.run import main

sys.exit(main())
