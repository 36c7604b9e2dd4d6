"""What the encoder does with templates and tokenizers that are written here: templates that trim,
fold the system message into the user's turn, drop reasoning or roles, or mark what the assistant
generates; and a tokenizer that writes a space before each text.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.chat_templates import byte_level_tokenizer, metaspace_tokenizer

from gvpo_offline.chat.encoder import Chat, Encoder, Response
from gvpo_offline.errors import DataError
from gvpo_offline.messages import normalised

QUESTION = {"role": "user", "content": "What is 2 + 3?"}
MARKS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encoder(template: str, *, eos: str = "<|im_end|>", special: Any = MARKS) -> Encoder:
    tokenizer = byte_level_tokenizer(special, eos=eos)
    tokenizer.chat_template = template
    return Encoder(tokenizer, append_eos=True)


def encode(
    found: Encoder, prompt: list[dict[str, Any]], response: Response, **arguments: Any
) -> tuple[str, str, np.ndarray[Any, Any] | None]:
    """Prompt and response as text, special tokens visible, and the response's mask."""
    chat = Chat([normalised(message) for message in prompt], arguments)
    frame = found.frame(chat)
    turns = found.pieces(chat, frame, response)
    own = found.chat_responses([(frame, turns)])[0]
    prompt_ids = found.rendered([frame.prompt])[0]
    decode = found.tokenizer.decode
    return decode(prompt_ids), decode(own.ids), own.mask


def test_the_end_is_the_templates_and_not_the_tokenizers() -> None:
    """Gemma: the template ends turns with <end_of_turn>, the tokenizer's eos_token is <eos>."""
    template = CHATML.replace("<|im_end|>", "<end_of_turn>")
    found = encoder(template, eos="<eos>", special=("<|im_start|>", "<end_of_turn>"))
    assert encode(found, [QUESTION], Response("5"))[1] == "5<end_of_turn>"
    assert encode(found, [QUESTION], Response("5<end_of_turn>"))[1] == "5<end_of_turn>"
    assert encode(found, [QUESTION], Response("5<eos>"))[1] == "5<eos>"
    assert encode(found, [QUESTION], Response("5", ended=False))[1] == "5"


