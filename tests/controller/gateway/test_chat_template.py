from collections.abc import Sequence
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from controller.errors import InvalidRequest
from controller.gateway.chat_template import ChatTemplate

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CONVERSATION = [
    {"role": "system", "content": "Be <b>brief</b> & kind."},
    {"role": "user", "content": "  hé\n"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "and?"},
]
TEMPLATES = {
    "llama2-like": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
    {% set offset = 1 %}
{% else %}
    {% set offset = 0 %}
{% endif %}
{% for message in messages[offset:] %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate') }}
    {% endif %}
    {%- if message['role'] == 'user' %}
        {{ '[INST] ' + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {{ ' ' + message['content'] | trim + ' ' + eos_token }}
    {%- endif %}
{% endfor %}""",
    "generation-block": """{%- for message in messages %}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{%- else %}<|{{ message.role }}|>{{ message.content }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}""",
    "loop-controls": """{% for message in messages %}{% if loop.first %}{% continue %}{% endif %}
{{ message | tojson }}{% if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}{{ messages | tojson(indent=2) }}""",
    "namespace": """{% set ns = namespace(found=false, text='') %}{% for message in messages %}
{%- if message.role == 'system' %}{% set ns.found = true %}{% set ns.text = message.content %}{% endif %}
{%- endfor %}{{ ns.text if ns.found else 'none' }}{% if tools is not none %}TOOLS{% endif %}""",
}


def template(source: str) -> ChatTemplate:
    return ChatTemplate(
        source, special_tokens=TOKENS, strftime_now=lambda pattern: f"now {pattern}"
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_equals_the_reference_renderers(name: str) -> None:
    render: Any = render_jinja_template
    (rendered,), _ = render(
        [CONVERSATION], chat_template=TEMPLATES[name], add_generation_prompt=True, **TOKENS
    )
    assert template(TEMPLATES[name]).render(CONVERSATION) == rendered


def test_refusal_carries_the_templates_words() -> None:
    messages: Sequence[dict[str, str]] = [CONVERSATION[2]]
    with pytest.raises(InvalidRequest, match="Conversation roles must alternate"):
        template(TEMPLATES["llama2-like"]).render(messages)


def test_date_is_the_controllers() -> None:
    assert template("{{ strftime_now('%Y') }}").render([]) == "now %Y"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ undefined_name.field }}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'] + 1 }}",
    ],
)
def test_whatever_a_template_does_is_the_clients_error_and_not_ours(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template refuses"):
        template(source).render(CONVERSATION)


def test_broken_template_is_found_when_it_is_opened() -> None:
    with pytest.raises(jinja2.TemplateSyntaxError):
        template("{% if %}")
