"""What `adlocal convert` lets choose, under the names that the command line and a bundle's metadata give it."""

from __future__ import annotations

#: How large and how faithful; the converter's presets say what each means.
SMALL, BALANCED, EXACT = QUALITIES = ("small", "balanced", "exact")
#: Which weights are protected.
ALL, LINEAR, NORMS = PARAMS = ("all", "linear", "norms")
