"""`python jobs/pretrain.py …`: the same as `fmray pretrain …`, for `ray job submit -- python jobs/pretrain.py …`."""

import sys

from fmray.cli import door, pretrain

if __name__ == "__main__":
    sys.exit(door(pretrain))
