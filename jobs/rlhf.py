"""`python jobs/rlhf.py …`: the same as `fmray rlhf …`, for `ray job submit -- python jobs/rlhf.py …`."""

import sys

from fmray.cli import door, rlhf

if __name__ == "__main__":
    sys.exit(door(rlhf))
