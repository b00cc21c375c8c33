"""`python -m examples.lab.real`."""

import sys

from .command import main

sys.exit(main())
