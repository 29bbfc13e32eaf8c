"""Searches of logs: their grammar, the words of a text, and what the index makes of both."""

from __future__ import annotations

import itertools
import sqlite3
import sys
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from typing import Any

import attrs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import iiot

LIMITS = iiot.Limits()
TOKENIZER = "unicode61 remove_diacritics 2"
LINES = (
    "Motorstart of pump 7 refused: E-4711",
    "motor start, E 4711 again",
    "Motor-Start done",
    "10.0.0.7 unreachable",
    r"cannot write C:\temp\x.log: 50% full",
    "Lager überhitzt, es ist zu heiß",
    "it's near a b foo\"bar text a a+b {x} ^x col : x",
    "port a:b and not or",
    "start the motor",
)


def index() -> closing[sqlite3.Connection]:
    """An index of logs like the server's."""
    connection = sqlite3.connect(":memory:")
    connection.execute(f"create virtual table line using fts5(who, text, content='', tokenize='{TOKENIZER}')")
    return closing(connection)


def put(connection: sqlite3.Connection, lines: Collection[tuple[str, str]]) -> None:
    rows = [(number, who, text) for number, (who, text) in enumerate(lines, 1)]
    connection.executemany("insert into line (rowid, who, text) values (?, ?, ?)", rows)


def find(connection: sqlite3.Connection, expression: str) -> list[int]:
    return [number for (number,) in connection.execute("select rowid from line where line match ? order by rowid", (expression,))]


def dictionary(search: iiot.Search, texts: Collection[str]) -> dict[str, list[str]]:
    """The words of these texts that contain a part of the search."""
    words = {word for text in texts for word in iiot.words_of(text)}
    return {part: [word for word in words if part in word] for part in iiot.parts_of(search)}


@pytest.fixture(scope="module")
def lines() -> Iterator[sqlite3.Connection]:
    """LINES, each once for tenant 5 and once for tenant 6."""
    with index() as connection:
        put(connection, [(who, text) for who in ("t5 d1", "t6 d2") for text in LINES])
        yield connection


def found_lines(connection: sqlite3.Connection, q: str) -> list[int]:
    """Which of LINES are found for tenant 5, from 0 on."""
    search = iiot.parse_search(q, LIMITS)
    return [number - 1 for number in find(connection, iiot.match_expression(search, dictionary(search, LINES), "t5"))]


def refusal(q: str, limits: iiot.Limits = LIMITS) -> tuple[int, str]:
    """Where a search is refused, and why."""
    with pytest.raises(iiot.Invalid) as caught:
        iiot.parse_search(q, limits)
    at = int(caught.value.at.removeprefix(":"))
    assert caught.value.at == f":{at}"
    assert str(caught.value).startswith(f"at character {at}: ")
    return at, str(caught.value)


# ---- what is found

ALL = list(range(len(LINES)))


