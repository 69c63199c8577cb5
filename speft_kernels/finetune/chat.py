"""Conversations: lists of messages, which a tokenizer's chat template writes out for its model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..errors import reason_of, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLE = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'


def as_text(messages: Any) -> str:
    """`messages` as JSON, by which a row of data holds and compares them.

    What comes before the last message is the template's to accept: a role may have tools, images or
    no content at all.

    Raises:
        ValueError: they are no list of messages that ends with an assistant's reply.
    """
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"is {shown(messages)}, not a list of two messages or more: {EXAMPLE}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"has in place {number} {shown(message)}, which has no 'role'")
    role, reply = messages[-1]["role"], messages[-1].get("content")
    if role != "assistant":
        raise ValueError(
            f"ends with a message of {shown(role)}; the last one is what is learnt, so it must be "
            "the assistant's"
        )
    if not isinstance(reply, str) or not reply.strip():
        raise ValueError(f"ends with the content {shown(reply)}; it must be text to learn")
    try:
        return json.dumps(messages, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"is not what JSON can hold ({error})") from error


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Token ids of all that comes before the last reply, and of that reply.

    The former are what the model is given when it is to answer, so the two are tokenized apart. The
    reply ends with the token by which the model stops; what a template writes behind it, such as a
    newline, belongs to the next message.

    Args:
        text: of `as_text`.

    Raises:
        ValueError: there is no chat template, it refuses these messages, or it shows a reply
            otherwise than it begins one.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "needs a chat template, and this model's tokenizer has none (models made for "
            "conversations have it); give 'prompt' and 'response'"
        )
    messages = json.loads(text)
    try:
        # With `tokenize=False` both are text.
        asked, answered = (
            str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=answer))
            for said, answer in ((messages[:-1], True), (messages, False))
        )
    except Exception as error:  # a template is a program, and may raise anything
        raise ValueError(f"is refused by the model's chat template: {reason_of(error)}") from error
    if not answered.startswith(asked):
        raise ValueError(
            "cannot be divided: the model's chat template does not show the last reply behind what "
            "it writes for the model to answer; give 'prompt' and 'response'"
        )
    before, reply = (
        tokenizer(part, add_special_tokens=False).input_ids
        for part in (asked, answered[len(asked) :])
    )
    stop = tokenizer.eos_token_id
    if stop in reply:
        reply = reply[: len(reply) - reply[::-1].index(stop)]
    return before, reply
