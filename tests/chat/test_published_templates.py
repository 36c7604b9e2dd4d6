"""The ids of a response under published chat templates (package, version and file: `PUBLISHED`).

The expected ids are computed here from the template's own rendering of prompt and answer: the ids
of that rendering from the end of the generation prompt up to the first end token. Where the
rendering does not hold the answer's text, they are the ids of the text behind the generation
prompt, and the end token.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.chat_templates import (
    NAMES,
    chat_tokenizer,
    end_ids,
    metaspace_tokenizer,
    published,
)

from gvpo_offline.chat.encoder import Chat, Encoder, Response
from gvpo_offline.errors import DataError
from gvpo_offline.messages import normalised

QUESTION = {"role": "user", "content": "What is 2 + 3?"}

_WORDS = ("5", "The answer is 5.", "cat", " ", "\n", "\n\n", "</think>", "<think>", "é", "\t")
ANSWERS = st.lists(st.sampled_from(_WORDS), min_size=1, max_size=5).map("".join)


def encoder_of(name: str) -> Encoder:
    return Encoder(chat_tokenizer(name), append_eos=True, end_ids=end_ids(name))


def encoded(encoder: Encoder, prompt: list[dict[str, Any]], response: Response) -> Any:
    """The response's ids and mask, and the prompt's ids."""
    chat = Chat([normalised(message) for message in prompt])
    frame = encoder.frame(chat)
    turns = encoder.pieces(chat, frame, response)
    return encoder.rendered([frame.prompt])[0], encoder.chat_responses([(frame, turns)])[0]


def render(tokenizer: Any, messages: list[dict[str, Any]], *, generation: bool) -> str:
    """The template's own rendering; templates of vision models read content as parts."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    if QUESTION["content"] in text:
        return str(text)
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    return str(
        tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=generation)
    )


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def expected(name: str, answer: str) -> list[int]:
    """What the policy would have to emit, from the whole rendering."""
    tokenizer, end = chat_tokenizer(name), published(name).end
    prompt = render(tokenizer, [QUESTION], generation=True)
    plain, full = (
        render(tokenizer, [QUESTION, {"role": "assistant", "content": text}], generation=False)
        for text in ("xyz", answer)
    )
    before, _, behind = plain.partition("xyz")
    # GLM-4's template marks the end of a turn only by the next one.
    close = behind[: behind.find(end) + len(end)] or end
    head = before.removeprefix(prompt) if before.startswith(prompt) else ""
    if full not in (prompt + head + answer + behind, prompt + answer + behind):
        # The template trims or drops text, or another tag is open: the logged text is kept.
        answer = without_repeated_tag(prompt, answer)
        head = head if full.startswith(prompt + head) else ""
    emitted = head + answer + close
    own, joint = ids_of(tokenizer, prompt), ids_of(tokenizer, prompt + emitted)
    return joint[len(own) :] if joint[: len(own)] == own else ids_of(tokenizer, emitted)


def without_repeated_tag(prompt: str, answer: str) -> str:
    if prompt.endswith("<think>\n") and answer.lstrip().startswith("<think>"):
        return (
            answer.removeprefix("<think>\n")
            if answer.startswith("<think>\n")
            else (answer.lstrip().removeprefix("<think>"))
        )
    return answer


@pytest.mark.parametrize("name", NAMES)
@given(answer=ANSWERS)
def test_ids_are_those_of_the_rendering(name: str, answer: str) -> None:
    encoder = encoder_of(name)
    prompt_ids, found = encoded(encoder, [QUESTION], Response(answer))
    tokenizer = chat_tokenizer(name)
    assert prompt_ids.tolist() == ids_of(tokenizer, render(tokenizer, [QUESTION], generation=True))
    assert found.mask is None
    text = tokenizer.decode(found.ids)
    assert text.endswith(published(name).end)
    # No text is lost, whatever the template does to it.
    assert answer.replace("<think>", "").strip() in text.replace("<think>", "")
    if "think>" not in answer and answer.strip():
        assert found.ids.tolist() == expected(name, answer), text


@pytest.mark.parametrize("name", NAMES)
def test_the_end_of_a_turn_comes_once(name: str) -> None:
    """The log may hold the mark, as servers with skip_special_tokens=False write it."""
    tokenizer, end = chat_tokenizer(name), published(name).end
    encoder = encoder_of(name)
    _, found = encoded(encoder, [QUESTION], Response("5"))
    mark = tokenizer.convert_tokens_to_ids(end)
    assert found.ids.tolist().count(mark) == 1
    assert found.ids[-1] == mark
    for logged in (f"5{end}", f"5{end}\n"):
        _, again = encoded(encoder, [QUESTION], Response(logged))
        assert again.ids[-1] == mark
        assert again.ids.tolist().count(mark) == 1
    _, cut = encoded(encoder, [QUESTION], Response("5", ended=False))
    assert cut.ids.tolist() == [i for i in found.ids.tolist() if i != mark][: len(cut.ids)]
    assert tokenizer.decode(cut.ids).endswith("5")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama3", "5<|eot_id|>"),
        ("gemma", "5<end_of_turn>"),
        ("phi3", "5<|end|>"),
        ("qwen2_5", "5<|im_end|>"),
        ("qwen3", "<think>\n\n</think>\n\n5<|im_end|>"),
        ("deepseek_r1_distill", "5<\uff5cend▁of▁sentence\uff5c>"),
        ("cohere2", "5<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ("glm4moe", "\n<think></think>\n5<|user|>"),
        ("gptoss", "<|channel|>final<|message|>5<|return|>"),
    ],
)
def test_written_out(name: str, text: str) -> None:
    """Some of the above by hand: where the model's card shows what it emits."""
    _, found = encoded(encoder_of(name), [QUESTION], Response("5"))
    assert chat_tokenizer(name).decode(found.ids) == text


