"""The `adlocal` command.

Exit status: 0 done; 1 the input was right and the work failed; 2 the input is wrong. Errors are one line on stderr.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from .commands.parser import make_parser
from .errors import AdlocalError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status."""
    args = make_parser().parse_args(argv)
    # Termination unwinds like Ctrl-C, so that half-written files are removed.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        args.handler(args)
        sys.stdout.flush()
    except AdlocalError as error:
        print(f"adlocal {args.verb}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(f"\nadlocal {args.verb}: interrupted; nothing half-written is left", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as in `adlocal inspect | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt
