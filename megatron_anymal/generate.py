"""`anymal generate`: answers from a training checkpoint, to look at what it has learned.

The whole prompt is run again for each new token: simple, the same under tensor and pipeline parallelism, and fast
enough for answers of a line.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.base import load_base, resolve_language_model
from megatron_anymal.checkpoint.state import load_media_parts
from megatron_anymal.config import AnyMALConfig
from megatron_anymal.config_io import from_dict
from megatron_anymal.data.messages import END_TURN, open_prompt, parse_messages
from megatron_anymal.data.order import mix64
from megatron_anymal.data.parts import parse_parts
from megatron_anymal.data.samples import read_lines
from megatron_anymal.data.tokenize import Tokenizer
from megatron_anymal.data.types import DataError, MediaBatch, MediaPart, MicroBatch, Part, PlannedMicroBatch, TextPart
from megatron_anymal.modalities import Modality, kind_for_extension
from megatron_anymal.model.anymal import AnyMALModel
from megatron_anymal.model.build import build_models
from megatron_anymal.parallel import ParallelLayout, initialize
from megatron_anymal.telemetry import Progress
from megatron_anymal.train.build import build_inputs, check_vocabulary, loaded_modalities
from megatron_anymal.train.step import to_device


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 64
    # 0 takes the likeliest token.
    temperature: float = 0.0
    # Only the likeliest tokens that together have this probability.
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class MediaFile:
    """A media item of a prompt, read."""

    data: bytes
    extension: str


@dataclass(frozen=True)
class Prompt:
    """A document up to where the model answers: parts in order, and the bytes of the media parts in theirs.

    Of a conversation these are the parts that data/messages.py lays out, with the assistant's open header at the end.
    """

    parts: Sequence[Part]
    media: Sequence[MediaFile]


@dataclass
class _Running:
    """A prompt being answered."""

    number: int
    tokens: list[int]
    prompt_length: int
    # Modality -> soft tokens [k, H]; on the first stage only.
    soft: dict[str, Tensor]

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_length :]


class Generator:
    """A model that answers, in one part and without context parallelism."""

    def __init__(
        self,
        config: AnyMALConfig,
        layout: ParallelLayout,
        tokenizer: Tokenizer,
        modalities: dict[str, Modality],
        model: AnyMALModel,
    ):
        """Answer with a model as it is; `model` must be in evaluation mode while it answers."""
        self.layout, self.tokenizer, self.modalities, self.model = layout, tokenizer, modalities, model
        self._entries = loaded_modalities(config, tokenizer, modalities)
        self._names = {section.kind or name: name for name, section in config.model.modalities.items()}
        self._vocab_size = model.vocab_size
        # A conversation's answer ends with its turn.
        self._ends = {tokenizer.end, tokenizer.hf.get_vocab().get(END_TURN, tokenizer.end)}
        self._length_multiple = layout.tensor_size if config.model.sequence_parallel else 1

    @classmethod
    def of_checkpoint(cls, config: AnyMALConfig, layout: ParallelLayout, checkpoint: Optional[Path]) -> Generator:
        """Build the model; without a checkpoint its projectors have their initial values."""
        config, hf = resolve_language_model(config)
        tokenizer, modalities = build_inputs(config)
        check_vocabulary(tokenizer, hf.vocab_size, config)
        base = config.model.language_model.checkpoint
        [model] = build_models(config, hf, layout, modalities, lambda models: load_base(base, models))
        if checkpoint is not None:
            load_media_parts([model], checkpoint)
        model.eval().requires_grad_(False)
        return cls(config, layout, tokenizer, modalities, model)

    @torch.no_grad()
    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, batch_size: int = 64) -> list[str]:
        """Answer every prompt. Collective; every rank gets the answers.

        Raises:
            DataError, MediaError: a media item has no modality, or cannot be read.
        """
        progress = Progress("answering", len(prompts)) if self.layout.reports and len(prompts) > batch_size else None
        answers = [""] * len(prompts)
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            running = self._begin(batch, start)
            for done in self._run(running, sampling):
                answers[done.number] = self.tokenizer.decode(done.answer)
            if progress:
                progress.advance(len(batch))
        if progress:
            progress.finish()
        return answers

    def _begin(self, prompts: Sequence[Prompt], first: int) -> list[_Running]:
        running = []
        for number, prompt in enumerate(prompts, start=first):
            parts, pieces = self._read(prompt)
            soft = [len(tensor) * self._entries[name].soft_tokens_per_piece for name, tensor in pieces]
            placeholders = {name: entry.placeholder for name, entry in self._entries.items()}
            tokens = self.tokenizer.document(parts, soft, placeholders, closed=False).tokens
            running.append(_Running(number, tokens, len(tokens), self._encode(pieces)))
        return running

    def _read(self, prompt: Prompt) -> tuple[list[Part], list[tuple[str, Tensor]]]:
        """The parts with media named as in the configuration, and (name, pieces) of each media item."""
        files = iter(prompt.media)
        parts: list[Part] = []
        pieces = []
        for part in prompt.parts:
            if isinstance(part, MediaPart):
                file = next(files)
                kind = part.modality or kind_for_extension(file.extension, self._names)
                if kind not in self._names:
                    known = ", ".join(sorted(self._names)) or "none"
                    raise DataError(f"{part.media!r}: the checkpoint has no modality {kind!r}; it has: {known}.")
                name = self._names[kind]
                pieces.append((name, self.modalities[name].load(file.data, file.extension, part.attributes)))
                part = MediaPart(part.media, name, part.attributes)
            parts.append(part)
        return parts, pieces

    def _encode(self, pieces: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Soft tokens of one prompt's media by modality."""
        if not self.layout.is_first_stage:
            return {}
        media = {}
        for name in dict.fromkeys(name for name, _ in pieces):
            together = torch.cat([tensor for other, tensor in pieces if other == name])
            media[name] = MediaBatch(together, ((len(together),),), torch.empty(0, dtype=torch.int64))
        return self.model.soft_tokens(to_device(_micro_batch([], media), self.layout.device))

    def _run(self, running: list[_Running], sampling: Sampling) -> Iterator[_Running]:
        """Add tokens until every prompt is answered; prompts come out as they end."""
        for place in range(sampling.max_new_tokens):
            if not running:
                return
            chosen = self._next_tokens(running, sampling, place)
            still = []
            for one, token in zip(running, chosen):
                if token in self._ends:
                    yield one
                else:
                    one.tokens.append(token)
                    still.append(one)
            running = still
        yield from running

    def _next_tokens(self, running: Sequence[_Running], sampling: Sampling, place: int) -> list[int]:
        micro_batch = to_device(self._batch(running), self.layout.device)
        # Later stages get their input from the one before.
        names = list(micro_batch.media) if self.layout.is_first_stage else []
        soft = {name: torch.cat([one.soft[name] for one in running if name in one.soft]) for name in names}
        lasts = torch.tensor([len(one.tokens) for one in running], device=self.layout.device).cumsum(0) - 1

        def forward_step(batches: Iterator[MicroBatch], model: AnyMALModel) -> tuple[Tensor, Any]:
            return model(next(batches), soft=soft), lambda logits, non_loss_data: logits[0, lasts]

        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([micro_batch]),
            model=self.model,
            num_microbatches=1,
            seq_length=micro_batch.tokens.size(1),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        chosen = torch.zeros(len(running), dtype=torch.int64, device=self.layout.device)
        if self.layout.is_last_stage:
            logits = gather_from_tensor_model_parallel_region(outputs[0].float())[:, : self._vocab_size]
            # A placeholder stands for a medium: as an answer it would be one without content.
            logits[:, [entry.placeholder for entry in self._entries.values()]] = float("-inf")
            chosen = torch.stack([_choose(row, sampling, one.number, place) for row, one in zip(logits, running)])
        last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(chosen, src=last_stage, group=parallel_state.get_pipeline_model_parallel_group())
        return chosen.tolist()

    def _batch(self, running: Sequence[_Running]) -> MicroBatch:
        """The prompts and answers so far, and what sequence parallelism needs to divide them."""
        documents = [one.tokens for one in running]
        if missing := -sum(map(len, documents)) % self._length_multiple:
            documents.append([self.tokenizer.end] * missing)
        return _micro_batch(documents, self._media(running))

    def _media(self, running: Sequence[_Running]) -> dict[str, MediaBatch]:
        """Where the soft tokens go; the pieces are encoded already."""
        tokens = torch.tensor([token for one in running for token in one.tokens])
        media = {}
        for name, entry in self._entries.items():
            index = (tokens == entry.placeholder).nonzero().flatten()
            if len(index):
                media[name] = MediaBatch(torch.empty(0), ((0,),), index)
        return media


