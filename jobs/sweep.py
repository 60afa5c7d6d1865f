"""`python jobs/sweep.py …`: the same as `fmray sweep …`, for `ray job submit -- python jobs/sweep.py …`."""

import sys

from fmray.cli import door, sweep

if __name__ == "__main__":
    sys.exit(door(sweep))
