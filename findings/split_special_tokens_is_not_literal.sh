#!/usr/bin/env bash
# transformers 5.24.0, split_special_tokens=True with a vocabulary that lists its control tokens.
#
# Guess: split_special_tokens makes text literal: "<s>" written by a user is split into pieces of its characters.
# Behaviour: only the scan for added tokens is switched off. A Unigram or WordLevel model that has "<s>" in its vocabulary,
# as converted sentencepiece models do, still finds it as a piece and returns the control token's id.
#
# Output seen: WordLevel [0], Unigram [0], BPE [5, 4, 6]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
"$folder/venv/bin/python" - <<'PY' 2>/dev/null
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

words = ["<s>", "</s>", "<unk>", "a", "s", "<", ">"]
vocabularies = {
    "WordLevel": models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"),
    "Unigram": models.Unigram([(word, -1.0) for word in words], unk_id=2),
    "BPE": models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>"),
}
found = {}
for name, model in vocabularies.items():
    backend = Tokenizer(model)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", split_special_tokens=True)
    found[name] = made.encode("<s>", add_special_tokens=False)
print(", ".join(f"{name} {ids}" for name, ids in found.items()))
assert found["WordLevel"] == [0] and found["Unigram"] == [0] and 0 not in found["BPE"], "the behaviour has changed"
PY
