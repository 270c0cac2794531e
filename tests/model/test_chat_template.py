"""Chat templates: the idioms of published models, every place a template can be, and what the sandbox refuses."""

import json
from datetime import datetime

import pytest

from unisparse_np import CheckpointError, InvalidInput
from unisparse_np.model.chat_template import ChatTemplate, find_chat_template

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<tool>"]}
USER = {"role": "user", "content": "Why is the sky blue?"}
SYSTEM = {"role": "system", "content": "Answer in one word."}


def _render(source, *messages):
    return ChatTemplate(source, "chat_template.jinja").render(messages or [USER], TOKENS)


# ---- idioms ----
HEADERS_AND_DATE = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "1 Jan 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set instruction = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set instruction = "" %}
{%- endif %}
{{- "<head>system</head>\\n\\nToday: " + date_string + "\\n" }}
{%- if tools is not none %}{{ "Tools." }}{% endif %}
{{- instruction + "<eot>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}{{- raise_exception("no tools here") }}{%- endif %}
    {{- '<head>' + message['role'] + '</head>\\n\\n' + message['content'] | trim + '<eot>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<head>assistant</head>\\n\\n' }}
{%- endif %}
"""

DEFAULT_SYSTEM = """{%- if messages[0]['role'] == 'system' %}
    {{- '<im>system\\n' + messages[0]['content'] + '</im>\\n' }}
{%- else %}
    {{- '<im>system\\nYou are a helpful assistant.</im>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or message.role == "assistant" %}
        {{- '<im>' + message.role + '\\n' + message.content + '</im>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<im>assistant\\n' }}
{%- endif %}"""

ONE_LINE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<im>system\nYou are small.</im>\n' }}{% endif %}"
    "{{'<im>' + message['role'] + '\n' + message['content'] + '</im>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<im>assistant\n' }}{% endif %}"
)

ALTERNATING = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate: user, assistant, user, ...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}"""


def test_headers_bos_and_date():
    today = datetime.now().strftime("%d %b %Y")
    question = "<head>user</head>\n\nWhy is the sky blue?<eot><head>assistant</head>\n\n"
    assert _render(HEADERS_AND_DATE) == f"<s><head>system</head>\n\nToday: {today}\n<eot>{question}"
    assert _render(HEADERS_AND_DATE, SYSTEM, USER) == f"<s><head>system</head>\n\nToday: {today}\nAnswer in one word.<eot>{question}"


def test_default_system_message():
    question = "<im>user\nWhy is the sky blue?</im>\n<im>assistant\n"
    assert _render(DEFAULT_SYSTEM) == "<im>system\nYou are a helpful assistant.</im>\n" + question
    assert _render(DEFAULT_SYSTEM, SYSTEM, USER) == "<im>system\nAnswer in one word.</im>\n" + question
    assert _render(ONE_LINE) == "<im>system\nYou are small.</im>\n" + question
    assert _render(ONE_LINE, SYSTEM, USER) == "<im>system\nAnswer in one word.</im>\n" + question


def test_alternation_and_its_refusal():
    assert _render(ALTERNATING, SYSTEM, USER) == "<s>[INST] Answer in one word.\n\nWhy is the sky blue? [/INST]"
    answered = [USER, {"role": "assistant", "content": "Scattering."}, USER]
    assert _render(ALTERNATING, *answered) == f"<s>[INST] {USER['content']} [/INST] Scattering.</s>[INST] {USER['content']} [/INST]"
    with pytest.raises(InvalidInput, match=r"refuses this conversation \(roles must alternate.*leave out --system"):
        _render(ALTERNATING, USER, USER)


def test_block_lines_leave_no_white_space():
    assert _render("{% if true %}\n  a\n    {% endif %}\nb") == "  a\nb"


def test_loop_controls():
    source = "{% for c in 'abcdef' %}{% if c == 'b' %}{% continue %}{% endif %}{% if c == 'd' %}{% break %}{% endif %}{{ c }}{% endfor %}"
    assert _render(source) == "ac"


def test_generation_blocks_are_printed():
    source = "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}"
    assert _render(source) == "Why is the sky blue?</s>"


def test_tojson_does_not_escape():
    assert _render("{{ messages | tojson }}", {"role": "user", "content": "<b> & 'é'"}) == """[{"role": "user", "content": "<b> & 'é'"}]"""
    assert _render("{{ {'b': 1, 'a': [2]} | tojson(indent=2, sort_keys=true) }}") == json.dumps({"a": [2], "b": 1}, indent=2)


def test_variables():
    assert _render("{{ additional_special_tokens[0] }}{{ tools is none }}{{ pad_token is defined }}") == "<tool>TrueFalse"


# ---- the sandbox ----
@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__.keys() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(content='x') }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_escapes_are_refused(source):
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja fails with \w+") as caught:
        _render(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ messages[9].content }}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"]
)
def test_broken_templates_are_one_sentence(source):
    with pytest.raises(CheckpointError, match="mend it, or use --raw") as caught:
        _render(source)
    assert "\n" not in str(caught.value)


# ---- where a template can be ----
def test_places_and_their_order(tmp_path):
    assert find_chat_template(tmp_path, {}) is None
    assert find_chat_template(tmp_path, {"chat_template": None}) is None
    assert find_chat_template(tmp_path, {"chat_template": "from settings"}).source == "from settings"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "from json"}')
    assert find_chat_template(tmp_path, {"chat_template": "from settings"}).source == "from json"
    (tmp_path / "chat_template.jinja").write_text("from jinja é", encoding="utf-8")
    found = find_chat_template(tmp_path, {"chat_template": "from settings"})
    assert found.source == "from jinja é"
    assert found.origin.endswith("chat_template.jinja")


@pytest.mark.parametrize(
    "named",
    [
        [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}],
        {"tool_use": "tools", "default": "plain"},
    ],
)
def test_named_templates(tmp_path, named):
    assert find_chat_template(tmp_path, {"chat_template": named}).source == "plain"
