"""Answers from an exported folder, with transformers' `generate` and its key-value cache.

What a token is and where an answer ends is decided by sampling.py and answers.py, as for a checkpoint: transformers
only runs the model.
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
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.config import ConfigError
from megatron_anymal.data.chat_format import messages_of
from megatron_anymal.data.records import DataError, MediaPart, Part, TextPart
from megatron_anymal.generation.answers import Answer
from megatron_anymal.generation.generator import Generator, Watch
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.sampling import Sampling, choose
from megatron_anymal.hf.configuration_anymal import AnyMALConfig
from megatron_anymal.hf.modeling_anymal import AnyMALForConditionalGeneration
from megatron_anymal.hf.processing_anymal import AnyMALProcessor

# Mistakes of the user, as a folder's own code names them: its classes are copies.
_MISTAKES = ("ConfigError", "DataError", "MediaError")
# What transformers and peft raise where a folder's files do not fit together.
_UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError, StrictDataclassError)


class ExportedGenerator(Generator):
    """An exported model that answers, in one process."""

    def __init__(self, model: Any, processor: Any):
        """Answer with a model and its processor as they are; both may be of the folder's own code."""
        self._model, self._processor = model.eval(), processor
        sections = model.config.modalities
        self.kinds = [section["kind"] for section in sections.values()]
        self.max_positions = model.config.text_config.max_position_embeddings
        ends = model.generation_config.eos_token_id
        if ends is None:
            raise CheckpointError(
                f"{model.name_or_path!r}: its generation_config.json names no eos_token_id. Export again."
            )
        self._ends = {ends} if isinstance(ends, int) else set(ends)
        # A placeholder stands for a medium: as an answer it would be one without content.
        self._placeholders = [section["placeholder_id"] for section in sections.values()]

    @classmethod
    def of_folder(
        cls, folder: str, config: dict[str, Any], device: Optional[str], dtype: str, *, trust_remote_code: bool
    ) -> ExportedGenerator:
        """Load a folder.

        Args:
            config: its config.json.
            device: None: CUDA's, where there is one.
            dtype: auto (the folder's), float32 or bfloat16.
            trust_remote_code: run the code that the folder holds, not this package's.

        Raises:
            ConfigError: code that is not trusted, adapters without peft, or no such device.
            CheckpointError: files of the folder are missing or damaged.
        """
        if config.get("plugins") and not trust_remote_code:
            named = ", ".join(map(str, config["plugins"]))
            raise ConfigError(
                f"{folder!r} needs code of its own ({named}). Read it, then run it with --trust-remote-code."
            )
        place = _device(device)
        wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
        # Known here, so that loading the tokenizer does not ask whether to run the folder's code.
        AutoConfig.register(AnyMALConfig.model_type, AnyMALConfig, exist_ok=True)
        model_class, processor_class, trust = AnyMALForConditionalGeneration, AnyMALProcessor, False
        if trust_remote_code:
            model_class, processor_class, trust = AutoModelForCausalLM, AutoProcessor, True
        try:
            model, found = model_class.from_pretrained(
                folder, dtype=wanted, output_loading_info=True, trust_remote_code=trust
            )
            processor = processor_class.from_pretrained(folder, trust_remote_code=trust)
        except ConfigError:
            raise
        except _UNREADABLE as error:
            raise _unreadable(folder, error) from error
        if missing := sorted(found["missing_keys"]):
            raise CheckpointError(f"{folder!r} lacks {len(missing)} weights, {missing[0]!r} first. Export again.")
        adapter = Path(folder) / "adapter"
        return cls(_with_adapters(model.to(place), adapter) if adapter.is_dir() else model.to(place), processor)

    def _answer(self, prompts: Sequence[Prompt], first: int, sampling: Sampling, watch: Watch) -> list[str]:
        inputs = self._inputs(prompts).to(self._model.device)
        lengths = inputs["attention_mask"].sum(1).tolist()
        rooms = [self._room(number, length, sampling) for number, length in enumerate(lengths, start=first)]
        answers = [
            Answer(number, self._decode, self._ends, sampling.stop, room)
            for number, room in enumerate(rooms, start=first)
        ]
        chooser = [_Chooser(answers, lengths, sampling)] if not _greedy(sampling) else []
        self._model.generate(
            **inputs,
            generation_config=self._settings(max(rooms)),
            logits_processor=LogitsProcessorList(chooser),
            stopping_criteria=StoppingCriteriaList([_Watcher(answers, watch)]),
        )
        return [answer.text for answer in answers]

    def _inputs(self, prompts: Sequence[Prompt]) -> Any:
        try:
            return self._processor([_as_json(prompt) for prompt in prompts])
        except ValueError as error:
            if type(error).__name__ in _MISTAKES:
                raise DataError(str(error)) from error
            raise

    def _settings(self, max_new_tokens: int) -> Any:
        """The folder's settings but for the choice of tokens, which the command line decides."""
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
    """Leaves of each row's scores the one token that sampling.py chooses."""

    def __init__(self, answers: Sequence[Answer], lengths: Sequence[int], sampling: Sampling):
        """`lengths` are the prompts', without what pads them on the left."""
        self._answers, self._lengths, self._sampling = answers, lengths, sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, T] ids and [B, V] float32 scores to scores that are 0 at the chosen token, else -inf."""
        left = torch.full_like(scores, float("-inf"))
        for row, (answer, length) in enumerate(zip(self._answers, self._lengths)):
            token = 0
            if not answer.done:
                place = len(answer.tokens)
                seen = input_ids[row, -(length + place) :].tolist()
                token = choose(scores[row], self._sampling, seen, answer.number, place)
            left[row, token] = 0.0
        return left


class _Watcher(StoppingCriteria):
    """Gives each answer its tokens, and says which answers are done."""

    def __init__(self, answers: Sequence[Answer], watch: Watch):
        self._answers, self._watch = answers, watch

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """[B, T] ids to [B] bool."""
        for answer, token in zip(self._answers, input_ids[:, -1].tolist()):
            if not answer.done:
                answer.add(token)
                self._watch(answer)
        return torch.tensor([answer.done for answer in self._answers], device=input_ids.device)


def _with_adapters(model: Any, adapter: Path) -> Any:
    """The model with the adapters that lie beside its weights merged into them."""
    try:
        from peft import PeftModel
    except ImportError:
        raise ConfigError(
            f"{str(adapter)!r} holds adapters, which need peft: pip install peft, or export with --adapter merged."
        ) from None
    try:
        with warnings.catch_warnings():
            # peft only warns of adapters that the file lacks, and leaves them at zero.
            warnings.filterwarnings("error", message=".*missing adapter keys")
            return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (*_UNREADABLE, UserWarning) as error:
        raise _unreadable(str(adapter), error) from error


def _unreadable(folder: str, error: Exception) -> CheckpointError:
    said = " ".join(str(error).split()).rstrip(".")
    return CheckpointError(f"{folder!r} cannot be loaded: {said}. Export again.")


def _greedy(sampling: Sampling) -> bool:
    """Whether the likeliest token is chosen, as it stands."""
    return sampling.temperature == 0.0 and sampling.repetition_penalty == 1.0


def _as_json(prompt: Prompt) -> dict[str, Any]:
    """A prompt as the processor takes it; its media as files in memory."""
    files = iter(prompt.media)

    def entry(part: Part) -> dict[str, Any]:
        if not isinstance(part, MediaPart):
            return {"text": part.text}
        file = next(files)
        content = io.BytesIO(file.data)
        ending = f".{file.extension}"
        # What messages call it; its ending says how it is read.
        content.name = part.media if part.media.lower().endswith(ending) else part.media + ending
        kind = {"modality": part.modality} if part.modality else {}
        return {**part.attributes, **kind, "media": content}

    messages = messages_of(prompt.parts)
    if messages is None:
        # The processor wants a text; an empty one has no tokens.
        texts = [] if any(isinstance(part, TextPart) for part in prompt.parts) else [{"text": ""}]
        return {"parts": [*map(entry, prompt.parts), *texts]}
    return {"messages": [{"role": one.role, "content": [entry(part) for part in one.content]} for one in messages]}


def _device(name: Optional[str]) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # A number of a device that is not there is found by what is put on it.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name!r} is not there: {str(error).splitlines()[0]}") from None
