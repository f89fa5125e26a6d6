"""What stops an answer, and how a conversation becomes tokens."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tuckaway.cli.answer import Sampling, Watch, encode


def test_one_interrupt_stops_and_two_end() -> None:
    watch, before = Watch(), signal.getsignal(signal.SIGINT)
    tokens = torch.zeros(3, 4, dtype=torch.int64)
    with watch.interruptible():
        assert not watch(tokens, None).any()
        signal.raise_signal(signal.SIGINT)
        assert watch(tokens, None).tolist() == [True] * 3
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
    assert watch.times == sorted(watch.times)


def test_a_thread_sets_no_handler() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with Watch().interruptible():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []


def test_a_conversation_in_the_models_template(tiny_chat: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert tokenizer.decode(encode(tokenizer, messages)[0]) == "<system>a<user>b<assistant>"
    tokenizer.chat_template = None
    assert tokenizer.decode(encode(tokenizer, messages)[0]) == "b"


def test_no_temperature_is_no_sampling() -> None:
    assert Sampling().arguments()["do_sample"] is False
    warm = Sampling(temperature=0.5, top_p=0.9, seed=3).arguments()
    assert (warm["do_sample"], warm["temperature"], warm["top_p"]) == (True, 0.5, 0.9)
