"""Using an exported folder neither prompts for confirmation nor runs its code, with or without a terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import fork_server
import pytest
from hf_parts import make_config, make_model, sections, write_export
from tiny import make_shards

from checkpoint_tools.exporting.model_files import _of_both_versions

# transformers reads HF_MODULES_CACHE when it is imported, which has happened already in a forked process.
WITH_OWN_CACHE = """
import sys
from transformers import dynamic_module_utils
from megatron_anymal.__main__ import main
dynamic_module_utils.HF_MODULES_CACHE = sys.argv[1]
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def folder(tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose own code fails with a message when it is run."""
    folder = tmp_path_factory.mktemp("asked") / "export"
    write_export(folder, make_model(make_config(sections("towers"), tokenizer_folder)), tokenizer_folder)
    # As the exporter writes it; for such a tokenizer, transformers looks up the model's configuration.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(_of_both_versions(settings)))
    code = list(folder.glob("*.py"))
    assert code
    for file in code:
        file.write_text("raise SystemExit('the code of the folder was run')\n")
    return folder


def in_a_terminal(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and everything shown; the process is killed if it asks a question."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    output = b""
    try:
        # On Linux, reading from a terminal that no process holds open any longer raises an error.
        while data := os.read(ours, 65536):
            output += data
            if b"y/N" in output:
                process.kill()
    except OSError:
        pass
    os.close(ours)
    return process.wait(), output.decode()


@pytest.mark.parametrize(
    ("verb", "terminal"),
    [
        ("generate", True),
        ("evaluate", False),
        pytest.param("generate", False, marks=pytest.mark.slow),
        pytest.param("evaluate", True, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_asked_and_none_of_its_code_is_run(
    verb: str, terminal: bool, folder: Path, tokenizer_folder: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "megatron_anymal", verb, "--checkpoint", str(folder)]
    if verb == "generate":
        command += ["--text", "this is", "--max-new-tokens", "3"]
    else:
        command += ["--data", make_shards(tmp_path / "shards", tokenizer_folder, 4, ("image", "imu"))]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    if terminal:
        code, output = in_a_terminal(command, environment)
    else:
        done = fork_server.python("-c", WITH_OWN_CACHE, tmp_path / "modules", *command[3:], environment=environment)
        code, output = done.returncode, done.stdout + done.stderr
    assert code == 0, output
    for never in ("y/N", "custom code", "trust_remote_code", "was run"):
        assert never not in output
    # The path to which transformers would have copied the folder's code.
    assert not list(tmp_path.glob("modules/**/modeling*"))
