"""A chat template with the whitespace and special tokens that real ones rely on."""

CHATML = """{{ bos_token }}{% for message in messages %}
<|{{ message.role }}|>{{ message['content'] }}{{ eos_token }}
    {% if loop.first %}
!
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{%- endif %}"""
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
