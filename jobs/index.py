"""`python jobs/index.py …`: the same as `fmray index …`, for `ray job submit -- python jobs/index.py …`."""

import sys

from fmray.cli import door, index

if __name__ == "__main__":
    sys.exit(door(index))
