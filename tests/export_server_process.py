"""A server that runs scripts as `python -I SCRIPT WORDS...` does, in forks that have torch and transformers imported.

    python -I export_server_process.py SOCKET < PIPE

See export_server.py. Nothing of the trainer is imported. Ends when the pipe is closed.
"""

import gc
import json
import os
import runpy
import select
import socket
import sys
import tempfile
import traceback

import safetensors.torch  # noqa: F401
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, LlamaForCausalLM  # noqa: F401


def answer(connection):
    """Run one script to its end, and send back its exit code, standard output and standard error."""
    with connection.makefile("rw") as stream, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        request = json.loads(stream.readline())
        if len(os.listdir("/proc/self/task")) > 1:
            sys.exit("a process with threads must not be forked")
        pid = os.fork()
        if not pid:
            run(request, out.fileno(), err.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        stream.write(json.dumps([code, *texts]))


def run(request, out, err):
    """In a fork: run the script, and exit as an interpreter does."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["words"]
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(path):
    """Serve one request after the other."""
    torch.set_num_threads(1)
    # Collections in a fork would visit, and so copy, everything that was imported.
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            with connection:
                answer(connection)


if __name__ == "__main__":
    main(sys.argv[1])
