"""`python train.py [CONFIG.yaml] [key=value ...]` is `lowrank train`; with no argument it runs the quickstart."""

import sys

from lowrank.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
