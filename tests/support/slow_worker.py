"""An optimizer worker whose every command is late: `zerolite_kernels.cpu_worker` behind a sleep.

Started in its place by `delays.slow_workers`, as `python -S slow_worker.py '{...}'`. DELAYS holds as JSON the folder of
the kernels, a seed, the seconds that a command sleeps at most, and whether it sleeps just that long.
"""

import json
import os
import random
import sys
import time

settings = json.loads(os.environ["DELAYS"])
sys.path.insert(0, settings["kernels"])

from zerolite_kernels import cpu_worker  # noqa: E402
from zerolite_kernels.cpu import command  # noqa: E402

load = cpu_worker._load
lots = random.Random(f"{settings['seed']} {sys.argv[1:]}")


def load_slow(library):
    execute = load(library)

    def late(memory, work, first, last):
        if work.op != command.FILL:  # races are not about placing memory, and there is much of it
            time.sleep(settings["seconds"] * (1.0 if settings["is_fixed"] else lots.random()))
        execute(memory, work, first, last)

    return late


if __name__ == "__main__":
    cpu_worker._load = load_slow
    cpu_worker.main()
