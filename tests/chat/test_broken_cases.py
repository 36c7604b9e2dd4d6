"""Responses that were tokenised wrongly in silence, or refused although their template renders
them: tool calls and reasoning under published templates, and templates written here.

The expected texts are written out: they are the template's own rendering behind the generation
prompt, up to the end of the turn.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.chat_templates import byte_level_tokenizer, chat_tokenizer, end_ids

from gvpo_offline.chat.encoder import Chat, Encoder, Response
from gvpo_offline.errors import DataError
from gvpo_offline.messages import Message, normalised

QUESTION = {"role": "user", "content": "What is 2 + 3?"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
LOOK_UP = {"name": "look_up", "description": "weather", "parameters": CITY}
TOOLS = [{"type": "function", "function": LOOK_UP}]
THOUGHT = "<think>\nhm\n</think>\n\n"
MARKS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encoder_of(name: str) -> Encoder:
    return Encoder(chat_tokenizer(name), append_eos=True, end_ids=end_ids(name))


def written_here(template: str, *, eos: str = "<|im_end|>", special: Any = MARKS) -> Encoder:
    tokenizer = byte_level_tokenizer(special, eos=eos)
    tokenizer.chat_template = template
    return Encoder(tokenizer, append_eos=True)


def calls(*arguments: Any, **message: Any) -> Message:
    """A message of the assistant with one call for each of `arguments`."""
    found = [{"type": "function", "id": f"call1234{i}",
              "function": {"name": "look_up", "arguments": own}}
             for i, own in enumerate(arguments)]  # fmt: skip
    return normalised({"role": "assistant", "content": None, "tool_calls": found, **message})


def encode(
    encoder: Encoder,
    response: str | list[Message],
    prompt: list[dict[str, Any]] | None = None,
    *,
    tools: bool = False,
    ended: bool = True,
) -> tuple[str, str]:
    """The end of the prompt from its last line on, and what the policy writes, as text."""
    chat = Chat([normalised(m) for m in prompt or [QUESTION]], {"tools": TOOLS} if tools else {})
    frame = encoder.frame(chat)
    asked = (
        Response(response, ended=ended)
        if isinstance(response, str)
        else Response("", response, ended=ended)
    )
    own = encoder.chat_responses([(frame, encoder.pieces(chat, frame, asked))])[0]
    ids = own.ids if own.mask is None else own.ids[own.mask]
    return frame.prompt, encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("content", ["a", "final", "o", "analysis"])
def test_a_content_that_also_occurs_in_the_header_of_a_turn(content: str) -> None:
    """gpt-oss writes "assistant<|channel|>final" before the content."""
    message = normalised({"role": "assistant", "content": content, "reasoning": "a hint"})
    assert encode(encoder_of("gptoss"), [message])[1] == (
        "<|channel|>analysis<|message|>a hint<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{content}<|return|>"
    )


def test_a_call_without_a_text_among_its_arguments() -> None:
    """The turn does not end with the first special token behind the call's name."""
    for arguments, text in (({}, "{}"), ("", "{}"), ("null", "{}"), ({"n": 5}, '{"n": 5}')):
        _, written = encode(encoder_of("gptoss"), [calls(arguments)], tools=True)
        assert written == (
            f" to=functions.look_up<|channel|>commentary json<|message|>{text}<|call|>"
        )


def test_a_template_that_ends_a_turn_with_the_next_one() -> None:
    """GLM-4.5: a call is closed, and its end token is <|observation|>, not <|user|>."""
    found = encoder_of("glm4moe")
    call = "<tool_call>look_up\n<arg_key>city</arg_key>\n<arg_value>Bern</arg_value>\n</tool_call>"
    expected = f"\n<think></think>\n{call}"
    assert encode(found, [calls({"city": "Bern"})], tools=True)[1] == f"{expected}<|observation|>"
    more = [calls({"city": "Bern", "days": 2})]
    assert encode(found, more, tools=True)[1].endswith(
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call><|observation|>"
    )
    thought = normalised({"role": "assistant", "content": "", "reasoning_content": "hm"})
    assert encode(found, [thought])[1] == "\n<think>hm</think><|user|>"


