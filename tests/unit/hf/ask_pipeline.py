"""Run transformers' own pipeline on an exported folder and print JSON: `python -I ask_pipeline.py FOLDER IMAGE TOKENS`.

The output holds the transformers version, the answers for each way to pass the picture and the question, and the same
for plain text. Any FutureWarning is an error.
"""

from __future__ import annotations

import base64
import json
import sys
import warnings
from pathlib import Path
from typing import Any


def main(folder: str, image: str, tokens: str) -> None:
    """Ask in every way and print the answers."""
    import transformers
    from PIL import Image

    # A FutureWarning announces a change that would break the folder with a later version.
    warnings.filterwarnings("error", category=FutureWarning)
    ask: Any = transformers.pipeline("image-text-to-text", model=folder, trust_remote_code=True, dtype="float32")
    picture = Image.open(image).convert("RGB")
    encoded = base64.b64encode(Path(image).read_bytes()).decode()
    processor = ask.processor

    def turn(*items: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [*items, {"type": "text", "text": "what is this"}]}]

    def new(output: Any) -> str:
        return str(output["generated_text"]).strip()

    settings: dict[str, Any] = {"generate_kwargs": {"max_new_tokens": int(tokens)}, "return_full_text": False}
    chats = {
        "chat, picture": turn({"type": "image", "image": picture}),
        "chat, path": turn({"type": "image", "path": image}),
        "chat, url": turn({"type": "image", "url": image}),
        "chat, inline": turn({"type": "image", "url": "data:image/png;base64," + encoded}),
    }
    answers = {name: new(ask(text=chat, **settings)[0]) for name, chat in chats.items()}
    rendered = processor.apply_chat_template(turn({"type": "image"}), tokenize=False, add_generation_prompt=True)
    answers["rendered, picture"] = new(ask(images=picture, text=rendered, **settings)[0])
    answers["rendered, path"] = new(ask(images=image, text=rendered, **settings)[0])
    both = ask(images=[[picture], [picture]], text=[rendered, rendered], **settings)
    answers |= {f"rendered, batch {number}": new(output) for number, output in enumerate(both)}
    several = ask(text=[chats["chat, picture"], chats["chat, path"]], **settings)
    answers |= {f"chats {number}": new(output[0]) for number, output in enumerate(several)}
    plain = {"plain, picture": picture, "plain, path": image}
    plain = {name: new(ask(images=given, text="what is this", **settings)[0]) for name, given in plain.items()}
    full = ask(text=chats["chat, path"], generate_kwargs=settings["generate_kwargs"])[0]["generated_text"]
    inputs = processor(text="what is this", images=picture)
    model = ask.model
    answers_of = processor.answers(model.generate(**inputs, max_new_tokens=int(tokens)), inputs)
    assert full[-1]["role"] == "assistant"
    answers["chat, whole"] = full[-1]["content"].strip()
    plain["generate"] = answers_of[0]
    print(json.dumps({"version": transformers.__version__, "answers": answers, "plain": plain}))


if __name__ == "__main__":
    main(*sys.argv[1:])
