"""`python eval.py RUN [--tasks ...] [--against ...]` is `lowrank eval`."""

import sys

from lowrank.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
