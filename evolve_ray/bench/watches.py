"""Watches around a block of a benchmark: wall and CPU seconds, and the peak memory that it allocates."""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

Seconds = tuple[float, float]  # wall and CPU seconds


class Watch:
    """`with Watch(args) as watch`: afterwards `watch.spent` has the wall and CPU seconds of the block."""

    def __init__(self, args: argparse.Namespace):
        self.args = args

    def __enter__(self) -> "Watch":
        self.start = (time.perf_counter(), time.process_time())
        return self

    def __exit__(self, *error: Any) -> None:
        synchronise(self.args)
        self.spent: Seconds = (time.perf_counter() - self.start[0], time.process_time() - self.start[1])


def synchronise(args: argparse.Namespace) -> None:
    import torch

    if args.device == "cuda":
        torch.cuda.synchronize()


class Peak:
    """`with Peak(args) as peak`: afterwards `peak.bytes` is the peak memory that the block allocated in addition."""

    def __init__(self, args: argparse.Namespace):
        self.cuda, self.bytes = args.device == "cuda", 0

    def __enter__(self) -> "Peak":
        import torch

        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
            self.profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self.before
            return
        self.profiler.__exit__(*error)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self.profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
        live = 0
        for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
            live += event["args"]["Bytes"]
            self.bytes = max(self.bytes, live)


class NoPeak:
    """Replaces `Peak` where time is measured, because the profiler costs time."""

    bytes = 0

    def __init__(self, args: Any = None):
        pass

    def __enter__(self) -> "NoPeak":
        return self

    def __exit__(self, *error: Any) -> None:
        pass
