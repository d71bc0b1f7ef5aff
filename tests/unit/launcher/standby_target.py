"""A program that reports the environment in which it starts."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time

if __name__ == "__main__":
    what = sys.argv[1]
    if what == "wait":
        print("waiting", flush=True)
        time.sleep(60)
    if what == "fail":
        raise ValueError("on purpose")
    if what == "exit":
        sys.exit(int(sys.argv[2]))
    import numpy as np

    print("some words", file=sys.stderr)
    report = {
        "argv": sys.argv[1:],
        "name": __name__,
        "spec": __spec__.name if __spec__ else None,
        "environment": dict(sorted(os.environ.items())),
        "folder": os.getcwd(),
        "path": sys.path,
        "leads": os.getsid(0) == os.getpid() == os.getpgid(0),
        "handlers": {
            n.name: str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGUSR1)
        },
        "files": sorted(int(f) for f in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{f}")),
        "threads": len(os.listdir("/proc/self/task")),
        "random": random.random(),
        "numpy": float(np.random.random()),
        "json": "json" in sys.modules,
    }
    print("FOUND" + json.dumps(report))
