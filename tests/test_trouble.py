"""Every message of an error is found on the page of errors, and the page names no other."""

from __future__ import annotations

import re
from pathlib import Path

from support.messages import ANY, collect_messages

PAGE = (Path(__file__).parents[1] / "docs" / "trouble.md").read_text(encoding="utf-8")
TABLES = re.findall(r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE)
MESSAGES = collect_messages()


def code_of(text: str) -> list[str]:
    """Return the code of a Markdown text; a single word would be in too many messages."""
    return [code for code in re.findall(r"`([^`]+)`", text) if " " in code]


def test_every_message_is_on_the_page() -> None:
    """A new error needs an entry in docs/trouble.md: words of it as code, cause and remedy."""
    phrases = [phrase for table in TABLES for phrase in code_of(table)]
    missing = {
        message: places
        for message, places in MESSAGES.items()
        if not any(phrase in message for phrase in phrases)
    }
    assert missing == {}


def test_the_page_has_no_message_that_is_never_raised() -> None:
    cells = [line.split(" | ")[0] for table in TABLES for line in table.splitlines()]
    phrases = [phrase for cell in cells for phrase in code_of(cell)]
    assert len(phrases) > 150
    assert [one for one in phrases if not any(one in message for message in MESSAGES)] == []


def test_messages_are_collected_from_the_source() -> None:
    assert len(MESSAGES) > 250
    assert f"{ANY} is {ANY}, too coarse to number tokens by; keep it float32" in MESSAGES
    assert any(message.startswith("unknown model_type") for message in MESSAGES)