def test_a_rendered_prompt_is_a_chat_too() -> None:
    """A text that ends with the generation prompt: the response ends with the turn's mark."""
    found = encoder(CHATML, eos="<eos>")
    prompts = found.prompts(["<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "hi"])
    texts = [
        found.tokenizer.decode(own.ids)
        for own in found.text_responses(prompts, [Response("5"), Response("5")])
    ]
    assert texts == ["5<|im_end|>", "5<eos>"]


def test_text_that_the_template_trims_is_kept() -> None:
    found = encoder(CHATML.replace("m.content", "m.content | trim"))
    assert encode(found, [QUESTION], Response("  5\n "))[1] == "  5\n <|im_end|>"
    assert found.counts["not_as_rendered_responses"] == 1


def test_reasoning_that_the_template_drops_is_kept() -> None:
    dropping = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    found = encoder(dropping)
    assert encode(found, [QUESTION], Response("a</think>5"))[1] == "a</think>5<|im_end|>"
    assert found.counts["not_as_rendered_responses"] == 1


FOLDING = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ (system if loop.first else '') + m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_system_message_in_the_users_turn() -> None:
    system = {"role": "system", "content": "Be brief."}
    prompt, response, _ = encode(encoder(FOLDING), [system, QUESTION], Response("5"))
    assert prompt.startswith("<|im_start|>user\nBe brief.\nWhat is 2 + 3?<|im_end|>")
    assert response == "5<|im_end|>"


@pytest.mark.parametrize("role", ["developer", "human", "tool"])
def test_a_message_that_the_template_drops_is_refused(role: str) -> None:
    known = CHATML.replace(
        "{% for m in messages %}",
        "{% for m in messages if m.role in ['user', 'assistant', 'system'] %}",
    )
    with pytest.raises(DataError, match=f"a message of role '{role}' whose text is not in the"):
        encode(encoder(known), [QUESTION, {"role": role, "content": "xyz"}], Response("5"))
    # Twice the same text, one of them dropped.
    again = [QUESTION, {"role": role, "content": QUESTION["content"]}]
    with pytest.raises(DataError, match=f"a message of role '{role}'"):
        encode(encoder(known), again, Response("5"))


def test_arguments_are_honoured_or_refused() -> None:
    thinking = (
        CHATML
        + "{% if add_generation_prompt and not enable_thinking %}<think>\n\n</think>{% endif %}"
    )
    found = encoder(thinking)
    on = encode(found, [QUESTION], Response("5"), enable_thinking=True)
    off = encode(found, [QUESTION], Response("5"), enable_thinking=False)
    assert on[0] + "<think>\n\n</think>" == off[0]
    with pytest.raises(DataError, match="received enable_thinking: False, which it does not use"):
        encode(encoder(CHATML), [QUESTION], Response("5"), enable_thinking=False)
    with pytest.raises(DataError, match="the tool 'look_up', which the rendering does not hold"):
        encode(
            encoder(CHATML), [QUESTION], Response("5"), tools=[{"function": {"name": "look_up"}}]
        )


def test_a_field_that_the_template_does_not_know_is_refused() -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    message = normalised({"role": "assistant", "content": "5", "tool_calls": [call]})
    with pytest.raises(DataError, match="received tool_calls in a message of role 'assistant'"):
        encode(encoder(CHATML), [QUESTION], Response("5", [message]))


TOOL_TURNS = [
    {"role": "assistant", "content": "I look. "},
    {"role": "tool", "content": "5 or so"},
    {"role": "assistant", "content": "It is 5."},
]
GIVEN = "\n<|im_start|>tool\n5 or so<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("trims", [False, True])
def test_masks_by_prefixes(trims: bool) -> None:
    """Logged white space stays in the policy's tokens, even where the template trims it."""
    template = CHATML.replace("m.content", "m.content | trim") if trims else CHATML
    found = encoder(template)
    response = Response("", [normalised(message) for message in TOOL_TURNS])
    _, text, mask = encode(found, [QUESTION], response)
    assert text == f"I look. <|im_end|>{GIVEN}It is 5.<|im_end|>"
    assert mask is not None
    ids = found.rendered([text])[0]
    assert found.tokenizer.decode(ids[mask]) == "I look. <|im_end|>It is 5.<|im_end|>"
    assert found.tokenizer.decode(ids[~mask]) == GIVEN
    assert found.counts["not_as_rendered_responses"] == trims


# Earlier turns of the assistant lose their thoughts once another turn follows.
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content if loop.last or keep else m.content.split('>')[-1] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_masks_by_generation_blocks() -> None:
    """A user's turn in between: the second assistant message still begins where its block does."""
    marked = FORGETS.replace(" or keep", " or true").replace(
        "{% if add_generation_prompt %}",
        "{% if add_generation_prompt and messages | length > 1 %}!{% endif %}"
        "{% if add_generation_prompt %}",
    )
    found = encoder(marked)
    response = Response("", [normalised(message) for message in TOOL_TURNS])
    _, text, mask = encode(found, [QUESTION], response)
    assert mask is not None
    ids = found.rendered([text])[0]
    assert found.tokenizer.decode(ids[mask]) == "I look. <|im_end|>It is 5.<|im_end|>"


def test_turns_that_change_without_blocks_are_refused() -> None:
    plain = FORGETS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    turns = [{"role": "assistant", "content": "hm>I look."}, *TOOL_TURNS[1:]]
    response = Response("", [normalised(message) for message in turns])
    with pytest.raises(DataError, match="which is not in the rendering"):
        encode(encoder(plain), [QUESTION], response)


TEXT = st.text(st.sampled_from(list("ab5 .\n")), min_size=1, max_size=12)


@given(prompt=TEXT, answer=TEXT)
def test_no_space_before_a_response(prompt: str, answer: str) -> None:
    """Metaspace: alone, "a" is "▁a"; behind a prompt it is "a". The decoded ids are the texts."""
    tokenizer = metaspace_tokenizer((), eos="</s>")
    found = Encoder(tokenizer, append_eos=True)
    own = found.text_responses(found.prompts([prompt]), [Response(answer)])[0]
    words = tokenizer.convert_ids_to_tokens(own.ids.tolist())
    text = b"".join(
        bytes([int(w[3:5], 16)]) if w.startswith("<0x") else w.replace("▁", " ").encode()
        for w in words
    ).decode()
    assert text == answer + "</s>"


@given(answer=TEXT)
def test_byte_level_responses_are_as_before(answer: str) -> None:
    """Without a template, and with a tokenizer that adds no space: the text's own ids."""
    tokenizer = byte_level_tokenizer((), eos="<eos>")
    found = Encoder(tokenizer, append_eos=True)
    own = found.text_responses(found.prompts(["hi"]), [Response(answer)])[0]
    expected = tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert own.ids.tolist() == [*expected, tokenizer.eos_token_id]
