"""`python jobs/evaluate.py …`: the same as `fmray evaluate …`, for `ray job submit -- python jobs/evaluate.py …`."""

import sys

from fmray.cli import door, evaluate

if __name__ == "__main__":
    sys.exit(door(evaluate))