@pytest.mark.parametrize(
    ("q", "found"),
    [
        ("motor", [0, 1, 2, 8]), ("MOTOR", [0, 1, 2, 8]), ("*tor*", [0, 1, 2, 8]), ('"motor"', [1, 2, 8]), ("start", [0, 1, 2, 8]),
        ("torst", [0]), ("mo", []), ("mo*", [0, 1, 2, 8]), ("motors*", [0]), ("E-4711", [0, 1]), ("E-47*", [0, 1]), ("E-47", []),
        ("motor-start", [1, 2]), ('"motor start"', [1, 2]), ('"motor sta"', []), ('"motor sta"*', [1, 2]), ("motor start", [0, 1, 2, 8]),
        ("10.0.0.7", [3]), ("0.0.10.7", []), ("a:b", [6, 7]), (r"C:\temp", [4]), ("50%", [4]), ("überhitzt", [5]), ("UBERHITZT", [5]),
        ("u\u0308berhitzt", [5]), ("hitz", [5]), ("heiß", [5]), ("heiss", []), ("it's", [6]), ('foo"bar', [6]), ("^x", [4, 6]),
        ("a+b", [6, 7]),
        ("{x}", [4, 6]), ("NEAR(a b)", [6]), ("text:a", [6]), ("text:motor", []), ("who:t5", []), ("t5", []), ("t6 OR d2", []),
        ("-motor", [0, 1, 2, 8]), ("near*", [6]), ('"a*b"', [6, 7]), (r'"foo\"bar"', [6]), ('"foo""bar"', [6]), (r'"C:\temp\\"', [4]),
        ('"AND"', [7]), ("and", [7]), ("not or", [7]), ("AND*", [7]),
        ("motor AND start", [0, 1, 2, 8]), ("pump OR lager", [0, 5]), ("motor NOT pump", [1, 2, 8]), ("motor AND NOT pump", [1, 2, 8]),
        ("NOT motor", [3, 4, 5, 6, 7]), ("NOT NOT motor", [0, 1, 2, 8]), ("NOT motor OR pump", [0, 3, 4, 5, 6, 7]),
        ("NOT motor NOT x", [3, 5, 7]), ("NOT (motor OR x)", [3, 5, 7]), ("NOT motor OR NOT done", [0, 1, 3, 4, 5, 6, 7, 8]),
        ("NOT nothing", ALL), ("nothing", []), ("nothing OR NOT nothing", ALL), ("nothing AND NOT nothing", []), ("NOT (NOT pump)", [0]),
        ("pump OR lager zu", [0, 5]), ("(pump OR lager) zu", [5]), ("pump OR NOT motor lager", [0, 5]), ("((pump))", [0]),
        ("pump(refused)", [0]), ("NOT(motor)x", [4, 6]), ('"start""', None), ("x\tOR\u00a0pump", [0, 4, 6]), ('"pump"lager', []),
        ("motor\0start", [1, 2]), ("motor\ud800start", [1, 2]), ("__pump__", [0]), ("col : x", None), ('"col : x"', [6]),
    ],
)  # fmt: skip
def test_a_search_finds_what_an_engineer_means(lines: sqlite3.Connection, q: str, found: list[int] | None) -> None:
    if found is None:
        refusal(q)
    else:
        assert found_lines(lines, q) == found


@pytest.mark.parametrize(
    ("q", "at", "why"),
    [
        ("", 1, "nothing to search for"), ("  ", 1, "nothing to search for"), ("--", 1, "-- has no letter"),
        ("pump -> x", 6, "-> has no letter"), ("x pu*mp", 5, "a star stands at the end"),
        ("col : x", 5, ": has no letter"), ("%", 1, "% has no letter"), ("*", 1, "* has no letter"), ('a ""', 3, '"" has no letter'),
        ('pump "\u0308 *"*', 6, "has no letter"), ('x "abc', 3, "no closing"), ('x "abc\\"', 3, "no closing"), ('"a""', 4, "no closing"),
        ("(a", 1, "is not closed"), ("a (b (c)", 3, "is not closed"), ("a)", 2, "was not opened"), ("a) b", 2, "was not opened"),
        ("main()", 6, "missing before )"), (")", 1, "missing before )"), ("(", 1, "after ( a word"), ("a AND", 3, "after AND a word"),
        ("a OR ", 3, "after OR a word"), ("NOT", 1, "after NOT a word"), ("AND a", 1, "missing before AND"),
        ("a OR OR b", 6, "missing before OR"),
        ("a AND OR b", 7, "missing before OR"), ("NOT AND", 5, "missing before AND"), ("(a OR) b", 6, "missing before )"),
        ("(" * 10_000, 1_025, "longer than"), ("(" * 1_000, 9, "deeper than 8"), ("(a " * 9 + ")" * 9, 25, "deeper than 8"),
        ("a " * 51, 101, "more than 50"),
    ],
)  # fmt: skip
def test_a_bad_search_says_where_and_why(q: str, at: int, why: str) -> None:
    assert refusal(q)[0] == at
    assert why in refusal(q)[1]


