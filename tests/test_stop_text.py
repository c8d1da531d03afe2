"""StopText: the text before a stop string, whatever pieces it arrives in."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mistral_kernels.model.stop_text import StopText

# Few characters, so that stop strings overlap; one of them takes four bytes.
WORDS = st.text("ab😀", min_size=1, max_size=5)


def before_stop(stops: list[str], text: str) -> tuple[str, bool]:
    """The definition: the shortest beginning that holds a stop string, up to where one starts."""
    for length in range(len(text) + 1):
        starts = [text[:length].find(stop) for stop in stops if stop in text[:length]]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(st.lists(WORDS, max_size=4), st.lists(st.text("ab😀", max_size=6), max_size=12))
@example(["ab", "abc"], ["a", "bc"])
@example(["abb", "ba"], ["a", "ba"])
@example(["aab"], ["aaa", "b"])
def test_any_pieces_give_the_text_before_the_stop(stops, pieces):
    expected, stopped = before_stop(stops, "".join(pieces))
    text, shown = StopText(stops), ""
    for i, piece in enumerate(pieces):
        shown += text.push(piece)
        so_far = "".join(pieces[: i + 1])
        # Right at every moment: never too much, held back only while it may begin a stop string.
        assert text.stopped == before_stop(stops, so_far)[1]
        if not text.stopped:
            assert so_far.startswith(shown)
            ends = [so_far[at:] for at in range(len(so_far))]
            begins = [end for end in ends if any(stop.startswith(end) for stop in stops)]
            assert so_far == shown + max(begins, key=len, default="")
    assert (shown + text.finish(), text.stopped) == (expected, stopped)
    assert text.finish() == ""


@pytest.mark.parametrize("stops", [["ab", "abc"], ["abc", "ab"]])
def test_a_stop_that_begins_another_stops_first(stops):
    text = StopText(stops)
    assert (text.push("xa"), text.push("b"), text.stopped) == ("x", "", True)
    assert text.push("more") == text.finish() == ""


def test_of_stops_with_one_end_the_longest_counts():
    for stops in (["lo", "hello"], ["hello", "lo"]):
        assert StopText(stops).push("oh, hello there") == "oh, "


def test_the_first_complete_stop_counts_though_an_earlier_one_may_follow():
    for pieces in (["abcd"], list("abcd")):
        text = StopText(["abcd", "bc"])
        assert "".join(map(text.push, pieces)) == "a" and text.stopped


def test_nothing_to_stop_at_passes_all():
    for stops in (None, [], ()):
        text = StopText(stops)
        assert text.push("all of it") == "all of it" and not text.stopped


@pytest.mark.parametrize(
    ("stops", "exception", "message"),
    [
        ("", ValueError, "StopText: stops must not hold an empty string, got ''"),
        (["a", ""], ValueError, "StopText: stops must not hold an empty string, got ['a', '']"),
        (["a", 1], TypeError, "StopText: stops must be a string or a list of strings, got ['a'"),
        (b"a", TypeError, "StopText: stops must be a string or a list of strings, got b'a'"),
        (5, TypeError, "StopText: stops must be a string or a list of strings, got 5"),
    ],
)
def test_bad_stops(stops, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        StopText(stops)
