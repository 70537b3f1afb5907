"""A rig for the cases of one shape at a time, shared by the speed benchmarks."""

from __future__ import annotations

import contextlib


class Rigs:
    """Makes the rig of the group asked for last; weights take seconds and gigabytes, so there is one at a time.

    Parameters
    ----------
    rig_class : of `suite.speed`
    cases : all cases of the benchmark
    """

    def __init__(self, rig_class, cases):
        self._rig_class, self._cases, self._group = rig_class, cases, None
        self._stack = contextlib.ExitStack()

    def __call__(self, case):
        """Rig and read bandwidth of a case's group."""
        if case.group != self._group:
            self.close()
            mine = [one for one in self._cases if one.group == case.group]
            rig = self._stack.enter_context(self._rig_class(mine, 0, lambda text: None, {}))
            for _ in rig.batches():  # makes the weights
                pass
            self._group, self._found = case.group, (rig, rig.bandwidth())
        return self._found

    def close(self):
        """Give the memory back."""
        self._stack.close()
        self._found = None


def timed_facts(subject, check, seconds, bandwidth):
    """What a benchmark's extra_info says of a timed subject; ``seconds`` of a layer, the median."""
    return {
        "bytes_read_mib": subject.needed_bytes / 2**20,
        "read_bandwidth_gb_s": bandwidth.bytes_per_s / 1e9,
        "efficiency": subject.needed_bytes / (seconds * bandwidth.bytes_per_s),
        "max_rel_error": check.error,
        **subject.facts(seconds),
    }
