"""Generation from an exported folder, with transformers' `generate` and its key-value cache.

As for a checkpoint, sampling.py chooses the tokens and answers.py decides where an answer ends; transformers only runs
the model.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.config import ConfigError
from megatron_anymal.data.chat_format import messages_of
from megatron_anymal.data.code_grammar import CodeGrammar
from megatron_anymal.data.codes import CodeLayout
from megatron_anymal.data.records import CodesPart, DataError, MediaPart, Part, TextPart
from megatron_anymal.generation.answers import Answer, Reply
from megatron_anymal.generation.export_batch import ExportedBatch
from megatron_anymal.generation.generator import Generator, Watch
from megatron_anymal.generation.next_token import choose_each, observe_each
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.read_ahead import ReadAhead
from megatron_anymal.generation.running_batch import RunningBatch, RunningPrompt
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.hf.configuration_anymal import AnyMALConfig
from megatron_anymal.hf.modeling_anymal import AnyMALForConditionalGeneration
from megatron_anymal.hf.processing_anymal import AnyMALProcessor

# User errors, by class name: the folder's own code has copies of these classes.
_MISTAKES = ("ConfigError", "DataError", "MediaError")
# Errors of transformers and peft for a folder whose files are inconsistent.
_UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError, StrictDataclassError)


class ExportedGenerator(Generator):
    """Generates with an exported model, in one process."""

    def __init__(self, model: Any, processor: Any):
        """Wrap a loaded model and its processor; both may be classes from the folder's own code.

        Raises:
            CheckpointError: the model has no eos_token_id.
        """
        self._model, self._processor = model.eval(), processor
        self._ahead = ReadAhead(self._inputs)
        sections = model.config.modalities
        self.kinds = [section["kind"] for section in sections.values()]
        self.max_positions = model.config.text_config.max_position_embeddings
        ends = model.generation_config.eos_token_id
        if ends is None:
            raise CheckpointError(
                f"{model.name_or_path!r}: its generation_config.json has no eos_token_id. Export again."
            )
        self._ends = {ends} if isinstance(ends, int) else set(ends)
        # A placeholder stands for a media item; in an answer it would have no content.
        self._placeholders = [section["placeholder_id"] for section in sections.values()]
        if discrete := getattr(model.config, "discrete", {}):
            self.grammar = CodeGrammar(CodeLayout.of_export(discrete))

    @classmethod
    def of_folder(
        cls, folder: str, config: dict[str, Any], device: Optional[str], dtype: str, *, trust_remote_code: bool
    ) -> ExportedGenerator:
        """Load a folder.

        Args:
            config: its config.json.
            device: None: CUDA if available, else the CPU.
            dtype: auto (the folder's dtype), float32 or bfloat16.
            trust_remote_code: run the code in the folder instead of this package's.

        Raises:
            ConfigError: the folder needs code that is not trusted, peft is not installed for its adapters, or there is
                no such device.
            CheckpointError: files of the folder are missing or damaged.
        """
        if config.get("plugins") and not trust_remote_code:
            named = ", ".join(map(str, config["plugins"]))
            raise ConfigError(
                f"{folder!r} needs its own code ({named}). Review it, then run it with --trust-remote-code."
            )
        target = _device(device)
        wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
        # Registered, so that loading the tokenizer does not ask whether to run the folder's code.
        AutoConfig.register(AnyMALConfig.model_type, AnyMALConfig, exist_ok=True)
        model_class, processor_class, trust = AnyMALForConditionalGeneration, AnyMALProcessor, False
        if trust_remote_code:
            model_class, processor_class, trust = AutoModelForCausalLM, AutoProcessor, True
        try:
            model, loading = model_class.from_pretrained(
                folder, dtype=wanted, output_loading_info=True, trust_remote_code=trust
            )
            processor = processor_class.from_pretrained(folder, trust_remote_code=trust)
        except ConfigError:
            raise
        except _UNREADABLE as error:
            raise _unreadable(folder, error) from error
        if missing := sorted(loading["missing_keys"]):
            raise CheckpointError(f"{folder!r} lacks {len(missing)} weights, first {missing[0]!r}. Export again.")
        adapter = Path(folder) / "adapter"
        return cls(_with_adapters(model.to(target), adapter) if adapter.is_dir() else model.to(target), processor)

    def _answer(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], sampling: Sampling, watch: Watch
    ) -> list[Reply]:
        inputs = self._ahead.take(prompts).to(self._model.device)
        running = []
        for number, row, mask in zip(numbers, inputs["input_ids"], inputs["attention_mask"].bool()):
            tokens = row[mask].tolist()
            answer = self._open_answer(number, len(tokens), sampling, self._decode, self._ends)
            running.append(RunningPrompt(tokens, [], answer, sampling))
        answers = [one.answer for one in running]
        chooser = [_Chooser(running)] if self.grammar or not _greedy(sampling) else []
        # Not the model's own `generate`, which would apply the grammar as well.
        GenerationMixin.generate(
            self._model,
            **inputs,
            generation_config=self._settings(max(answer.room for answer in answers)),
            logits_processor=LogitsProcessorList(chooser),
            stopping_criteria=StoppingCriteriaList([_Watcher(answers, watch)]),
        )
        return [answer.reply for answer in answers]

    def read_in_processes(self, count: int) -> None:
        """Use this many processes for `read_ahead`."""
        self._ahead.processes = count

    def read_ahead(self, batches: Sequence[Sequence[Prompt]]) -> None:
        """Begin to read the media of batches that `answer_batch` gets next, in another process each."""
        self._ahead.announce([batch for batch in batches if batch])

    def running_batch(self) -> RunningBatch:
        """Start an empty batch that prompts can join and leave."""
        return ExportedBatch(self._model, self._open, self._placeholders)

    def _open(self, prompt: Prompt, sampling: Sampling) -> RunningPrompt:
        inputs = self._inputs([prompt])
        [tokens] = inputs["input_ids"].tolist()
        # The only prompt of `anymal generate` has the number 0.
        answer = self._open_answer(0, len(tokens), sampling, self._decode, self._ends)
        return RunningPrompt(tokens, list(inputs["media"].items()), answer, sampling)

    @torch.no_grad()
    def _log_likelihoods(self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        return [self._likelihoods_of(prompt, texts) for prompt, texts in zip(prompts, candidates)]

    def _likelihoods_of(self, prompt: Prompt, candidates: Sequence[str]) -> list[float]:
        """Log-likelihoods of one prompt's candidates, in one pass."""
        inputs = self._answered(prompt, candidates).to(self._model.device)
        length = self._inputs([prompt])["input_ids"].size(1)
        counts = (inputs["attention_mask"].sum(1) - length).tolist()
        self._room(0, length + max(counts) - 1, Sampling())
        longest = max(counts)
        logits = self._model(**inputs, logits_to_keep=longest + 1).logits[:, :-1]
        targets = inputs["input_ids"][:, -longest:]
        scores = logits.float().log_softmax(-1).gather(2, targets[:, :, None])[:, :, 0].double()
        return [float(row[longest - count :].sum()) for row, count in zip(scores, counts)]

    def _inputs(self, prompts: Sequence[Prompt]) -> Any:
        try:
            return self._processor([_as_json(prompt) for prompt in prompts])
        except ValueError as error:
            if type(error).__name__ in _MISTAKES:
                raise DataError(str(error)) from error
            raise

    def _answered(self, prompt: Prompt, answers: Sequence[str]) -> Any:
        """Inputs of a prompt with each of several answers, without an end token."""
        asked = [_as_json(prompt) for _ in answers]
        try:
            if "parts" in asked[0]:
                return self._processor([{"parts": [*one["parts"], {"text": t}]} for one, t in zip(asked, answers)])
            return self._processor.apply_chat_template(
                [[*one["messages"], {"role": "assistant", "content": t}] for one, t in zip(asked, answers)],
                continue_final_message=True,
            )
        except ValueError as error:
            if type(error).__name__ in _MISTAKES:
                raise DataError(str(error)) from error
            raise

    def _settings(self, max_new_tokens: int) -> Any:
        """The folder's generation settings, except for sampling, which `_Chooser` does."""
        settings = copy.deepcopy(self._model.generation_config)
        chosen = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
        settings.update(
            **chosen,
            repetition_penalty=1.0,
            suppress_tokens=self._placeholders or None,
            max_new_tokens=max_new_tokens,
            max_length=None,
        )
        return settings

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._processor.tokenizer.decode(list(tokens), skip_special_tokens=True)


class _Chooser(LogitsProcessor):
    """Masks all scores of a row except for the token that sampling.py chooses."""

    def __init__(self, running: Sequence[RunningPrompt]):
        """All prompts of the batch, in the order of its rows."""
        self._running = running

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, T] ids and [B, V] float32 scores -> scores [B, V]: 0 at the chosen token, else -inf."""
        masked = torch.full_like(scores, float("-inf"))
        rows = [row for row, one in enumerate(self._running) if not one.answer.done]
        running = [self._running[row] for row in rows]
        if any(one.answer.guide for one in running):
            observe_each(scores[rows].argmax(-1), running)
        tokens = dict(zip(rows, choose_each(scores[rows], running)))
        for row in range(len(masked)):
            masked[row, tokens.get(row, 0)] = 0.0
        return masked


class _Watcher(StoppingCriteria):
    """Passes each new token to its answer and returns which answers are done."""

    def __init__(self, answers: Sequence[Answer], watch: Watch):
        self._answers, self._watch = answers, watch

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """[B, T] ids -> [B] bool."""
        for answer, token in zip(self._answers, input_ids[:, -1].tolist()):
            if not answer.done:
                answer.add(token)
                self._watch(answer)
        return torch.tensor([answer.done for answer in self._answers], device=input_ids.device)


def _with_adapters(model: Any, adapter: Path) -> Any:
    """Merge the adapters of a folder into the model's weights."""
    try:
        from peft import PeftModel
    except ImportError:
        raise ConfigError(
            f"{str(adapter)!r} holds adapters, which need peft: pip install peft, or export with --adapter merged."
        ) from None
    try:
        with warnings.catch_warnings():
            # If adapters are missing from the file, peft only warns and leaves them at zero.
            warnings.filterwarnings("error", message=".*missing adapter keys")
            return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (*_UNREADABLE, UserWarning) as error:
        raise _unreadable(str(adapter), error) from error


