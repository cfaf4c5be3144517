"""python -m kernels.tune: measure the kernels' launch configurations on this GPU."""

import sys

from kernels.tune.tuner import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
