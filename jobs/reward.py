"""`python jobs/reward.py …`: the same as `fmray reward …`, for `ray job submit -- python jobs/reward.py …`."""

import sys

from fmray.cli import door, reward

if __name__ == "__main__":
    sys.exit(door(reward))
