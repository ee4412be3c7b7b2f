"""What takes the place of CUDA graphs where there is no GPU."""

import contextlib


class Reruns:
    """Stands in for a Recorder: what would be replayed is computed again, into the same memory."""

    made = 0  # of all models of a test

    def __init__(self, device):
        self.captures = self.replays = 0
        Reruns.made += 1

    def turn(self):
        return contextlib.nullcontext()

    def capture(self, forward):
        out = forward()
        self.captures += 1

        def replay():
            self.replays += 1
            for name, value in forward().items():
                out[name].copy_(value)
            return out

        return replay
