"""A rank that loses a peer, or fails for another reason, and then is a rank of the next attempt if it stays."""

from __future__ import annotations

import os
import sys
import threading

import torch.distributed as dist

from megatron_anymal.launcher.rejoining import rejoin

ERRORS = {
    "peer": lambda: RuntimeError("gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"),
    "store": lambda: dist.DistNetworkError("recvValue failed on SocketImpl(fd=3)"),
    "own": lambda: RuntimeError("a bug"),
    "mistake": lambda: ValueError("a mistake"),
}


FORGOTTEN: list[object] = []


def fail(what: str) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if what == "thread":
        threading.Thread(target=threading.Event().wait, name="forgotten", daemon=True).start()
    if what == "group":
        # As a model that is still referenced would keep it.
        FORGOTTEN.append(dist.new_group([0]))
    if what == "cause":
        raise ValueError("a consequence") from ERRORS["peer"]()
    raise ERRORS.get(what, ERRORS["peer"])()


if __name__ == "__main__":
    print("first", os.getpid(), os.environ["RANK"], flush=True)
    try:
        fail(sys.argv[1])
    except Exception as error:
        if not rejoin(error):
            print("ends", flush=True)
            sys.exit(1)
    print("again", os.getpid(), os.environ["RANK"], sys.argv[1:], os.getcwd(), os.environ["NEW"], flush=True)
    print("left the job" if not dist.is_initialized() else "still in the job", file=sys.stderr, flush=True)
    sys.exit(int(sys.argv[1]))