def test_parentheses_without_end_are_refused_whatever_the_length() -> None:
    assert refusal("(" * 10_000, attrs.evolve(LIMITS, search_characters=100_000))[0] == LIMITS.search_depth + 1
    nots = iiot.parse_search("NOT " * 10_001 + "a", attrs.evolve(LIMITS, search_characters=100_000))
    assert nots == iiot.Group("NOT", (iiot.Term("a"),))


@pytest.mark.parametrize(
    ("q", "parts"),
    [
        ("Überhitzt", {"uberhitzt"}), ("motor NOT (Pump OR 471)", {"motor", "pump", "471"}), ("50%", set()), ("100%", {"100"}),
        ("ab", set()),
        ('"motor"', set()), ("motor*", set()), ("*motor*", {"motor"}), ("E-4711", set()), ("_motor_", {"motor"}), ("Straße", {"straße"}),
    ],
)  # fmt: skip
def test_the_parts_to_look_up_are_plain_words_of_three_letters(q: str, parts: set[str]) -> None:
    assert iiot.parts_of(iiot.parse_search(q, LIMITS)) == parts


@pytest.mark.parametrize(
    ("q", "expression"),
    [
        ("ab", '{who} : (t5) AND {text} : ("ab")'),
        ("motor", '{who} : (t5) AND {text} : (("motor" OR "motors" OR "s""x"))'),
        ("Motor*", '{who} : (t5) AND {text} : ("Motor" *)'),
        ("NOT a", '{who} : (t5) NOT {text} : ("a")'),
        ("a AND NOT b c NOT d", '{who} : (t5) AND {text} : ((("a" AND "c") NOT ("b" OR "d")))'),
        ("NOT a OR b", '{who} : (t5) NOT {text} : (("a" NOT "b"))'),
    ],
)
def test_the_expression_of_the_index(q: str, expression: str) -> None:
    words = {"motor": ["motors", "motor", 's"x'], "other": ["y"]}
    assert iiot.match_expression(iiot.parse_search(q, LIMITS), words, "t5") == expression


DEEP = (
    "NOT (motor OR {})",
    "motor NOT ({})",
    "motor AND ({})",
    "b OR NOT c AND ({})",
    "b c OR NOT d e NOT ({})",
    "NOT b OR c AND NOT ({})",
)


@pytest.mark.parametrize("shape", list(itertools.product(DEEP, repeat=2)))
def test_the_index_takes_the_deepest_search(shape: tuple[str, str]) -> None:
    q = "x OR motor NOT b"
    for level in range(LIMITS.search_depth):
        q = shape[level % 2].format(q)
    search = iiot.parse_search(q, LIMITS)
    assert refusal(shape[0].format(q))[1].endswith("deeper than 8")
    with index() as connection:
        find(connection, iiot.match_expression(search, {"motor": ["motors", "motorstart"]}, "t5 AND (d1 OR d2)"))


def test_the_index_takes_a_thousand_words_for_each_of_the_most_terms() -> None:
    search = iiot.parse_search(" ".join(f"part{number}" for number in range(LIMITS.search_terms)), LIMITS)
    words = {part: [f"{part}x{number}" for number in range(1_000)] for part in iiot.parts_of(search)}
    with index() as connection:
        put(connection, [("t5", " ".join(words[part][-1] for part in words))])
        assert find(connection, iiot.match_expression(search, words, "t5")) == [1]


# ---- the words of a text


def is_older(character: str) -> bool:
    """Whether the index's tables know a character as Python does: those are of Unicode 6.1, so what was there before is the
    same, but for two letters that became marks since."""
    return unicodedata.ucd_3_2_0.category(character) not in ("Cn", "Cs") and character not in "\u1885\u1886"


