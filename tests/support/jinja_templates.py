"""Chat templates in Jinja, small ones of each kind, with SmolLM2's end-of-turn token."""

from __future__ import annotations

TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT
TRIMMING = CHATML.replace("m['content']", "m['content'] | trim")
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTools:' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{{ '<|im_start|>assistant' }}"
    "{% for call in m.tool_calls %}{{ '\n<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% else %}" + TURN + "{% endif %}{% endfor %}" + PROMPT
)
NO_THOUGHTS = (
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
UNSEEN_THINKING = CHATML + NO_THOUGHTS
"""llama.cpp's server does not recognise it, and tells it not to think where nothing is said."""
THOUGHTS = (
    "{% if m.reasoning_content %}"
    "{{ '<|im_start|>assistant\n<think>\n' + m.reasoning_content + '\n</think>\n\n' + m.content + '<|im_end|>\n' }}"
    "{% else %}" + TURN + "{% endif %}"
)
THINKING = CHATML.replace(TURN, THOUGHTS) + NO_THOUGHTS
LATEST_THOUGHTS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m['content'] + '<|im_end|>\n' }}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + PROMPT
)
"""Only the last turn has a block, as Qwen 3 does it."""
DATED = "{{ '<|im_start|>system\n' + strftime_now('%Y-%m-%d') + '<|im_end|>\n' }}" + CHATML
GIVEN_DATE = "{{ '<|im_start|>system\n' + date_string + '<|im_end|>\n' }}" + CHATML
COMPUTED_DATE = (
    "{% set form = '%d %b %Y' %}{% macro day() %}{{ strftime_now('%A' ~ ' %j') }}{% endmacro %}"
    "{{ '<|im_start|>system\n' + strftime_now(form) }} {{ strftime_now(format=form, tz='UTC') }} "
    "{{ strftime_now('%Y-%m-%d', 'UTC') }} {{ day() }}{{ '<|im_end|>\n' }}" + CHATML
)
"""Calls whose formats are no literals, and that say more than a format."""
EVERY_TOOL = "{{ tools | length }}{% for tool in tools %}{{ tool.function.name }}{% endfor %}" + CHATML
"""Fails where tools is none, as Transformers has it."""
UNREADABLE = "{% for m in messages %}\n{{ m['content'] | }}{% endfor %}"
EVERYTHING = (
    "\n  {%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}\n"
    "  {{- '<|im_start|>system\n' + date_string + '<|im_end|>\n' }}"
    + TOOLS.replace(TURN, THOUGHTS.replace("m['content']", "m['content'] | trim"))
    + NO_THOUGHTS
)
"""A date, trimmed contents, tools and thinking, behind white space that is none of what is rendered."""
SMOLLM3_TOOLS = CHATML.replace("m['role']", "('user' if m['role'] == 'tool' else m['role'])")
"""Renders what tools answer, in no words that Ollama's server takes for knowing tools."""
