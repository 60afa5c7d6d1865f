"""`python jobs/evaluate.py …`: the same as `fmray evaluate …`, for `ray job submit -- python jobs/evaluate.py …`."""

import sys

from fmray.cli import evaluate, door

if __name__ == "__main__":
    sys.exit(door(evaluate))
