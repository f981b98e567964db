"""Chat templates against the renderer of transformers."""

from __future__ import annotations

import pytest
from tests.support.chat import CHATML, SPECIALS

from elbowroom.models.chat import ChatTemplate


def test_rendering_is_that_of_transformers() -> None:
    chat_utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="no reference implementation")
    source = CHATML + "{{ messages | tojson(indent=2) }}{% generation %} x {% endgeneration %}{{ tools is none }}"
    messages = [{"role": "user", "content": "<é & 'q'>"}, {"role": "assistant", "content": "Oh"}]
    expected = chat_utils.render_jinja_template(
        conversations=[messages], chat_template=source, add_generation_prompt=True, **SPECIALS
    )[0][0]
    assert ChatTemplate({"default": source}, SPECIALS).render(messages) == expected
