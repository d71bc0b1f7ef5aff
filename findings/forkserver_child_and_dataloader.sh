#!/usr/bin/env bash
# torch 2.13.0, a DataLoader with workers in a process that multiprocessing's forkserver started (Python 3.11).
#
# Guess: the start method of that process is Linux's default, fork, as in any other; its loader workers are its children.
# Behaviour: a child of a forkserver has "forkserver" as its own default. Its DataLoader asks the same server for workers,
# so their parent is the server, not the process that uses them: workers that should end with their parent do not end, and a
# worker that checks its parent finds the wrong process.
#
# Output seen: default forkserver, worker's parent is the caller False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/run.py" <<'PY'
import multiprocessing
import os

from torch.utils.data import DataLoader, Dataset


class Parents(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, number):
        return os.getppid()


def child(queue):
    parent = int(next(iter(DataLoader(Parents(), num_workers=1))))
    queue.put((multiprocessing.get_start_method(), parent == os.getpid()))


if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    method, is_caller = queue.get(timeout=120)
    process.join()
    print(f"default {method}, worker's parent is the caller {is_caller}")
    assert method == "forkserver" and not is_caller, "the behaviour has changed"
PY
"$folder/venv/bin/python" -W ignore "$folder/run.py"
