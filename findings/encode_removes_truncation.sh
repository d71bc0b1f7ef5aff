#!/usr/bin/env bash
# transformers 5.24.0 and a tokenizer.json with a truncation block.
#
# Guess: encode() only reads the tokenizer; the result of backend_tokenizer.to_str(), and its hash, stay the same.
# Behaviour: the first encode() without truncation=True removes the block from the tokenizer for good. A fingerprint taken
# before it differs from one taken after it, so a job that hashes its tokenizer to decide whether it may resume detects a
# change although nothing changed.
#
# Output seen: before True, after False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
"$folder/venv/bin/python" - "$folder" <<'PY' 2>/dev/null
import json
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

folder = sys.argv[1] + "/tokenizer"
backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
backend.enable_truncation(max_length=8)
PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
file = f"{folder}/tokenizer.json"
content = json.load(open(file))
content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
json.dump(content, open(file, "w"))

loaded = AutoTokenizer.from_pretrained(folder)
before = json.loads(loaded.backend_tokenizer.to_str())["truncation"] is not None
loaded.encode("a a a")
after = json.loads(loaded.backend_tokenizer.to_str())["truncation"] is not None
print(f"before {before}, after {after}")
assert before and not after, "the behaviour has changed"
PY
