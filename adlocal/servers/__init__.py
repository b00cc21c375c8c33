"""HTTP servers that others made, with protection in them: what `adlocal engine` starts."""
