"""Model card of an export: description, usage, training data, results and verification."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_anymal.checkpoint.store import Manifest

_JOBS = {"pretrain": "alignment pre-training", "sft": "supervised fine-tuning", "dpo": "conservative DPO"}
_USE = """\
```python
model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)
inputs = processor(text=" question: what is this? answer:", media=["FILE"])
print(processor.answers(model.generate(**inputs), inputs)[0])
```
"""
_USE_CHAT = """\
```python
model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)
content = [{"type": "KIND", "path": "FILE"}, {"type": "text", "text": "what is this?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}])
print(processor.answers(model.generate(**inputs), inputs)[0])
```
"""
_USE_CODES = """\
```python
model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)
inputs = processor(text=" a cat")
output = model.generate(**inputs, modalities=["NAME"], do_sample=True, top_k=0, top_p=0.7, max_new_tokens=NUMBER)
print(processor.parts(output, inputs)[0])
```

`modalities` says what an answer may consist of: "text", kinds of media, or both. Media are codes of their tokenizer, in
the order that the grammar of their kind demands; `parts` returns them with `name` and `codes` [codebooks, codes].
"""
_USE_PIPELINE = """
For images, transformers' pipeline does the same: `pipeline("image-text-to-text", model="FOLDER",
trust_remote_code=True)`. The processor takes `text=` with `images=`, `audio=`, `videos=` or `media=`. A string returned
by `processor.apply_chat_template(messages, tokenize=False)` is parsed as a conversation; any other text is taken
literally, including control tokens in it.
"""
_USE_LLAMA = """\
```python
model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
print(tokenizer.decode(model.generate(**tokenizer("Once", return_tensors="pt"))[0]))
```
"""
# Settings that determine the training result, independent of the parallel layout.
_SHOWN = (
    "trainer.max_steps",
    "trainer.precision",
    "model.global_batch_size",
    "model.seed",
    "model.loss_normalization",
    "model.optim.lr",
    "model.optim.betas",
    "model.optim.weight_decay",
    "model.optim.sched",
    "model.lora",
    "model.neftune",
    "data.seq_length",
)
# Settings that each alignment of model.multiplex has separately.
_OF_ALIGNMENTS = ("global_batch_size", "optim.lr", "optim.betas", "optim.weight_decay", "optim.sched")


def write_card(
    folder: Path,
    manifest: Manifest,
    *,
    llama_only: bool,
    adapter: str,
    files: Mapping[str, str],
    results: Mapping[str, float],
    verification: Mapping[str, Any] | None,
) -> None:
    """Write FOLDER/README.md.

    Args:
        adapter: "merged", "separate", or "" if there are none.
        files: weight file -> SHA-256.
        results: the run's last validation, by metric.
        verification: result of checkpoint_tools.verify; None if verification was skipped.
    """
    config = manifest.config
    title = "A Llama" if llama_only else _title(config["model"])
    sections = [
        _front_matter([] if llama_only else _kinds(config)),
        f"# {title}\n\nStep {manifest.step} of {_JOBS[config['job']]} with megatron_anymal, "
        f"{manifest.consumed_samples:,} samples.{_of_adapter(adapter)}",
        "## Use\n\n" + _use(config, llama_only).rstrip(),
        "" if llama_only else _modalities(config["model"]["modalities"]),
        "" if llama_only else _discrete(config["model"].get("discrete", {})),
        _data(config["data"]),
        _configuration(config),
        _results(results),
        _verified(verification),
        _hashes(manifest, files),
    ]
    (folder / "README.md").write_text("\n\n".join(s for s in sections if s) + "\n", encoding="utf-8")


def _title(model: Mapping[str, Any]) -> str:
    parts = [f"{', '.join(sorted(model['modalities']))} input"] if model["modalities"] else []
    parts += [f"{', '.join(model['discrete'])} as codes"] if model.get("discrete") else []
    return f"AnyMAL: a Llama with {' and '.join(parts)}"


def _discrete(sections: Mapping[str, Any]) -> str:
    if not sections:
        return ""
    rows = [
        f"| {name} | {', '.join(map(str, section['codebooks']))} | {section['codes_per_item'] or 'any number'} | "
        f"{section['tokenizer_hash'] or 'not stated'} |"
        for name, section in sections.items()
    ]
    head = "| media as codes | codebooks | codes per item | hash of the tokenizer |\n|---|---|---|---|"
    return "## Media as codes\n\n" + "\n".join([head, *rows])


def _kinds(config: Mapping[str, Any]) -> list[str]:
    return [section["kind"] or name for name, section in config["model"]["modalities"].items()]


def _front_matter(kinds: Sequence[str]) -> str:
    task = "image-text-to-text" if "image" in kinds else "any-to-any" if kinds else "text-generation"
    return f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags: [llama, anymal, megatron-core]\n---"


def _use(config: Mapping[str, Any], llama_only: bool) -> str:
    if llama_only:
        return _USE_LLAMA
    kinds = _kinds(config)
    if not kinds:
        name, section = next(iter(config["model"]["discrete"].items()))
        return _USE_CODES.replace("NAME", name).replace("NUMBER", str((section["codes_per_item"] or 254) + 2))
    use = _USE if config["job"] == "pretrain" else _USE_CHAT.replace("KIND", kinds[0])
    return use + _USE_PIPELINE if "image" in kinds else use


def _of_adapter(adapter: str) -> str:
    if adapter == "merged":
        return " Its LoRA adapters are merged into the weights."
    if adapter == "separate":
        return " Its LoRA adapters are in `adapter/`: `PeftModel.from_pretrained(model, FOLDER + '/adapter')`."
    return ""


def _modalities(modalities: Mapping[str, Any]) -> str:
    rows = [
        f"| {name} | {section['encoder']['type']} | {section['projector']['type']}, "
        f"{section['projector']['num_layers']} layer(s) | {section['projector']['num_tokens']} |"
        for name, section in modalities.items()
    ]
    head = "| modality | encoder | projector | soft tokens per encoder input |\n|---|---|---|---|"
    return "## Modalities\n\n" + "\n".join([head, *rows])


def _data(data: Mapping[str, Any]) -> str:
    if not data["train"]:
        return ""
    total = sum(dataset["weight"] for dataset in data["train"].values())
    rows = [f"| {name} | {dataset['weight'] / total:.1%} |" for name, dataset in data["train"].items()]
    return "## Data mix\n\n" + "\n".join(["| data set | share of samples |\n|---|---|", *rows])


def _configuration(config: Mapping[str, Any]) -> str:
    alignments, shown = config["model"].get("multiplex", {}), list(_SHOWN)
    if alignments:
        shown = [key for key in shown if key.removeprefix("model.") not in _OF_ALIGNMENTS]
        own = ("max_steps", *_OF_ALIGNMENTS)
        shown += [f"model.multiplex.{name}.{key}" for name in alignments for key in own]
    rows = []
    for key in shown:
        value: Any = config
        for part in key.split("."):
            value = value[part]
        rows.append(f"| `{key}` | `{json.dumps(value)}` |")
    return "## Configuration\n\n" + "\n".join(["| key | value |\n|---|---|", *rows])


def _results(results: Mapping[str, float]) -> str:
    rows = [f"| {name} | {value:.4f} |" for name, value in results.items()]
    return (
        "## Results\n\nThe run's last validation.\n\n" + "\n".join(["| metric | value |\n|---|---|", *rows])
        if rows
        else ""
    )


def _verified(verification: Mapping[str, Any] | None) -> str:
    if verification is None:
        return "## Verification\n\nNot run."
    rows: Sequence[str] = [
        f"| {row['samples']} | {row['count']} | {row['tokens']} | {row['max_difference']:.1e} | "
        f"{row['largest_logit']:.2f} | {row['same_choice']:.1%} |"
        for row in verification["rows"]
    ]
    head = "| samples | number | tokens | largest difference | largest logit | top-1 agreement |\n" + "|---" * 6 + "|"
    return (
        "## Verification\n\nLogits of the trainer's own model compared with this folder's, loaded by transformers "
        f"{verification['transformers']} without the trainer, in {verification['dtype']}. Token ids and encoder inputs "
        "are identical.\n\n" + "\n".join([head, *rows])
    )


def _hashes(manifest: Manifest, files: Mapping[str, str]) -> str:
    rows = [f"| `{name}` | `{digest}` |" for name, digest in files.items()]
    base = f"Hash of the frozen Llama's weights: `{manifest.base_hash}`.\n\n" if manifest.base_hash else ""
    return f"## Hashes\n\n{base}" + "\n".join(["| file | SHA-256 |\n|---|---|", *rows])
