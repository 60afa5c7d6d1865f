"""`python jobs/benchmark.py clip …` or `ppo …`: the same as `fmray benchmark clip …`."""

import sys

from fmray.cli import benchmark, door

if __name__ == "__main__":
    sys.exit(door(benchmark))
