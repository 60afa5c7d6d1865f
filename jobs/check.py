"""`python jobs/check.py FILE…`: the same as `fmray check FILE…`."""

import sys

from fmray.cli import check, door

if __name__ == "__main__":
    sys.exit(door(check))
