from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tuckaway.paging.fill import Fill


def test_the_last_piece_ends_it():
    fill, seen = Fill(), []
    fill.expect(3)
    for piece in range(3):
        assert not fill.done()
        fill.piece(lambda piece=piece: seen.append(piece), lambda: seen.append("last"))
    assert fill.done()
    fill.result()
    assert seen == [0, 1, 2, "last"]


def test_an_error_ends_it_when_no_piece_is_under_way_any_more():
    fill, seen = Fill(), []
    fill.expect(3)

    def broken():
        raise OSError("broken")

    fill.piece(broken, lambda: seen.append("last"))
    assert not fill.done()
    assert not fill.wanted
    fill.piece(lambda: None, lambda: seen.append("last"))
    assert not fill.done()
    fill.piece(lambda: None, lambda: seen.append("last"))
    with pytest.raises(OSError, match="broken") as caught:
        fill.result()
    assert "broken" in [entry.name for entry in caught.traceback]
    assert seen == []
    fill.settle()


def test_an_error_at_the_end_is_told():
    fill = Fill()
    fill.end(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fill.result()


def test_a_cancelled_one_is_not_wanted_and_has_no_end():
    fill, seen = Fill(), []
    fill.expect(1)
    fill.cancel()
    fill.piece(lambda: seen.append(fill.wanted) if fill.wanted else None, lambda: seen.append("last"))
    fill.result()
    assert seen == []


def test_who_waits_is_called_once_now_or_later():
    fill, seen = Fill(), []
    fill.when_done(lambda: seen.append("later"))
    fill.fail(ValueError())
    fill.when_done(lambda: seen.append("now"))
    assert seen == ["later", "now"]


def test_many_threads_end_it_once():
    with ThreadPoolExecutor(8) as pool:
        for _ in range(50):
            fill, ends = Fill(), []
            fill.expect(16)
            for _ in range(16):
                pool.submit(fill.piece, lambda: None, lambda ends=ends: ends.append(1))
            fill.result()
            assert ends == [1]
