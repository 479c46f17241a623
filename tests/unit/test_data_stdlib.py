"""The standard library as a corpus: deterministic, well formed, nothing shown twice."""

from itertools import islice

from eagle3_ds.data.chat import validate_messages
from eagle3_ds.data.stdlib_corpus import MAX_CHARACTERS, stdlib_conversations, stdlib_files, stdlib_text


def test_conversations():
    rows = list(stdlib_conversations())
    assert len(rows) > 2000
    questions = []
    for number, row in enumerate(rows):
        messages = validate_messages(row["messages"], f"row {number}")
        turns = [message["content"] for message in messages if message["role"] != "system"]
        assert 2 <= len(turns) <= 12
        assert sum(map(len, turns)) <= MAX_CHARACTERS + 200
        questions += turns[::2]
    sizes = sorted(sum(len(message["content"]) for message in row["messages"]) for row in rows)
    assert sizes[len(sizes) // 10] < 1000 and sizes[-len(sizes) // 50] > 4000
    assert {len(row["messages"]) // 2 for row in rows} == {1, 2, 3, 4, 5, 6}
    assert rows == list(stdlib_conversations())


def test_text_is_cut_at_the_byte():
    assert sum(len(text.encode()) for text in stdlib_text(300_000)) in range(299_990, 300_001)
    assert list(stdlib_text(50_000)) == list(stdlib_text(50_000))
    assert all(isinstance(text, str) for text in islice(stdlib_text(), 5))


def test_no_tests_among_the_files():
    names = [path.as_posix() for path in stdlib_files()]
    assert len(names) > 300 and names == sorted(names)
    assert not [name for name in names if "/test/" in name or "/site-packages/" in name]