def test_arguments_in_the_order_and_with_the_escapes_of_the_template() -> None:
    """Gemma 4 sorts arguments and writes content behind calls; LFM2 escapes as Python does."""
    sorts = CHATML.replace(
        "{{ m.content }}",
        "{% for c in m.tool_calls or [] %}[{{ c.function.name }}("
        "{% for k, v in c.function.arguments | dictsort %}{{ k }}='"
        "{{ v | replace(\"'\", \"\\\\'\") | replace('\\n', '\\\\n') }}' {% endfor %})]"
        "{% endfor %}{{ m.content or '' }}",
    )
    message = calls({"z": "first", "a": "it's\n"}, content="I look.")
    assert encode(written_here(sorts), [message])[1] == (
        "[look_up(a='it\\'s\\n' z='first' )]I look.<|im_end|>"
    )
    _, text = encode(encoder_of("gemma4"), [calls({"z": "1st", "a": "2nd"})], tools=True)
    assert 'look_up{a:<|"|>2nd<|"|>,z:<|"|>1st<|"|>}' in text


def test_a_content_that_the_template_drops_beside_calls() -> None:
    """Llama 3.1 renders the call alone; "look" occurs in the call's name."""
    for content in ("look", "I look."):
        with pytest.raises(DataError, match=f"received content '{content}', which is not in"):
            encode(encoder_of("llama3_1"), [calls({"x": "y"}, content=content)], tools=True)


def test_the_end_of_a_turn_before_the_header_of_the_next() -> None:
    """No white space between the two, and the end of a call is not an end token of the config."""
    template = (
        "{% for m in messages %}<|bom|><|{{ m.role }}|>{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
        "{{ '<|eom|>' if m.tool_calls else '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|bom|><|assistant|>{% endif %}"
    )
    special = ("<|bom|>", "<|eom|>", "<|eot|>", "<|user|>", "<|assistant|>", "<|tool|>")
    found = written_here(template, eos="<eos>", special=special)
    agent = [calls({}), {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "5"}]
    assert encode(found, agent)[1] == "look_up<|eom|>5<|eot|>"


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gptoss", "cohere2"])
def test_an_end_mark_in_a_message_comes_once(name: str) -> None:
    """As in a text: the log may hold the mark, in the last turn and in those before it."""
    found = encoder_of(name)
    mark = found.frame(Chat([QUESTION])).tail

    def turns(mark: str) -> list[Message]:
        return [
            {"role": "assistant", "content": f"5{mark}"},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": f"6{mark}"},
        ]

    _, plain = encode(found, turns(""))
    assert encode(found, turns(mark))[1] == plain
    assert encode(found, turns(f"{mark}\n"))[1] == plain


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        # The generation prompt of Qwen3.5 opens <think>; the template reads reasoning apart.
        ("qwen3_5_think", f"{THOUGHT}I look.", "hm\n</think>\n\nI look.\n\n"),
        ("qwen3_5_think", THOUGHT, "hm\n</think>\n\n"),
        ("qwen3_5_think", "hm\n</think>\n\nI look.", "hm\n</think>\n\nI look.\n\n"),
        ("qwen3_5_think", "<think>hm</think>I look.", "hm</think>I look.\n\n"),
        ("nemotron_3_nano", f"{THOUGHT}I look.", "hm\n</think>\n\nI look.\n"),
        # Qwen3 opens none: the tag is the policy's.
        ("qwen3", f"{THOUGHT}I look.", f"{THOUGHT}I look.\n"),
        ("qwen3", THOUGHT, THOUGHT),
        ("qwen3", "<think>hm</think>I look.", "<think>hm</think>I look.\n"),
    ],
)
def test_reasoning_within_the_content_of_a_call(name: str, content: str, text: str) -> None:
    """Logged white space stays; the tag that the generation prompt opens is not repeated."""
    _, written = encode(encoder_of(name), [calls({"city": "Bern"}, content=content)], tools=True)
    assert written[: written.index("<tool_call>")] == text


@pytest.mark.parametrize("text", ["You are a helpful assistant.", "2", "Qwen"])
def test_a_dropped_message_whose_text_stands_elsewhere(text: str) -> None:
    """Qwen2.5 drops the role developer; its own system prompt, or the question, holds the text."""
    prompt = [{"role": "developer", "content": text}, QUESTION]
    with pytest.raises(DataError, match=r"a message of role 'developer' whose text is not in the"):
        encode(encoder_of("qwen2_5"), "5", prompt)


