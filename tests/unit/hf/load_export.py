"""Load an exported folder with this project hidden: `python load_export.py FOLDER PROMPTS.json`.

Prints JSON: missing keys, token ids, logits, answers, and the media libraries that were imported.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

HIDDEN = {"megatron_anymal", "megatron", *os.environ.get("HIDDEN_LIBRARIES", "").split(",")}


class Hiding:
    """A module finder that does not find hidden packages."""

    def __init__(self, finder: Any):
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """As the wrapped finder, but None for hidden packages."""
        return None if name.partition(".")[0] in HIDDEN else self._finder.find_spec(name, path, target)


def main(folder: str, prompts_file: str) -> None:
    """Load the folder, answer the prompts and print the results."""
    sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model, loading_info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(json.loads(Path(prompts_file).read_text()))
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    half = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    half.generate(**inputs, max_new_tokens=2, do_sample=False)
    result = {
        "loading": {name: sorted(map(str, keys)) for name, keys in loading_info.items() if keys},
        "module": type(model).__module__.partition(".")[0],
        "ids": inputs["input_ids"].tolist(),
        "pieces": {name: float(pieces.double().sum()) for name, pieces in inputs["media"].items()},
        "logits": logits.tolist(),
        "answers": processor.answers(output, inputs),
        "dtypes": sorted({str(tensor.dtype) for tensor in half.parameters()}),
        "libraries": sorted({"av", "soundfile", "soxr", "simplejpeg", "PIL"} & sys.modules.keys()),
        "config": model.config.text_config.to_dict(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
