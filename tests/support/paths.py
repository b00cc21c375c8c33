"""Where the repository lies."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
#: Real problems to convert from, where the environment names them; nothing else outside the repository is read.
REAL_TRACES = Path(os.environ["ADLOCAL_TEST_TRACES"]) if "ADLOCAL_TEST_TRACES" in os.environ else None