def tokens(texts: list[str]) -> list[list[str]]:
    """The words of texts in their order, as the index itself has them."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(f"create virtual table line using fts5(text, tokenize='{TOKENIZER}')")
        connection.execute("create virtual table word using fts5vocab(line, 'instance')")
        connection.executemany("insert into line (rowid, text) values (?, ?)", enumerate(texts))
        words: list[list[str]] = [[] for _ in texts]
        for number, word in connection.execute("select doc, term from word order by doc, offset"):
            words[number].append(word)
        return words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []), ("--", []), ("Motor-Start_7", ["motor", "start", "7"]), ("10.0.0.7", ["10", "0", "0", "7"]), ("it's", ["it", "s"]),
        ("ÜBERHITZT heiß", ["uberhitzt", "heiß"]), ("u\u0308ber \u0308x", ["uber", "x"]), ("ΣΊΣΥΦΟΣ", ["σίσυφοσ"]),
        ("Йод ё", ["йод", "ё"]),
        ("ệ İ ﬁ ǅ", ["e", "i", "ﬁ", "ǆ"]), ("m³ ½ Ⅷ ٣", ["m³", "½", "ⅷ", "٣"]), ("電動機 5℃", ["電動機", "5"]),
        ("🔥heiß 🟢online", ["heiß", "🟢online"]),
        ("a\0b\x1cc\u00a0d\u200be", ["a", "b", "c", "d", "e"]), ("a_ü_b", ["a", "u", "b"]), ("\ue000x", ["\ue000x"]),
    ],
)  # fmt: skip
def test_the_words_of_a_text_are_those_of_the_index(text: str, words: list[str]) -> None:
    assert iiot.words_of(text) == words
    assert tokens([text]) == [words]


def differing(characters: list[str]) -> list[str]:
    """Those that the words of a text treat otherwise than the index does, inside a word or alone."""
    texts = [f"Ab{character}cD {character}" for character in characters]
    return [text[2] for text, words in zip(texts, tokens(texts), strict=True) if iiot.words_of(text) != words]


def test_every_character_is_to_a_word_what_it_is_to_the_index() -> None:
    characters = [chr(code) for code in range(sys.maxunicode + 1) if is_older(chr(code))]
    assert len(characters) > 230_000
    assert differing(characters) == []


def test_what_is_younger_than_the_tables_of_the_index_is_so_too_where_it_stands_in_logs() -> None:
    """Pictographs and currencies; of letters and digits all but 23 of two scripts, which were signs then."""
    signs = [chr(code) for code in (*range(0x20A0, 0x20D0), *range(0x2190, 0x2400), *range(0x2500, 0x2C00), *range(0x1F000, 0x1FB00))]
    assert differing([sign for sign in signs if unicodedata.category(sign) != "Cn"]) == []
    letters = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] in "LN"]
    assert len(differing(letters)) <= 23


SHOWN = st.characters(exclude_categories=["Cs", "Cn"]).filter(is_older)
TEXTS = st.text(st.one_of(SHOWN, st.sampled_from("aB3 -_.ßÜu\u0308\u0301\u0131İΣ\0\u00a0")), max_size=40)


@settings(max_examples=60)
@given(st.lists(TEXTS, min_size=50, max_size=100))
def test_the_words_of_any_text_are_those_of_the_index(texts: list[str]) -> None:
    assert [iiot.words_of(text) for text in texts] == tokens(texts)


@settings(max_examples=60)
@given(st.lists(TEXTS, min_size=30, max_size=60))
def test_a_word_of_the_dictionary_finds_the_line_it_came_from(texts: list[str]) -> None:
    with index() as connection:
        put(connection, [("t5", text) for text in texts])
        for number, text in enumerate(texts, 1):
            for word in set(iiot.words_of(text)):
                assert number in find(connection, f"{{text}} : ({iiot.quoted_for_index(word)})"), word


# ---- any search

PIECES = st.sampled_from(
    ["motor", "Start", "pump", "E-4711", "über", "AND", "OR", "NOT", "(", ")", '"', '""', "\\", "*", "%", "who", "t6", ":", "{", "}",
     "^", "+", "-", "NEAR", ",", "\0", "\ud800", "'", " ", " ", " ", "motor pump", '"motor start"', "mo*", "(motor", "pump)"]
)  # fmt: skip
ANY_SEARCH = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=25).map("".join), st.lists(PIECES, max_size=25).map(" ".join))


@settings(max_examples=1_500)
@given(ANY_SEARCH)
@example("\U0001fbff")
def test_any_text_is_a_search_of_ones_own_lines_or_refused_at_a_character(lines: sqlite3.Connection, q: str) -> None:
    try:
        search = iiot.parse_search(q, LIMITS)
    except iiot.Invalid:
        assert 1 <= refusal(q)[0] <= max(1, len(q))
    else:
        found = find(lines, iiot.match_expression(search, dictionary(search, LINES), "t5"))
        others = find(lines, iiot.match_expression(iiot.negated(search), dictionary(search, LINES), "t5"))
        assert sorted(found + others) == [number + 1 for number in ALL]


Tree = tuple[Any, ...]  # ("word" or "phrase" or "prefix", text) or ("AND" or "OR" or "NOT", Tree, …)
WORDS = ("motor", "motorstart", "start", "art", "pump", "pumpe", "no", "a", "E-1", "e")
LEAVES = st.one_of(
    st.tuples(st.sampled_from(["word", "prefix"]), st.sampled_from(WORDS)),
    st.tuples(st.just("phrase"), st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(" ".join)),
)
TREES: st.SearchStrategy[Tree] = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.tuples(st.sampled_from(["AND", "OR"]), inner, inner), st.tuples(st.just("NOT"), inner)),
    max_leaves=8,
)
BINDS: Mapping[str, int] = {"OR": 1, "AND": 2, "NOT": 3}


def written(tree: Tree, within: int = 0) -> str:
    """A tree as a search, with no parenthesis that it could do without."""
    kind = tree[0]
    if kind not in BINDS:
        return {"word": "{}", "prefix": "{}*", "phrase": '"{}"'}[kind].format(tree[1])
    inner = [written(part, BINDS[kind]) for part in tree[1:]]
    text = f"NOT {inner[0]}" if kind == "NOT" else (" " if kind == "AND" and len(inner[0]) % 2 else f" {kind} ").join(inner)
    return f"({text})" if BINDS[kind] < within else text


def holds(tree: Tree, words: list[str]) -> bool:
    """Whether a line of these words is what a tree looks for."""
    kind, *inner = tree
    if kind == "NOT":
        return not holds(inner[0], words)
    if kind in BINDS:
        return (all if kind == "AND" else any)([holds(part, words) for part in inner])
    sought = inner[0].lower().replace("-", " ").split()
    if kind == "word" and len(sought) == 1 and len(sought[0]) >= 3:
        return any(sought[0] in word for word in words)
    text, end = " " + " ".join(words) + " ", "" if kind == "prefix" else " "
    return f" {' '.join(sought)}{end}" in text


@settings(max_examples=1_000)
@given(TREES, st.lists(st.lists(st.sampled_from(WORDS), max_size=5), min_size=1, max_size=12))
@example(("OR", ("NOT", ("AND", ("word", "a"), ("NOT", ("word", "no")))), ("word", "pump")), [["a"], ["no", "pump"], ["a", "no"], []])
def test_a_model_finds_the_same_lines(tree: Tree, contents: list[list[str]]) -> None:
    texts = [", ".join(content) for content in contents]
    with index() as connection:
        put(connection, [(f"t{5 + number % 2}", text) for number, text in enumerate(texts)])
        search = iiot.parse_search(written(tree), LIMITS)
        found = find(connection, iiot.match_expression(search, dictionary(search, texts), "t5"))
    model = [" ".join(content).lower().replace("-", " ").split() for content in contents]
    assert found == [number for number, words in enumerate(model, 1) if number % 2 and holds(tree, words)]
