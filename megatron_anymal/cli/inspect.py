"""`anymal inspect`: check prepared folders, and show samples as the model sees them.

Without a configuration only text lengths are known; with `--config-name` the check also counts the pieces and soft
tokens of that run's modalities and the samples that exceed its data.seq_length, and measures how well its packs are
filled. `--html` writes a page with the samples and packs of such a run instead.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence

from megatron_anymal.config.compose import compose, config_folder
from megatron_anymal.config.validation import check
from megatron_anymal.data.records import DataError

_OVERRIDE = re.compile(r"\+{0,2}\w[\w.]*=|~\w[\w.]*(=|$)")


def main(argv: Sequence[str]) -> int:
    """Run the verb and return the exit code: 1 if anything is bad."""
    arguments = _parser().parse_intermixed_args(argv)
    folders = [text for text in arguments.folders if not (arguments.config_name and _OVERRIDE.match(text))]
    overrides = [text for text in arguments.folders if text not in folders]
    config = None
    if arguments.config_name:
        folder = config_folder(arguments.config_path)
        config = compose(arguments.config_name, folder, overrides).config
        check(config)
    tokenizer = arguments.tokenizer or (config.data.tokenizer if config else "")
    if not tokenizer:
        raise DataError("--tokenizer is missing. Name the tokenizer's folder, or a run with --config-name.")
    if arguments.html:
        if folders or config is None:
            raise DataError(
                "--html shows the packs of a run: name it with --config-name, and no folder. Its datasets are those of "
                "data.train, which key=value overrides may change."
            )
        if config.model.multiplex:
            raise DataError(
                "--html shows the packs of one alignment, but the run has several (model.multiplex). Use a "
                "configuration that runs one of them alone, or leave --html out, which prints how packs are filled."
            )
        from megatron_anymal.cli.inspection_page import inspect_page

        return inspect_page(arguments, config)
    if arguments.samples is not None or arguments.step is not None:
        raise DataError("--samples and --step choose what --html shows. Add --html FILE, or leave them out.")
    if config and not folders:
        folders = list(dict.fromkeys(d.path for d in (*config.data.train.values(), *config.data.validation.values())))
    if not folders:
        raise DataError(
            "There is nothing to inspect. Name a folder created by `anymal prepare`, or a run with --config-name."
        )
    from megatron_anymal.cli.inspection import inspect

    return inspect(arguments, folders, tokenizer, config)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="anymal inspect", description=__doc__)
    parser.add_argument(
        "folders", nargs="*", metavar="FOLDER", help="prepared folders, then key=value overrides of the configuration"
    )
    parser.add_argument("--tokenizer", help="folder of the tokenizer that the index was built with")
    parser.add_argument(
        "--sample", action="append", default=[], metavar="KEY_OR_NUMBER", help="only show this sample; may be repeated"
    )
    parser.add_argument("--html", metavar="FILE", help="write a page with samples and packs of the run to this file")
    parser.add_argument(
        "--samples", type=int, help="with --html: number of samples to show, from the step's first (default: 8)"
    )
    parser.add_argument("--step", type=int, help="with --html: the step to show, counted from 1 (default: 1)")
    parser.add_argument("--limit", type=int, help="read only the first LIMIT samples of each folder")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that read and decode")
    parser.add_argument("--config-name", "-cn", help="the run whose modalities and lengths to use")
    parser.add_argument("--config-path", "-cp", help="configuration folder; default: the shipped nemo_configs")
    parser.add_argument("--plugin", action="append", default=[], help="a file that registers further modalities")
    return parser
