"""The chat template of an export's tokenizer: Llama 3's format, as training laid conversations out (data/messages.py).

It serves text; a media item becomes its modality's placeholder once. The processor, which knows how many soft tokens an
item takes, lays conversations with media out itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from megatron_anymal.data.messages import END_HEADER, END_TURN, START_HEADER

_TEMPLATE = """\
{%- set placeholders = PLACEHOLDERS -%}
{{- bos_token -}}
{%- for message in messages -%}
  {%- set turn = namespace(text='') -%}
  {%- if message.content is string -%}
    {%- set turn.text = message.content -%}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if part.text is defined -%}
        {%- set turn.text = turn.text ~ part.text -%}
      {%- else -%}
        {%- set kind = part.type if part.type is defined and part.type != 'media' else part.modality -%}
        {%- if kind not in placeholders -%}
          {{- raise_exception('This model takes no ' ~ kind ~ '.') -}}
        {%- endif -%}
        {%- set turn.text = turn.text ~ placeholders[kind] -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- 'START' ~ message.role ~ 'END_HEADER\n\n' ~ turn.text | trim ~ 'END_TURN' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- 'STARTassistantEND_HEADER\n\n' -}}
{%- endif -%}
"""


def chat_template(placeholders: Mapping[str, str]) -> str:
    """The Jinja template.

    Args:
        placeholders: kind of media -> its placeholder token.
    """
    return (
        _TEMPLATE.replace("PLACEHOLDERS", json.dumps(dict(placeholders)))
        .replace("START", START_HEADER)
        .replace("END_HEADER", END_HEADER)
        .replace("END_TURN", END_TURN)
    )
