"""`anymal generate`: answer prompts with a training checkpoint or an exported folder."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from megatron_anymal.cli.code_arguments import (
    ItemOutput,
    add_code_arguments,
    add_item_arguments,
    warn_of_length,
    with_codes,
)
from megatron_anymal.cli.integrity_arguments import (
    add_integrity_argument,
    integrity_of,
    load_checked_generator,
    report_overhead,
)
from megatron_anymal.cli.model_arguments import (
    add_model_arguments,
    add_sampling_arguments,
    discrete_of,
    kinds_of,
    sampling_of,
)
from megatron_anymal.config import ConfigError

if TYPE_CHECKING:
    from megatron_anymal.generation.answers import Reply
    from megatron_anymal.generation.generator import Generator
    from megatron_anymal.generation.prompts import Prompt
    from megatron_anymal.generation.sampling import Sampling


def main(argv: Sequence[str]) -> int:
    """Run the verb and return the exit code."""
    arguments = _parser().parse_args(argv)
    sampling = sampling_of(arguments)
    _check(arguments)
    integrity = integrity_of(arguments)
    prompts = [] if arguments.interactive else _prompts(arguments)
    if arguments.stream and len(prompts) > 1:
        raise ConfigError(f"--stream shows one answer, but {arguments.prompts!r} has {len(prompts)} prompts.")
    sections = discrete_of(arguments)
    output, sampling = ItemOutput(arguments, sections), with_codes(sampling, arguments, sections)
    if prompts:
        _check_media(prompts, kinds_of(arguments), output.encodes)
    warn_of_length(sampling, sections)
    generator = load_checked_generator(arguments, integrity)
    if generator.grammar:
        output.open(generator.grammar.layout.sections)
    if arguments.interactive:
        from megatron_anymal.generation.chat import Chat

        code = Chat(generator, sampling, _read_line, media=output).run()
        report_overhead(generator, integrity)
        return code
    prompts = [output.encoded(prompt) for prompt in prompts]
    if arguments.out:
        _write(generator, prompts, sampling, arguments.batch_size, Path(arguments.out), output)
    else:
        _print(generator, prompts, sampling, arguments, output)
    report_overhead(generator, integrity)
    return 0


def _print(
    generator: Generator,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    arguments: argparse.Namespace,
    output: ItemOutput,
) -> None:
    """Print the answers, and what became of the media in them."""
    from megatron_anymal.generation.answers import Stream
    from megatron_anymal.generation.chat import show

    # With integrity checks, all ranks must stream: the checks are collective.
    watched = arguments.stream and (generator.reports or arguments.integrity)
    stream = Stream(show if generator.reports else _hide) if watched else None
    replies = generator.replies(prompts, sampling, arguments.batch_size, stream)
    if not generator.reports:
        return
    if stream:
        print("".join(f"\n{rejection.text}" for rejection in generator.rejections.values()))
    for number, reply in enumerate(replies):
        lines = output.lines(str(number), reply)
        print("\n".join(lines if stream else [reply.text.strip(), *lines]), end="\n" if lines or not stream else "")


def _hide(text: str) -> None:
    """Show nothing, on processes that do not print."""


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    from megatron_anymal.generation.prompts import prompt_of_files, read_prompts

    if arguments.prompts:
        return read_prompts(arguments.prompts)
    return [prompt_of_files(arguments.media, arguments.modality, arguments.rate, arguments.text, chat=arguments.chat)]


def _check_media(prompts: Sequence[Prompt], kinds: Optional[Mapping[str, str]], encoded: Collection[str]) -> None:
    """Check that the model reads the media of the prompts, before it is loaded.

    Args:
        encoded: modalities that become codes; files of codes are checked when they are read.
    """
    from megatron_anymal.data.prompt_encoder import modality_of
    from megatron_anymal.data.records import CodesPart, MediaPart
    from megatron_anymal.modalities import MODALITIES, MediaError

    if kinds is None or not kinds.keys() <= MODALITIES.keys():
        # The extensions of a plug-in's kinds are known only after its import.
        return
    for prompt in prompts:
        for part, file in zip([part for part in prompt.parts if isinstance(part, MediaPart)], prompt.media):
            if isinstance(part, CodesPart) or part.modality in encoded:
                continue
            try:
                modality_of(part, file, kinds)
            except MediaError as error:
                raise MediaError(f"{part.media!r}: {error}.") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="anymal generate", description=__doc__)
    parser.add_argument("--text", default="", help="the prompt's text")
    parser.add_argument("--media", action="append", default=[], help="a media file before the text; may be repeated")
    parser.add_argument(
        "--modality", action="append", default=[], help="the kind of each --media, if its name is ambiguous"
    )
    parser.add_argument("--rate", type=float, help="samples per second of --media that do not specify it (IMU)")
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user turn of a conversation")
    parser.add_argument("--prompts", help="read prompts from this .jsonl file: `parts` or `messages` on each line")
    parser.add_argument("--out", help="with --prompts: write prompt numbers (from 0) and answers to this .jsonl file")
    parser.add_argument("--stream", action="store_true", help="print the answer while it is generated")
    parser.add_argument("--interactive", action="store_true", help="chat with the model; /help lists the commands")
    add_integrity_argument(parser)
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    add_code_arguments(parser)
    add_item_arguments(parser)
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Reject arguments that would have no effect."""
    single_prompt = {
        "--text": arguments.text,
        "--media": arguments.media,
        "--modality": arguments.modality,
        "--rate": arguments.rate is not None,
        "--chat": arguments.chat,
    }
    if arguments.interactive:
        others = {**single_prompt, "--prompts": arguments.prompts, "--out": arguments.out, "--stream": arguments.stream}
        if given := [name for name, value in others.items() if value]:
            raise ConfigError(f"{given[0]}: --interactive reads text and media from standard input. Remove it.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("--interactive needs one process, which reads standard input. Start it without torchrun.")
    if arguments.prompts and (given := [name for name, value in single_prompt.items() if value]):
        raise ConfigError(f"{given[0]}: the prompts come from {arguments.prompts!r}. Remove one of them.")
    if arguments.out and not arguments.prompts:
        raise ConfigError("--out is for the answers to --prompts, which is missing.")
    if arguments.out and not Path(arguments.out).absolute().parent.is_dir():
        raise ConfigError(f"--out {arguments.out!r}: its folder is missing. Create it, or name another.")
    if arguments.out and arguments.stream:
        raise ConfigError("--stream prints the answer, --out writes it. Remove one of them.")


def _write(
    generator: Generator,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    batch_size: int,
    path: Path,
    output: ItemOutput,
) -> None:
    """Write answers to a .jsonl file, batch by batch."""
    file = path.open("w", encoding="utf-8") if generator.reports else None
    number = 0
    for batch in generator.batches(prompts, sampling, batch_size):
        for reply in batch:
            if file:
                file.write(json.dumps(_row(generator, number, reply, output), ensure_ascii=False) + "\n")
            number += 1
        if file:
            file.flush()
    if file:
        file.close()


def _row(generator: Generator, number: int, reply: Reply, output: ItemOutput) -> dict[str, Any]:
    """The line of an answer in --out."""
    row: dict[str, Any] = {"prompt": number, "answer": reply.text.strip()}
    if reply.items:
        row["parts"] = output.parts(str(number), reply)
    if rejection := generator.rejections.get(number):
        row["rejected"] = rejection.to_dict()
    return row


def _read_line(shown: str) -> str:
    """Read a line of standard input; on a terminal, `shown` is printed before it."""
    if not sys.stdin.isatty():
        return input()
    # Enables arrow keys and history.
    import readline  # noqa: F401

    return input(shown)