def _micro_batch(documents: Sequence[Sequence[int]], media: dict[str, MediaBatch]) -> MicroBatch:
    """Documents end to end, without labels."""
    tokens = torch.tensor([[token for document in documents for token in document]], dtype=torch.int64)
    nothing = torch.zeros_like(tokens)
    return MicroBatch(
        plan=PlannedMicroBatch(0, tokens.size(1), ()),
        document_lengths=tuple(len(document) for document in documents),
        tokens=tokens,
        labels=nothing,
        loss_mask=nothing.float(),
        sample_positions=nothing - 1,
        media=media,
        bad={},
    )


def _choose(logits: Tensor, sampling: Sampling, prompt: int, place: int) -> Tensor:
    """The next token from [V] logits; the same on every rank and in any batch."""
    if sampling.temperature == 0.0:
        return logits.argmax()
    probabilities, order = (logits.double().cpu() / sampling.temperature).softmax(0).sort(descending=True)
    kept = probabilities.cumsum(0) - probabilities < sampling.top_p
    generator = torch.Generator().manual_seed(mix64(sampling.seed, prompt, place) >> 1)
    return order[torch.multinomial(probabilities * kept, 1, generator=generator)][0].to(logits.device)


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """What every verb that loads a checkpoint takes."""
    parser.add_argument("--checkpoint", required=True, help="a checkpoint's folder, or its run's folder")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=0, help="default: all processes")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)


