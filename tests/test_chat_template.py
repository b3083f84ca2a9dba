"""Chat templates: the prompts of each generation, and what templates may and may not do.

The templates are written here. They use what those of the checkpoints use, and must give the
prompts that are known of these. Tokens are compared with the tokenizers library's.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from pyllama_dist.errors import FileError, PyllamaError, UsageError
from pyllama_dist.text.chat_template import ChatTemplate
from pyllama_dist.text.special import MARK
from pyllama_dist.text.tokenizer import Tokenizer

SPECIAL = ["<|endoftext|>", "[MASK]", "[gMASK]", "<sop>", "<|im_start|>", "<|im_end|>"] + [
    f"<|{role}|>" for role in ("system", "user", "assistant", "observation")
]
PLAIN = ["/nothink", "<think>", "</think>"] + [
    f"<{slash}{name}>"
    for name in ("tool_call", "tool_response", "arg_key", "arg_value")
    for slash in ("", "/")
]

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=MARK))
hostile = st.lists(
    st.one_of(st.sampled_from(SPECIAL + PLAIN + ["<|", "user", "|>", "<", " ", "\n"]), text)
).map("".join)


@pytest.fixture(scope="module")
def library() -> Library:
    """A token for each byte, and GLM-4.5's special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: token for token, char in enumerate(alphabet)}
    library = Library(models.BPE(vocab=vocab, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_tokens([AddedToken(word, special=True) for word in SPECIAL])
    library.add_tokens([AddedToken(word, normalized=False) for word in PLAIN])
    return library


@pytest.fixture(scope="module")
def tokenizer(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    library.save(str(directory / "tokenizer.json"))
    return Tokenizer.open(directory)


CHATGLM3 = """{% for message in messages %}
{{ '[gMASK]sop' if loop.first }}
{{- '<|' + message['role'] + '|>\\n ' + message['content'] }}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}
"""
EDGE = """{% for item in messages %}
{{- '<|' ~ item['role'] ~ '|>\\n' ~ item['content'] }}
{%- endfor %}
{% if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}
"""
GLM4 = """[gMASK]<sop>
{%- if tools is defined and tools %}
<|system|>
Tools: {{ tools | length }}
    {%- for tool in tools %}
        {%- set tool = tool.function if tool.function else tool %}

        {{- '\\n\\n## ' ~ tool.name }}

{{ tool | tojson(indent=1, ensure_ascii=True) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '<|assistant|>' ~ call.function.name }}
{{ call.function.arguments | tojson(ensure_ascii=False) }}
        {%- endfor %}
        {%- continue %}
    {%- endif %}
<|{{ message.role }}|>
{% generation %}{{ message.content }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}
"""
Z1 = """[gMASK]<sop>
{%- if messages[0].role == 'system' %}
<|system|>
{{ messages[0].content.strip() }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
    {%- set said = m.content %}
    {%- if m.role == 'assistant' and '</think>' in said %}
        {%- set said = said.split('</think>')[-1].strip() %}
    {%- endif %}
<|{{ m.role }}|>
{{ said }}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
<think>
{%- endif %}"""
GLM45 = """[gMASK]<sop>
{%- if tools %}
<|system|>
# Tools

What you may call:
<tools>
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
</tools>
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- macro shown(content) %}
    {%- if content is string %}
        {{- content }}
    {%- elif content is iterable and content is not mapping %}
        {%- for part in content %}
            {{- part.text if part is mapping and part.type == 'text' else '' }}
        {%- endfor %}
    {%- else %}
        {{- content }}
    {%- endif %}
{%- endmacro %}
{%- set off = enable_thinking is defined and not enable_thinking %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|user|>\\n' ~ shown(m.content) }}
        {{- '/nothink' if off and not shown(m.content).endswith('/nothink') else '' }}
    {%- elif m.role == 'system' %}
        {{- '<|system|>\\n' ~ shown(m.content) }}
    {%- elif m.role == 'tool' %}
        {{- '<|observation|>' if loop.first or messages[loop.index0 - 1].role != 'tool' }}
        {{- '\\n<tool_response>\\n' ~ shown(m.content) ~ '\\n</tool_response>' }}
    {%- elif m.role == 'assistant' %}
        {%- set answer, thought = shown(m.content), '' %}
        {%- if m.reasoning_content is string %}
            {%- set thought = m.reasoning_content %}
        {%- elif '</think>' in answer %}
            {%- set thought = answer.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- set thought = thought.strip() if loop.index0 > ns.last else '' %}
        {{- '<|assistant|>\\n<think>' ~ thought ~ '</think>' }}
        {{- '\\n' ~ answer.strip() if answer.strip() }}
        {%- for call in m.tool_calls or [] %}
            {%- set call = call.function if call.function else call %}
            {{- '\\n<tool_call>' ~ call.name }}
            {%- for k, v in call.arguments.items() %}

<arg_key>{{ k }}</arg_key>
<arg_value>{{ v if v is string else v | tojson(ensure_ascii=False) }}</arg_value>
            {%- endfor %}
            {{- '\\n</tool_call>' }}
        {%- endfor %}
    {%- else %}
        {{- raise_exception('no such\\nrole: ' ~ m.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' ~ ('\\n<think></think>' if off else '') }}
{%- endif %}
"""
GLM47 = """[gMASK]<sop>
{%- for tool in tools or [] %}
    {{- ('<|system|>' if loop.first else '\\n') ~ tool.function | default(tool) | tojson }}
{%- endfor %}
{%- set ns = namespace(last=-1, results=false) %}
{%- for m in messages if m.role == 'user' %}
    {%- set ns.last = messages.index(m) %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set halves = (m.content or '').split('</think>') %}
        {%- set thought = m.reasoning_content or (halves[0].split('<think>')[-1]
            if halves | length > 1 else '') %}
        {%- set keep = loop.index0 > ns.last or (clear_thinking is defined and not clear_thinking)%}
        {{- '<|assistant|>' ~ ('<think>' ~ thought if keep and thought) ~ '</think>' }}
        {{- halves[-1].strip() }}
        {%- for call in m.tool_calls or [] %}
            {{- '<tool_call>' ~ call.function.name }}
            {%- for k, v in call.function.arguments | items %}
                {{- '<arg_key>' ~ k ~ '</arg_key><arg_value>' }}
                {{- v if v is string else v | tojson(ensure_ascii=False) }}
                {{- '</arg_value>' }}
            {%- endfor %}
            {{- '</tool_call>' }}
        {%- endfor %}
        {%- continue %}
    {%- elif m.role == 'tool' %}
        {{- '<|observation|>' if not loop.previtem or loop.previtem.role != 'tool' }}
        {{- '<tool_response>' ~ m.content ~ '</tool_response>' }}
        {%- continue %}
    {%- endif %}
    {{- '<|' ~ m.role ~ '|>' ~ m.content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
    {{- '</think>' if enable_thinking is defined and not enable_thinking else '<think>' }}
{%- endif %}
"""
CHATML = """{% for m in messages %}
{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>' }}
{% endfor %}
  {% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n<think>' -}}
{% endif %}
"""
ALL = {
    "chatglm3": CHATGLM3,
    "edge": EDGE,
    "glm4": GLM4,
    "z1": Z1,
    "glm4.5": GLM45,
    "glm4.7": GLM47,
    "chatml": CHATML,
}


def write_template(directory: Path, source: str, tokenizer: Tokenizer) -> ChatTemplate:
    (directory / "chat_template.jinja").write_text(source, encoding="utf-8")
    template = ChatTemplate.open(directory, tokenizer)
    assert template is not None
    return template


def said(*turns: tuple[str, object]) -> list[dict[str, object]]:
    return [{"role": role, "content": content} for role, content in turns]


HI = said(("user", "hi"))
HISTORY = said(("user", "hi"), ("assistant", "\n<think>zz</think>\nB"), ("user", "C"))
TOLD = said(("system", "S"), ("user", "hi"))
AS_FIELD: list[dict[str, object]] = [
    HI[0],
    {"role": "assistant", "content": "B", "reasoning_content": "zz"},
    HISTORY[2],
]
OFF = {"enable_thinking": False}
TOOL = {"type": "function", "function": {"name": "f", "description": "<b> & '天'"}}
ARGUMENTS = {"city": "<天>", "days": 2, "of": ["a"]}
CALLS: list[dict[str, object]] = [
    HI[0],
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "zz",
        "tool_calls": [
            {"id": "1", "function": {"name": "f", "arguments": json.dumps(ARGUMENTS)}},
            {"id": "2", "function": {"name": "g", "arguments": {}}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "r1"},
    {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "r2"}]},
]


@pytest.mark.parametrize(
    ("name", "messages", "settings", "prompt"),
    [
        ("chatglm3", HI, {}, "[gMASK]sop<|user|>\n hi<|assistant|>"),
        ("chatglm3", TOLD, {}, "[gMASK]sop<|system|>\n S<|user|>\n hi<|assistant|>"),
        ("edge", HI, {}, "<|user|>\nhi<|assistant|>"),
        ("glm4", HI, {}, "[gMASK]<sop><|user|>\nhi<|assistant|>"),
        (
            "glm4",
            [
                *HI,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": '{"k": "天"}'}}],
                },
                *said(("observation", "r")),
            ],
            {"tools": [TOOL]},
            '[gMASK]<sop><|system|>\nTools: 1\n\n## f\n\n{\n "name": "f",\n'
            ' "description": "<b> & \'\\u5929\'"\n}'
            '<|user|>\nhi<|assistant|>f\n{"k": "天"}<|observation|>\nr<|assistant|>',
        ),
        ("z1", HI, {}, "[gMASK]<sop><|user|>\nhi<|assistant|>\n<think>"),
        (
            "z1",
            [*said(("system", " S\n")), *HISTORY],
            {},
            "[gMASK]<sop><|system|>\nS<|user|>\nhi<|assistant|>\nB<|user|>\nC<|assistant|>\n<think>",
        ),
        ("z1", AS_FIELD, {"end": False}, "[gMASK]<sop><|user|>\nhi<|assistant|>\nB<|user|>\nC"),
        ("glm4.5", HI, {}, "[gMASK]<sop><|user|>\nhi<|assistant|>"),
        ("glm4.5", HI, {"enable_thinking": True}, "[gMASK]<sop><|user|>\nhi<|assistant|>"),
        (
            "glm4.5",
            HI,
            OFF,
            "[gMASK]<sop><|user|>\nhi/nothink<|assistant|>\n<think></think>",
        ),
        (
            "glm4.5",
            said(("system", "S"), ("user", [{"type": "text", "text": "hi"}])),
            {},
            "[gMASK]<sop><|system|>\nS<|user|>\nhi<|assistant|>",
        ),
        *(
            (
                "glm4.5",
                history,
                {},
                "[gMASK]<sop><|user|>\nhi<|assistant|>\n<think></think>\nB<|user|>\nC<|assistant|>",
            )
            for history in (HISTORY, AS_FIELD)
        ),
        (
            "glm4.5",
            CALLS,
            {"tools": [TOOL]},
            "[gMASK]<sop><|system|>\n# Tools\n\nWhat you may call:\n<tools>\n"
            '{"type": "function", "function": {"name": "f", "description": "<b> & \'天\'"}}\n'
            "</tools><|user|>\nhi<|assistant|>\n<think>zz</think>\n<tool_call>f\n"
            "<arg_key>city</arg_key>\n<arg_value><天></arg_value>\n"
            "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n"
            '<arg_key>of</arg_key>\n<arg_value>["a"]</arg_value>\n</tool_call>\n'
            "<tool_call>g\n</tool_call><|observation|>\n<tool_response>\nr1\n</tool_response>\n"
            "<tool_response>\nr2\n</tool_response><|assistant|>",
        ),
        ("glm4.7", HI, {}, "[gMASK]<sop><|user|>hi<|assistant|><think>"),
        ("glm4.7", TOLD, {}, "[gMASK]<sop><|system|>S<|user|>hi<|assistant|><think>"),
        ("glm4.7", HI, OFF, "[gMASK]<sop><|user|>hi<|assistant|></think>"),
        *(
            (
                "glm4.7",
                history,
                {"end": False} | kept,
                f"[gMASK]<sop><|user|>hi<|assistant|>{thought}</think>B<|user|>C",
            )
            for history in (HISTORY, AS_FIELD)
            for kept, thought in (({}, ""), ({"clear_thinking": False}, "<think>zz"))
        ),
        (
            "glm4.7",
            CALLS,
            {"tools": [TOOL]},
            '[gMASK]<sop><|system|>{"name": "f", "description": "<b> & \'天\'"}'
            "<|user|>hi<|assistant|><think>zz</think><tool_call>f"
            "<arg_key>city</arg_key><arg_value><天></arg_value>"
            "<arg_key>days</arg_key><arg_value>2</arg_value>"
            '<arg_key>of</arg_key><arg_value>["a"]</arg_value></tool_call>'
            "<tool_call>g</tool_call><|observation|><tool_response>r1</tool_response>"
            "<tool_response>r2</tool_response><|assistant|><think>",
        ),
        ("chatml", HI, {}, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>"),
    ],
)
def test_prompts(
    tokenizer: Tokenizer,
    library: Library,
    tmp_path: Path,
    name: str,
    messages: list[dict[str, object]],
    settings: dict[str, Any],
    prompt: str,
) -> None:
    template = write_template(tmp_path, ALL[name], tokenizer)
    variables = dict(settings)
    end, tools = variables.pop("end", True), variables.pop("tools", None)
    rendered = template.render(
        messages, add_generation_prompt=end, tools=tools, variables=variables
    )
    assert rendered.text == prompt
    assert (
        tokenizer.encode_template(rendered) == library.encode(prompt, add_special_tokens=False).ids
    )


@pytest.fixture(scope="module", params=ALL.values(), ids=ALL.keys())
def template(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> ChatTemplate:
    return write_template(tmp_path_factory.mktemp("chat"), request.param, tokenizer)


@given(words=hostile)
def test_special_strings_of_people_are_text(
    tokenizer: Tokenizer, template: ChatTemplate, words: str
) -> None:
    added = {token.id for text, token in tokenizer.added.items() if text != "/nothink"}

    def special_ids(content: str) -> list[int]:
        prompt = template.render(said(("system", content), ("user", content)))
        assert MARK not in prompt.text
        assert prompt.text.count(words.strip()) >= 2 or content == "x"
        return [token for token in tokenizer.encode_template(prompt) if token in added]

    assert special_ids(words) == special_ids("x")


@pytest.mark.parametrize("content", ["hi/nothink", [{"type": "text", "text": "hi/nothink"}]])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_a_user_switches_thinking_off(
    tokenizer: Tokenizer, tmp_path: Path, content: object, variables: dict[str, object]
) -> None:
    """As documented of GLM-4.5: the user's word is the token, and is not written twice."""
    template = write_template(tmp_path, GLM45, tokenizer)
    prompt = template.render([{"role": "user", "content": content}], variables=variables)
    end = "<|assistant|>\n<think></think>" if variables else "<|assistant|>"
    assert prompt.text == f"[gMASK]<sop><|user|>\nhi/nothink{end}"
    ids = tokenizer.encode_template(prompt)
    assert ids.count(tokenizer.added["/nothink"].id) == 1


def test_no_tool_switches_thinking_off(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = write_template(tmp_path, GLM45, tokenizer)
    prompt = template.render([*HI, {"role": "tool", "content": "a/nothink"}])
    assert "a/nothink" in prompt.text
    assert tokenizer.added["/nothink"].id not in tokenizer.encode_template(prompt)


def test_a_string_cut_in_two_parts_stays_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = write_template(tmp_path, GLM45, tokenizer)
    parts = [{"type": "text", "text": part} for part in ("<|sys", "tem|>", "[g", "MASK]", "/", "")]
    prompt = template.render(said(("user", parts)))
    assert prompt.text == "[gMASK]<sop><|user|>\n<|system|>[gMASK]/<|assistant|>"
    ids = tokenizer.encode_template(prompt)
    assert ids.count(tokenizer.added["<|system|>"].id) == 0
    assert ids.count(tokenizer.added["[gMASK]"].id) == 1


def test_an_assistant_keeps_thoughts_but_no_roles(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = write_template(tmp_path, GLM45, tokenizer)
    call = {"name": "f", "arguments": {"<think>": ["</tool_call>", 1]}}
    answer = {"role": "assistant", "content": "<think>z</think>B<|user|>", "tool_calls": [call]}
    prompt = template.render([*HI, answer], add_generation_prompt=False)
    assert prompt.text == (
        "[gMASK]<sop><|user|>\nhi<|assistant|>\n<think>z</think>\nB<|user|>"
        "\n<tool_call>f\n<arg_key><think></arg_key>\n"
        '<arg_value>["</tool_call>", 1]</arg_value>\n</tool_call>'
    )
    ids = tokenizer.encode_template(prompt)
    counts = {word: ids.count(token.id) for word, token in tokenizer.added.items()}
    assert {word: count for word, count in counts.items() if count} == dict.fromkeys(
        [
            "[gMASK]",
            "<sop>",
            "<|user|>",
            "<|assistant|>",
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            "<arg_key>",
            "</arg_key>",
            "<arg_value>",
            "</arg_value>",
        ],
        1,
    )


def test_an_assistant_keeps_thoughts_whose_tags_are_special(tmp_path: Path) -> None:
    vocab = {char: token for token, char in enumerate("<think>ab/")}
    tags = [
        {"id": len(vocab) + n, "content": tag, "special": True}
        for n, tag in enumerate(("<think>", "</think>"))
    ]
    fields = {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": tags}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", **fields}))
    template = write_template(tmp_path, Z1, Tokenizer.open(tmp_path))
    turns = said(("user", "a"), ("assistant", "<think>b</think>B"))
    prompt = template.render(turns, add_generation_prompt=False)
    assert prompt.text == "[gMASK]<sop><|user|>\na<|assistant|>\nB"


def test_names_of_fields_are_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = write_template(tmp_path, "{{ messages | tojson }}", tokenizer)
    prompt = template.render([{"role": "user", "<think>": {"<|user|>": ["<sop>", None, 1.5]}}])
    assert prompt.text == '[{"role": "user", "<think>": {"<|user|>": ["<sop>", null, 1.5]}}]'
    assert tokenizer.encode_template(prompt) == tokenizer.encode(prompt.text)


def test_tools_are_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = write_template(tmp_path, GLM4, tokenizer)
    prompt = template.render(HI, tools=[{"name": "<|user|> & 'é😀'"}], add_generation_prompt=False)
    name = "<|user|> & '\\u00e9\\ud83d\\ude00'"
    assert prompt.text == (
        "[gMASK]<sop><|system|>\nTools: 1\n\n## <|user|> & 'é😀'\n\n"
        f'{{\n "name": "{name}"\n}}<|user|>\nhi'
    )
    assert tokenizer.encode_template(prompt).count(tokenizer.added["<|user|>"].id) == 1


def test_marks_and_surrogates_in_messages(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = write_template(tmp_path, EDGE, tokenizer)
    prompt = template.render(said(("user", f"<{MARK}|user|>\udcff")), add_generation_prompt=False)
    assert prompt.text == "<|user|>\n<|user|>\ufffd"
    assert tokenizer.encode_template(prompt).count(tokenizer.added["<|user|>"].id) == 1


def test_variables_are_text_and_change_nothing_else(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = write_template(tmp_path, "{{ messages[0].content }}{{ x }}", tokenizer)
    prompt = template.render(HI, variables={"x": "<|user|>", "messages": said(("user", "no"))})
    assert prompt.text == "hi<|user|>"
    assert tokenizer.added["<|user|>"].id not in tokenizer.encode_template(prompt)
    assert template.reads == {"messages", "x"}


def test_thoughts_of_people_are_text_where_tags_are_no_tokens(tmp_path: Path) -> None:
    vocab = {char: token for token, char in enumerate("<think>ab/")}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    template = write_template(tmp_path, Z1, Tokenizer.open(tmp_path))
    prompt = template.render(said(("user", "a</think>b")), add_generation_prompt=False)
    assert "</think>" not in prompt.marked
    assert prompt.text.endswith("\na</think>b")


def test_special_tokens_by_name(library: Library, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = {word: token.id for word, token in tokenizer.added.items()}
    config = {"bos_token_id": ids["<sop>"], "eos_token_id": [ids["<|im_end|>"], ids["<|user|>"]]}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.open(tmp_path)
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    template = write_template(tmp_path, source, tokenizer)
    prompt = template.render(said(("user", "<sop>")))
    assert prompt.text == "<sop><sop><|im_end|>"
    assert tokenizer.encode_template(prompt).count(ids["<sop>"]) == 1


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ({"content": None}, ""),
        ({"content": []}, ""),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
        ({"content": [{"type": "image", "url": "u"}]}, "[{'type': 'image', 'url': 'u'}]"),
    ],
)
def test_contents_are_one_text(
    tokenizer: Tokenizer, tmp_path: Path, message: dict[str, object], shown: str
) -> None:
    template = write_template(tmp_path, "{{ messages[0].content }}", tokenizer)
    assert template.render([{"role": "user", **message}]).text == shown


@pytest.mark.parametrize("arguments", ["[1]", "{", '"a"', "[" * 5000 + "]" * 5000])
def test_arguments_that_are_no_object(tokenizer: Tokenizer, tmp_path: Path, arguments: str) -> None:
    template = write_template(tmp_path, GLM45, tokenizer)
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(UsageError, match=r"no JSON object|nested too deeply"):
        template.render([{"role": "assistant", "content": "", "tool_calls": [call]}])


def test_deep_messages_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    template = write_template(tmp_path, "x", tokenizer)
    with pytest.raises(UsageError, match="nested too deeply"):
        template.render(HI, variables={"x": deep})


def test_helpers_of_templates(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = "{{ strftime_now('%Y') | length }} {{ {'b': '<', 'a': 1} | tojson(sort_keys=true) }}"
    template = write_template(tmp_path, source, tokenizer)
    assert template.render(HI).text == '4 {"a": 1, "b": "<"}'


def test_the_training_tag_is_ignored(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = "{% for m in messages %}\n  {% generation %}\n{% if loop.index == 2 %}{% break %}"
    source += "{% endif %}{{ m.content }}{% set a = 1 %}\n  {% endgeneration %}\n.{% endfor %}"
    template = write_template(tmp_path, source, tokenizer)
    assert template.render(HISTORY).text == "hi."


def test_no_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert ChatTemplate.open(tmp_path, tokenizer) is None


@pytest.mark.parametrize(
    ("source", "kind", "said_in_it"),
    [
        ("a\n{% for %}", FileError, "line 2"),
        ("a\n{{ x | nofilter }}", FileError, "line 2"),
        ("a\n{% generation %}", FileError, "line 2"),
        ("{{ '(' * 1000 }}" + "{{ " + "(" * 5000, FileError, "chat_template.jinja"),
        ("{{ raise_exception('roles\\nmust alternate') }}", UsageError, "roles must alternate"),
        ("a\n{{ nothing.at.all }}", UsageError, "line 2"),
        ("{{ messages[0].content + 1 }}", UsageError, "line 1"),
        ("{{ 1 // 0 }}", UsageError, "zero"),
        ("{{ messages.append(1) }}", FileError, "line 1"),
        ("{{ ''.__class__.__mro__ }}", FileError, "line 1"),
        ("{{ 'x' * 2000000000 }}", FileError, "repeats"),
        ("{{ [messages] * 2000000000 }}", FileError, "repeats"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", FileError, "power"),
        ("{% for a in range(999999999) %}{% endfor %}", FileError, "loops"),
        (
            "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
            FileError,
            "loops",
        ),
        ("{% for a in range(90000) %}{{ 'x' * 9000 }}{% endfor %}", FileError, "writes more"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", FileError, "recursion"),
    ],
)
def test_bad_templates(
    tokenizer: Tokenizer,
    tmp_path: Path,
    source: str,
    kind: type[PyllamaError],
    said_in_it: str,
) -> None:
    with pytest.raises(kind) as raised:
        write_template(tmp_path, source, tokenizer).render(HI)
    assert said_in_it in str(raised.value)
    assert "\n" not in str(raised.value)
    assert type(raised.value) is kind


def test_missing_library(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chat_template.jinja").write_text("x")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "pyllama_dist.text.sandbox", raising=False)
    with pytest.raises(UsageError, match=r"install pyllama-dist\[root\]"):
        ChatTemplate.open(tmp_path, tokenizer)
