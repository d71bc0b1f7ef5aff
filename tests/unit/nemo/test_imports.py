"""Only megatron_anymal/nemo imports NeMo and Lightning; the engine needs no configuration library either."""

import json
import subprocess
import sys
from pathlib import Path

import megatron_anymal

PACKAGE = Path(megatron_anymal.__file__).parent

CODE = """
import importlib, importlib.abc, json, sys

BLOCKED = ("nemo", "lightning", "pytorch_lightning", "omegaconf", "hydra")

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print("FOUND" + json.dumps(sorted(name for name in sys.modules if name.split(".")[0] in BLOCKED)))
"""


def test_engine_imports_neither_nemo_nor_lightning_nor_hydra():
    modules = []
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        # lmms-eval loads its model class, which derives from one of lmms-eval's.
        if parts[0] != "nemo" and parts != ("harnesses", "lmms_eval_model"):
            modules.append(".".join(["megatron_anymal", *(part for part in parts if part != "__init__")]))
    assert "megatron_anymal.config.compose" in modules
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(modules)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.split("FOUND")[1]) == []