def test_a_prefill_that_the_template_cuts_is_refused() -> None:
    """DeepSeek-R1 drops what stands before </think> in a message; the policy had continued it."""
    prompt = [QUESTION, {"role": "assistant", "content": "<think>hm</think>The sum"}]
    with pytest.raises(DataError, match="a message of role 'assistant' whose text is not in the"):
        encode(encoder_of("deepseek_r1_distill"), " is 5", prompt)
    assert encode(encoder_of("qwen2_5"), " is 5", prompt)[1] == " is 5<|im_end|>"


def test_a_tag_at_the_end_of_a_prefill_is_not_the_templates() -> None:
    prompt = [QUESTION, {"role": "assistant", "content": "Use <b>"}]
    assert encode(encoder_of("qwen2_5"), "<b>5</b>", prompt)[1] == "<b>5</b><|im_end|>"


def test_a_system_message_in_the_last_turn_of_the_user() -> None:
    """Mistral: the prompt is rendered differently once a response follows. What the template
    writes before a response, here a space, stays part of it.
    """
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]"
        "{% if loop.last and messages[0].role == 'system' %} {{ messages[0].content }}\n{% endif %}"
        " {{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% endif %}{% endfor %}"
    )
    found = written_here(template, eos="</s>", special=("[INST]", "[/INST]"))
    prompt, text = encode(found, "5", [{"role": "system", "content": "Be brief."}, QUESTION])
    assert prompt == "<s>[INST] Be brief.\n What is 2 + 3?[/INST]"
    assert text == encode(found, "5")[1] == " 5</s>"
    assert not found.counts["not_as_rendered_responses"]


def test_an_end_token_that_is_not_declared_special() -> None:
    """Fine-tuned models whose tokenizer got <|im_end|> as a normal added token."""
    tokenizer = byte_level_tokenizer((), eos="</s>")
    tokenizer.add_tokens(list(MARKS))
    tokenizer.chat_template = CHATML
    found = Encoder(tokenizer, append_eos=True)
    assert encode(found, "5")[1] == "5<|im_end|>"
    assert encode(found, "5<|im_end|>")[1] == "5<|im_end|>"
    assert found.end_of_turn == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_call_as_json_text() -> None:
    """Data sets keep the list of calls, or each of them, as JSON text."""
    call = '{"type": "function", "function": {"name": "f", "arguments": {"x": null, "y": 1}}}'
    expected = [{"type": "function", "function": {"name": "f", "arguments": {"y": 1}}}]
    for value in (f"[{call}]", [call], call):
        message = {"role": "assistant", "content": None, "tool_calls": value}
        assert normalised(message)["tool_calls"] == expected


def test_arguments_that_are_the_encoders_own() -> None:
    found = encoder_of("qwen3")
    for name in ("messages", "add_generation_prompt"):
        with pytest.raises(DataError, match=f"received {name}, which is not an argument"):
            found.frame(Chat([QUESTION], {name: False}))


def test_reasoning_of_earlier_turns_that_the_template_does_not_read() -> None:
    """Servers leave it out of the prompt; in what the policy writes or continues it is refused."""
    earlier = {"role": "assistant", "content": "5", "reasoning_content": "2 and 3"}
    prompt = [QUESTION, earlier, {"role": "user", "content": "And 4 + 4?"}]
    shown, text = encode(encoder_of("llama3"), "8", prompt)
    assert "2 and 3" not in shown
    assert text == "8<|eot_id|>"
    for continued in (prompt[:2], [QUESTION]):
        response: Any = "!" if continued[1:] else [normalised(earlier)]
        with pytest.raises(DataError, match="received reasoning_content in a message of role"):
            encode(encoder_of("llama3"), response, continued)


def test_tools_that_the_template_drops_although_the_prompt_names_one() -> None:
    prompt = [{"role": "user", "content": "Please look_up the weather."}]
    with pytest.raises(DataError, match="the tool 'look_up', which the rendering does not hold"):
        encode(encoder_of("llama3"), "No.", prompt, tools=True)


def test_what_clients_add_to_a_message_is_no_field_of_it() -> None:
    added = {"timestamp": 17, "model": "m", "cache_control": {"type": "ephemeral"}}
    assert normalised({**QUESTION, **added}) == QUESTION


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen2_5", "<|im_end|>"),
        ("qwen3", "<think>\n\n</think>\n\n<|im_end|>"),
        ("gptoss", "<|channel|>final<|message|><|return|>"),
    ],
)
def test_an_empty_response_has_what_the_template_writes_before_responses(
    name: str, text: str
) -> None:
    assert encode(encoder_of(name), "")[1] == text