CALL = {"type": "function", "id": "call12345", "function": {"name": "look_up",
        "arguments": '{"city": "Zürich \\"old\\"", "days": 2}'}}  # fmt: skip
AGENT = [
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "rain at 8", "tool_call_id": "call12345", "name": "look_up"},
    {"role": "assistant", "content": "Take an umbrella."},
]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look_up", "description": "weather", "parameters": CITY},
    }
]
WITH_TOOLS = ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "llama3_1", "glm4moe")


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tool_output_is_read_and_not_scored(name: str) -> None:
    """Concatenated, the pieces are the template's rendering; the mask is false on the tool's."""
    tokenizer, encoder = chat_tokenizer(name), encoder_of(name)
    response = [normalised(message) for message in AGENT]
    chat = Chat([QUESTION], {"tools": TOOLS})
    frame = encoder.frame(chat)
    turns = encoder.pieces(chat, frame, Response("", response))
    found = encoder.chat_responses([(frame, turns)])[0]
    assert found.mask is not None
    written = tokenizer.decode(found.ids[found.mask])
    given_ = tokenizer.decode(found.ids[~found.mask])
    assert "rain at 8" in given_
    assert "rain at 8" not in written
    for text in ("look_up", "Zürich", "umbrella"):
        assert text in written
        assert text not in given_
    ends = {published(name).end, *published(name).named}
    assert sum(written.count(end) for end in ends) == 2  # the call's end, and the answer's
    full = tokenizer.apply_chat_template(
        [QUESTION, *response], tools=TOOLS, tokenize=False, add_generation_prompt=False
    )
    assert (frame.prompt + tokenizer.decode(found.ids)).startswith(full.rstrip())


def test_two_calls_beside_one_content_are_two_responses() -> None:
    encoder = encoder_of("qwen2_5")
    chat = Chat([QUESTION], {"tools": TOOLS})
    frame = encoder.frame(chat)
    found = []
    for city in ("Bern", "Genf"):
        call = {"function": {"name": "look_up", "arguments": {"city": city}}}
        message = normalised({"role": "assistant", "content": "I look.", "tool_calls": [call]})
        turns = encoder.pieces(chat, frame, Response("I look.", [message]))
        found.append(encoder.chat_responses([(frame, turns)])[0].ids.tolist())
    assert found[0] != found[1]


def test_reasoning_in_a_field_of_its_own() -> None:
    message = normalised({"role": "assistant", "content": "5", "reasoning": "2 and 3"})
    for name, text in (
        ("qwen3", "<think>\n2 and 3\n</think>\n\n5<|im_end|>"),
        ("qwen3_5_think", "2 and 3\n</think>\n\n5<|im_end|>"),
        (
            "gptoss",
            (
                "<|channel|>analysis<|message|>2 and 3<|end|>"
                "<|start|>assistant<|channel|>final<|message|>5<|return|>"
            ),
        ),
    ):
        _, found = encoded(encoder_of(name), [QUESTION], Response("5", [message]))
        assert chat_tokenizer(name).decode(found.ids) == text
    with pytest.raises(DataError, match="received reasoning_content in a message of role"):
        encoded(encoder_of("llama3"), [QUESTION], Response("5", [message]))


@pytest.mark.parametrize(
    ("name", "prompt", "answer", "text"),
    [
        # R1's generation prompt opens <think>, and its template drops reasoning from a message.
        ("deepseek_r1_distill", "<think>\n", "2 and 3\n</think>\n\n5", "2 and 3\n</think>\n\n5"),
        ("deepseek_r1_distill", "<think>\n", "<think>\n2\n</think>\n\n5", "2\n</think>\n\n5"),
        ("deepseek_r1_distill", "<think>\n", "<think>2</think>5", "2</think>5"),
        # Qwen3's does not open it: the answer's own tag stays.
        ("qwen3", "assistant\n", "<think>\n2\n</think>\n\n5", "<think>\n2\n</think>\n\n5"),
    ],
)
def test_reasoning_in_the_text(name: str, prompt: str, answer: str, text: str) -> None:
    encoder = encoder_of(name)
    prompt_ids, found = encoded(encoder, [QUESTION], Response(answer))
    tokenizer = chat_tokenizer(name)
    assert tokenizer.decode(prompt_ids).endswith(prompt)
    assert tokenizer.decode(found.ids) == text + published(name).end
    assert encoder.counts["reopened_reasoning"] == (
        answer.startswith("<think>") and name != "qwen3"
    )


@pytest.mark.parametrize("name", ["llama3", "gemma", "qwen2_5", "mistral"])
def test_a_prompt_that_ends_with_the_assistant_is_continued(name: str) -> None:
    """The turn is not closed and reopened; the end token comes behind the response."""
    if name == "mistral":
        tokenizer = metaspace_tokenizer(("[INST]", "[/INST]"), eos="</s>")
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
            "[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        )
        end = "</s>"
    else:
        tokenizer, end = chat_tokenizer(name), published(name).end
    encoder = Encoder(tokenizer, append_eos=True)
    prompt = [QUESTION, {"role": "assistant", "content": "The sum is"}]
    prompt_ids, found = encoded(encoder, prompt, Response(" 5."))
    assert tokenizer.decode(prompt_ids).endswith("The sum is")
    assert tokenizer.decode(found.ids, clean_up_tokenization_spaces=False) == f" 5.{end}"
    text = encoder.frame(Chat(prompt)).prompt
    joint = ids_of(tokenizer, f"{text} 5.{end}")
    assert [*prompt_ids.tolist(), *found.ids.tolist()] == joint
