"""Chat templates against the renderer of transformers."""

from __future__ import annotations

import pytest

from elbowroom.models.chat import ChatTemplate

CHATML = """{{ bos_token }}{% for message in messages %}
<|{{ message.role }}|>{{ message['content'] }}{{ eos_token }}
    {% if loop.first %}
!
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{%- endif %}"""


def test_rendering_is_that_of_transformers() -> None:
    chat_utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="no reference implementation")
    source = CHATML + "{{ messages | tojson(indent=2) }}{% generation %} x {% endgeneration %}{{ tools is none }}"
    messages = [{"role": "user", "content": "<é & 'q'>"}, {"role": "assistant", "content": "Oh"}]
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    expected = chat_utils.render_jinja_template(
        conversations=[messages], chat_template=source, add_generation_prompt=True, **specials
    )[0][0]
    assert ChatTemplate({"default": source}, specials).render(messages) == expected
