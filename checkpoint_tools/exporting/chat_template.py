"""Chat template of an export's tokenizer: Llama 3's format, as in training (data/chat_format.py).

A media item is rendered as its modality's placeholder once; the processor, which knows how many soft tokens an item
takes, repeats it. In training, a control token typed by a user is plain text, which a rendered string cannot express:
the template refuses such content, while the processor accepts it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from megatron_anymal.data.chat_format import END_HEADER, END_TURN, START_HEADER

_TEMPLATE = """\
{%- set placeholders = PLACEHOLDERS -%}
{%- set control = CONTROL -%}
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role not in ['system', 'user', 'assistant'] -%}
    {{- raise_exception('A message has the role ' ~ message.role ~ '; known roles are system, user and assistant.') -}}
  {%- endif -%}
  {%- set turn = namespace(text='', said='') -%}
  {%- if message.content is string -%}
    {%- set turn.text = message.content -%}
    {%- set turn.said = message.content -%}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if part.text is defined -%}
        {%- set turn.text = turn.text ~ part.text -%}
        {%- set turn.said = turn.said ~ part.text -%}
      {%- else -%}
        {%- set kind = part.type if part.type is defined and part.type != 'media' else part.modality -%}
        {%- if kind not in placeholders -%}
          {{- raise_exception('This model takes no ' ~ kind ~ '.') -}}
        {%- endif -%}
        {%- set turn.text = turn.text ~ placeholders[kind] -%}
        {%- set turn.said = turn.said ~ '\n' -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- for token in control -%}
    {%- if token in turn.said -%}
      {{- raise_exception('A message contains ' ~ token ~ ' as plain text, which only the processor supports.') -}}
    {%- endif -%}
  {%- endfor -%}
  {{- 'START' ~ message.role ~ 'END_HEADER\n\n' ~ turn.text | trim ~ 'END_TURN' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- 'STARTassistantEND_HEADER\n\n' -}}
{%- endif -%}
"""


def chat_template(placeholders: Mapping[str, str], control: Iterable[str]) -> str:
    """The Jinja template.

    Args:
        placeholders: kind of media -> its placeholder token.
        control: tokens that plain text never produces (`Tokenizer.control`).
    """
    return (
        _TEMPLATE.replace("START", START_HEADER)
        .replace("END_HEADER", END_HEADER)
        .replace("END_TURN", END_TURN)
        .replace("PLACEHOLDERS", json.dumps(dict(placeholders)))
        .replace("CONTROL", json.dumps(sorted(control)))
    )
