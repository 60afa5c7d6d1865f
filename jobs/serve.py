"""`python jobs/serve.py …`: the same as `fmray serve …`, for `ray job submit -- python jobs/serve.py …`."""

import sys

from fmray.cli import door, serve

if __name__ == "__main__":
    sys.exit(door(serve))
