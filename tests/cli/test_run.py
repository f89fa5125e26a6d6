"""A conversation: what is asked and kept, how it is left, and what the command prints at its end."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tuckaway
from command import invoke
from tuckaway.cli.answer import Sampling, encode
from tuckaway.cli.kept_cache import KeptCache
from tuckaway.cli.model import build, load, quantization_config, tokenizer_of
from tuckaway.cli.run import Conversation, chat
from tuckaway.cli.show import Screen


def conversation(
    folder: Path, *, limit: int = 6, **options: Any
) -> Iterator[tuple[Conversation, io.StringIO]]:
    built = build(str(folder))
    tokenizer = tokenizer_of(built)
    out = io.StringIO()
    screen = Screen(Console(file=out, highlight=False))
    with load(built, quantization_config(built, "nf4")) as loaded:
        yield Conversation(screen, loaded.network, tokenizer, limit, **options), out


@pytest.fixture(scope="module")
def talk(tiny_chat: Path) -> Iterator[tuple[Conversation, io.StringIO]]:
    yield from conversation(tiny_chat)


@pytest.fixture
def fresh(talk: tuple[Conversation, io.StringIO]) -> tuple[Conversation, io.StringIO]:
    talk[0].system = None
    talk[0].forget()
    talk[0].answers.clear()
    talk[1].seek(0)
    talk[1].truncate()
    return talk


def reader(*lines: str | BaseException) -> Any:
    remaining = list(lines)

    def read(prompt: str) -> str:
        line = remaining.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def test_what_was_said_is_asked_again(fresh: tuple[Conversation, io.StringIO]) -> None:
    talk, out = fresh
    chat(talk, reader("one", "", "two", EOFError()))
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[1]["content"] == talk.answers[0].text
    whole = encode(talk.tokenizer, talk.messages[:3])
    assert talk.answers[1].prompt_tokens == whole.shape[-1] > talk.answers[0].prompt_tokens
    assert talk.answers[0].text in out.getvalue()


def test_a_turn_computes_only_what_is_new(fresh: tuple[Conversation, io.StringIO]) -> None:
    """The tokens are those that come without a cache, turn by turn."""
    talk, _ = fresh
    turns = ["one", "two", "three", "four"]
    for text in turns:
        talk.ask(text)
    kept = list(talk.answers)
    # the tiny model says what its own text is not cut into again, now and then: then all is computed anew
    assert sum(answer.kept_tokens > 0 for answer in kept) >= 1
    assert all(answer.kept_tokens < answer.prompt_tokens for answer in kept)
    talk.forget()
    talk.answers.clear()
    for text in turns:
        talk.cache = KeptCache()
        talk.ask(text)
    assert [answer.kept_tokens for answer in talk.answers] == [0] * 4
    assert [answer.text for answer in talk.answers] == [answer.text for answer in kept]
    assert [answer.tokens for answer in talk.answers] == [answer.tokens for answer in kept]


def test_another_beginning_computes_all(fresh: tuple[Conversation, io.StringIO]) -> None:
    talk, _ = fresh
    talk.ask("one")
    talk.messages[0] = {"role": "user", "content": "other"}
    assert talk.ask("two").kept_tokens == 0


def test_new_forgets_all_but_the_system(fresh: tuple[Conversation, io.StringIO]) -> None:
    talk, _ = fresh
    talk.system = "Be brief."
    talk.forget()
    chat(talk, reader("one", "/new", "two", "/exit", "never read"))
    assert [(m["role"], m["content"]) for m in talk.messages[:2]] == [
        ("system", "Be brief."),
        ("user", "two"),
    ]
    assert len(talk.answers) == 2


def test_unknown_commands_and_ctrl_c_at_the_prompt_do_no_harm(
    fresh: tuple[Conversation, io.StringIO],
) -> None:
    talk, out = fresh
    chat(talk, reader("/what", KeyboardInterrupt(), "one", "/quit"))
    assert len(talk.answers) == 1
    assert out.getvalue().count("/new forgets") == 2


def test_ctrl_c_ends_the_answer_and_not_the_conversation(
    fresh: tuple[Conversation, io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk, out = fresh
    shown = []

    def piece(text: str) -> None:
        shown.append(text)
        if len(shown) == 2:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(talk, "limit", 50)
        patch.setattr(talk.screen, "piece", piece)
        chat(talk, reader("one", EOFError()))
    assert talk.answers[0].stopped
    assert 2 <= talk.answers[0].tokens < 50
    assert "(stopped)" in out.getvalue()
    assert signal.getsignal(signal.SIGINT) == before


def test_without_a_template_the_last_line_stands_alone(
    fresh: tuple[Conversation, io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk, out = fresh
    monkeypatch.setattr(talk.tokenizer, "chat_template", None)
    chat(talk, reader("abc", "de", EOFError()))
    assert [answer.prompt_tokens for answer in talk.answers] == [3, 2]
    assert "no chat template" in out.getvalue()


def test_a_seed_makes_samples_repeatable(fresh: tuple[Conversation, io.StringIO]) -> None:
    talk, _ = fresh
    texts = []
    for seed in (1, 1, 2):
        talk.forget()
        talk.sampling = Sampling(temperature=5.0, seed=seed)
        texts.append(talk.ask("one").text)
    talk.sampling = Sampling()
    assert texts[0] == texts[1] != texts[2]


def test_one_prompt(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", "Hello", "--max-new-tokens", "5"]
    assert invoke(monkeypatch, "run", str(tiny_llama), *options) == 0
    shown = capsys.readouterr().out
    assert "nf4" in shown
    assert "5 tokens, " in shown
    assert "memory: this process" in shown


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "none"])
def test_json(
    format: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", "Hello", "--max-new-tokens", "5", "--format", format, "--json"]
    assert invoke(monkeypatch, "run", str(tiny_llama), *options) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 5
    assert result["text"]
    assert result["process_peak_bytes"] > 2**20
    assert (format in result["bytes_by_format"]) == (format != "none")


def test_prompt_from_a_pipe(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert invoke(monkeypatch, "run", str(tiny_llama), "--max-new-tokens", "3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 5


def test_a_quantized_folder_keeps_its_format(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = build(str(tiny_llama))
    with load(built, quantization_config(built, "int8")) as loaded:
        tuckaway.save_model(loaded.network, tmp_path)
    tokenizer_of(built).save_pretrained(tmp_path)
    assert (
        invoke(monkeypatch, "run", str(tmp_path), "--prompt", "Hello", "--json", "--max-new-tokens", "3") == 0
    )
    assert "int8" in json.loads(capsys.readouterr().out)["bytes_by_format"]


def test_blocks_on_disk_are_paged_from_the_folder_named(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = "model.embed_tokens=cpu,model.rotary_emb=cpu,model.norm=cpu,lm_head=cpu,model.layers=disk"
    options = ["--device-map", places, "--offload-folder", str(tmp_path / "pages"), "--max-new-tokens", "3"]
    assert invoke(monkeypatch, "run", str(tiny_llama), "--prompt", "Hello", *options, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bytes_by_device"]["disk"] > 0
    assert any((tmp_path / "pages").iterdir())


def test_what_is_no_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    message = invoke(monkeypatch, "run", str(tmp_path), "--prompt", "Hello")
    assert "'vit' is no causal language model" in message
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    assert "nothing" in invoke(monkeypatch, "run", str(tmp_path), "--prompt", "Hello")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")
def test_in_a_terminal(tiny_llama: Path) -> None:
    """The whole of it, through a terminal's own Ctrl-D."""
    import pty

    terminal, inner = pty.openpty()
    arguments = ["-m", "tuckaway.cli.main", "run", str(tiny_llama), "--max-new-tokens", "5"]
    with subprocess.Popen([sys.executable, *arguments], stdin=inner, stdout=inner, stderr=inner) as process:
        os.close(inner)
        shown = _read_until(terminal, b"\n> ")
        os.write(terminal, b"Hello\n")
        shown += _read_until(terminal, b"\n> ")
        os.write(terminal, b"\x04")
        shown += _read_until(terminal, b"at most\r\n")
        assert process.wait(60) == 0
    os.close(terminal)
    assert b"5 tokens, " in shown


def _read_until(terminal: int, words: bytes) -> bytes:
    read, deadline = b"", time.monotonic() + 120
    while words not in read:
        ready, _, _ = select.select([terminal], [], [], deadline - time.monotonic())
        assert ready, read
        read += os.read(terminal, 4096)
    return read
