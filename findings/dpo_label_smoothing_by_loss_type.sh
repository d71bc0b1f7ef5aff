#!/usr/bin/env bash
# trl 1.16.0, DPOConfig(label_smoothing=...) with the default loss.
#
# Guess: label_smoothing with the loss "sigmoid" gives conservative DPO, as it did in earlier versions; a loss for which it
# has no meaning rejects it.
# Behaviour: "sigmoid", "ipo" and "hinge" silently ignore it. "robust" is a different loss, that of Robust DPO, which can be
# negative. The conservative formula remains only in "aot", where it is applied to margins sorted over the batch: this is
# conservative DPO only with one pair per batch. Before, label_smoothing alone was enough for it:
# https://github.com/huggingface/trl/pull/1655
#
# Output seen: loss without smoothing and with 0.2 of one pair: sigmoid 0.517 0.517, hinge 0.609 0.609, ipo 0.371 0.371,
# robust 0.517 0.386, aot 0.517 0.595; conservative DPO by hand 0.595
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet trl==1.16.0 transformers==5.24.0
cat > "$folder/run.py" <<'PY'
import math
import sys

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

disable_progress_bars()
SMOOTHING = 0.2
words = ["</s>", "<unk>", "a", "dog", "runs", "sleeps"]
backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
pair = Dataset.from_dict({"prompt": ["a dog "], "chosen": ["runs"], "rejected": ["sleeps"]})
shape = LlamaConfig(
    vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    initializer_range=0.5, bos_token_id=None, eos_token_id=0, pad_token_id=0,
)


def loss(kind, smoothing):
    torch.manual_seed(0)
    policy, reference = LlamaForCausalLM(shape), LlamaForCausalLM(shape)
    settings = DPOConfig(
        sys.argv[1], loss_type=[kind], label_smoothing=smoothing, beta=0.5, use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, report_to=[],
    )
    data = {"train_dataset": pair, "eval_dataset": pair, "processing_class": tokenizer}
    return DPOTrainer(policy, reference, settings, **data).evaluate()["eval_loss"]


losses = {kind: (loss(kind, 0.0), loss(kind, SMOOTHING)) for kind in ("sigmoid", "hinge", "ipo", "robust", "aot")}
margin = -math.log(math.expm1(losses["sigmoid"][0]))  # beta times the difference of log-ratios
by_hand = (1 - SMOOTHING) * math.log1p(math.exp(-margin)) + SMOOTHING * math.log1p(math.exp(margin))
shown = ", ".join(f"{kind} {without:.3f} {smoothed:.3f}" for kind, (without, smoothed) in losses.items())
print(f"RESULT loss without smoothing and with {SMOOTHING} of one pair: {shown}; conservative DPO by hand {by_hand:.3f}")
for kind in ("sigmoid", "hinge", "ipo"):
    assert losses[kind][0] == losses[kind][1], "the behaviour has changed"
assert abs(losses["sigmoid"][1] - by_hand) > 0.05 and abs(losses["aot"][1] - by_hand) < 1e-4, "the behaviour has changed"
assert losses["robust"][1] < losses["robust"][0], "the behaviour has changed"
PY
"$folder/venv/bin/python" -W ignore "$folder/run.py" "$folder/trainer" 2>/dev/null | sed -n 's/^RESULT //p'