def load_generator(arguments: argparse.Namespace, *, untrained: bool = False) -> Generator:
    """The model of `--checkpoint` under the layout of the command line.

    Raises:
        CheckpointError, ConfigError: no such checkpoint, or a layout that does not fit it.
    """
    folder = store.resolve(arguments.checkpoint)
    config = from_dict(store.read_manifest(folder, verify=True).config)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    stages = arguments.pipeline_model_parallel_size
    config.trainer.num_nodes, config.trainer.devices = 1, world
    config.model.pipeline_model_parallel_size = stages
    config.model.tensor_model_parallel_size = arguments.tensor_model_parallel_size or max(1, world // stages)
    config.model.sequence_parallel = False
    config.model.num_layers_in_first_pipeline_stage = config.model.num_layers_in_last_pipeline_stage = 0
    config.model.context_parallel_size = config.model.virtual_pipeline_model_parallel_size = 1
    if config.model.tensor_model_parallel_size * stages != world:
        raise DataError(
            f"{world} process(es) were started, but the tensor- and pipeline-parallel sizes make "
            f"{config.model.tensor_model_parallel_size * stages}. Their product must be the number of processes."
        )
    return Generator.of_checkpoint(config, initialize(config), None if untrained else folder)


def main(argv: Sequence[str]) -> int:
    """The verb. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="anymal generate", description=__doc__)
    add_checkpoint_arguments(parser)
    parser.add_argument("--media", action="append", default=[], help="a media file before the text; may be repeated")
    parser.add_argument("--modality", action="append", default=[], help="the kind of each --media, where unclear")
    parser.add_argument("--rate", type=float, help="samples a second of the --media that do not tell (IMU)")
    parser.add_argument("--text", default="", help="the prompt's text")
    parser.add_argument("--prompts", help="a .jsonl with `parts` or `messages` a line, instead")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    prompts = read_prompts(arguments.prompts) if arguments.prompts else [_prompt_of(arguments)]
    generator = load_generator(arguments)
    sampling = Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)
    answers = generator.answer(prompts, sampling, arguments.batch_size)
    if generator.layout.reports:
        for answer in answers:
            print(answer.strip())
    return 0


def _prompt_of(arguments: argparse.Namespace) -> Prompt:
    if not arguments.text and not arguments.media:
        raise DataError("There is nothing to answer. Give --text, --media or --prompts.")
    if len(arguments.modality) > len(arguments.media):
        raise DataError("There are more --modality than --media. Give each --media at most one, in the same order.")
    attributes = {} if arguments.rate is None else {"rate": arguments.rate}
    kinds = arguments.modality + [""] * (len(arguments.media) - len(arguments.modality))
    parts: list[Part] = [MediaPart(path, kind, attributes) for path, kind in zip(arguments.media, kinds)]
    if arguments.text:
        parts.append(TextPart(arguments.text))
    return Prompt(parts, [read_media_file(Path(path)) for path in arguments.media])


def read_prompts(path: str) -> list[Prompt]:
    """Prompts from a .jsonl file; media paths are relative to it.

    Raises:
        DataError: the file or one of its lines cannot be used.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"There is no prompts file {path!r}.")
    prompts = []
    for where, value in read_lines(file):
        parts = _open_parts(value, where)
        media = [read_media_file(file.parent / part.media) for part in parts if isinstance(part, MediaPart)]
        prompts.append(Prompt(parts, media))
    return prompts


def _open_parts(value: dict[str, Any], where: str) -> list[Part]:
    if ("parts" in value) == ("messages" in value):
        raise DataError(f"{where}: a prompt has either `parts` or `messages`.")
    if "parts" in value:
        return parse_parts(value["parts"], where)
    messages = parse_messages(value["messages"], where)
    if messages[-1].role != "user":
        raise DataError(
            f"{where}: `messages` must end with the user turn to be answered; they end with the {messages[-1].role}'s."
        )
    return open_prompt(messages)


def read_media_file(path: Path) -> MediaFile:
    """A media file's bytes.

    Raises:
        DataError: there is no such file.
    """
    if not path.is_file():
        raise DataError(f"There is no media file {str(path)!r}.")
    return MediaFile(path.read_bytes(), path.suffix.lstrip(".").lower())
