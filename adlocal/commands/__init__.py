"""The verbs of the `adlocal` command, one module each."""
