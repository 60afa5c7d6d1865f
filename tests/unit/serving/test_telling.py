from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fmray.serving.telling import Telling

letters = st.text("ab\n", max_size=12)


def cut(text: str, stops: list[str]) -> str:
    """The closed form: before the earliest stop sequence."""
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places)] if places else text


@given(st.lists(letters, max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_pieces_are_the_text_before_the_earliest_stop(pieces: list[str], stops: list[str]) -> None:
    telling, told = Telling(stops), ""
    for piece in pieces:
        if telling.stopped:
            break
        told += telling.add(piece)
        assert not any(stop in told for stop in stops), "no part of a stop sequence that came is ever told"
    whole = told + telling.end()
    said = "".join(pieces)
    if telling.stopped:
        # a stop that begins earlier may end later: the one that was complete first ends the answer
        assert whole in {cut(said[:length], stops) for length in range(len(said) + 1)}
        assert any(stop in said for stop in stops)
    else:
        assert whole == said


def test_without_stops_everything_is_told_at_once() -> None:
    telling = Telling([])
    assert [telling.add("a red "), telling.add("circle"), telling.end()] == ["a red ", "circle", ""]


def test_what_may_become_a_stop_waits() -> None:
    telling = Telling(["END", "\n\n"])
    assert telling.add("red E") == "red "
    assert telling.add("N") == ""
    assert telling.add("Sign\n") == "ENSign"
    assert telling.add("\nmore") == ""
    assert telling.stopped
    assert telling.end() == ""
