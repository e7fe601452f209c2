"""Where a token comes from, and that no message tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfgrpo.remote import token


def test_a_file_comes_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(token.VARIABLE, raising=False)
    assert token.read() is None
    monkeypatch.setenv(token.VARIABLE, "of-the-environment")
    assert token.read() == "of-the-environment"
    assert token.read(variable="SFGRPO_OTHER") is None
    (tmp_path / "token").write_text("of-the-file-0123456789\n")
    assert token.read(file=tmp_path / "token") == "of-the-file-0123456789"


@pytest.mark.parametrize("text", ["", "short", "with a space in it, though long", "ü" * 20])
def test_what_is_no_token_is_not_repeated(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(token.VARIABLE, text)
    with pytest.raises(ValueError, match=f"environment variable {token.VARIABLE}: ") as refused:
        token.read()
    assert not text or text not in str(refused.value)