def _unreadable(folder: str, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split()).rstrip(".")
    return CheckpointError(f"{folder!r} cannot be loaded: {reason}. Export again.")


def _greedy(sampling: Sampling) -> bool:
    """Whether decoding is plain argmax over the unmodified logits."""
    return sampling.temperature == 0.0 and sampling.repetition_penalty == 1.0


def _as_json(prompt: Prompt) -> dict[str, Any]:
    """Convert a prompt to the processor's input, with media as in-memory files."""
    files = iter(prompt.media)

    def entry(part: Part) -> dict[str, Any]:
        if not isinstance(part, MediaPart):
            return {"text": part.text}
        file = next(files)
        content = io.BytesIO(file.data)
        ending = f".{file.extension}"
        # The name in error messages; its extension selects the reader.
        content.name = part.media if part.media.lower().endswith(ending) else part.media + ending
        kind = {"modality": part.modality} if part.modality else {}
        # In a conversation, the role says whether codes belong to an answer.
        loss = {"loss": part.generated} if isinstance(part, CodesPart) and messages is None else {}
        return {**part.attributes, **kind, **loss, "media": content}

    messages = messages_of(prompt.parts)
    if messages is None:
        # The processor needs a text part; an empty one has no tokens.
        texts = [] if any(isinstance(part, TextPart) for part in prompt.parts) else [{"text": ""}]
        return {"parts": [*map(entry, prompt.parts), *texts]}
    return {"messages": [{"role": one.role, "content": [entry(part) for part in one.content]} for one in messages]}


def _device(name: Optional[str]) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Allocating a tensor detects a device index that does not exist.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name!r} is not available: {str(error).splitlines()[0]}") from None
