"""CUDA graphs without CUDA."""

from collections import Counter

from runtime.gpu.cuda_graphs import WARM_UP_RUNS


class EagerCaptures:
    """Captures as on a GPU, with warm-up, whose replays call the function again; `replays` counts them."""

    def __init__(self):
        self.captured = 0
        self.replays = Counter()

    def __call__(self, call):
        for _ in range(WARM_UP_RUNS):
            call()
        index = self.captured
        self.captured += 1

        def replay():
            self.replays[index] += 1
            return call()

        return replay
