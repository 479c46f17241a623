"""Inspection: the pieces are the document, the marks are the mask."""

import html
import re

import pytest

from eagle3_ds.cli.data import as_text
from eagle3_ds.data.inspect import as_html, inspect_row
from tests.unit.chat_families import family_tokenizer
from tests.unit.data_samples import chat, data_recipe, tiny_tokenizer, write_jsonl


@pytest.fixture
def section(tmp_path):
    first = write_jsonl(
        tmp_path / "a.jsonl", [chat("one?", "uno é"), chat("<b>&", "dos\n🦊", "three?", "tres")]
    )
    (tmp_path / "b.jsonl").write_text('{"prompt": "four?", "response": "cuatro"}\n')
    return data_recipe(tmp_path, train=(first, str(tmp_path / "b.jsonl")), max_length=4).data


def test_pieces_are_the_document(section):
    tokenizer = tiny_tokenizer()
    inspection = inspect_row(section, tokenizer, 2)
    assert inspection.pieces == [
        ("<|user|><b>&<|end|><|assistant|>", False),
        ("dos\n🦊<|end|>", True),
        ("<|user|>three?<|end|><|assistant|>", False),
        ("tres<|end|>", True),
    ]
    total, learnt = len(inspection.tokens.input_ids), sum(inspection.tokens.loss_mask)
    assert (
        f"a.jsonl, line 2, shape messages: {total} tokens, {learnt} of them supervised" in inspection.summary
    )
    assert "b.jsonl, line 1, shape prompt_response" in inspect_row(section, tokenizer, 3).what
    with pytest.raises(ValueError, match="--row is 4, but .*a.jsonl, .*b.jsonl hold fewer rows"):
        inspect_row(section, tokenizer, 4)


def test_text_and_page(section):
    inspection = inspect_row(section, tiny_tokenizer(), 2)
    coloured = as_text(inspection, colour=True)
    assert coloured.plain == "".join(text for text, _ in inspection.pieces)
    assert [
        coloured.plain[span.start : span.end] for span in coloured.spans if "green" in str(span.style)
    ] == [text for text, flag in inspection.pieces if flag]
    assert as_text(inspection, colour=False).plain.count(">>>") == 2
    page = as_html(inspection)
    found = re.search("<pre>(.*)</pre>", page, re.DOTALL)
    assert found is not None
    body = found.group(1)
    assert [html.unescape(text) for text in re.findall("<mark>(.*?)</mark>", body, re.DOTALL)] == [
        text for text, flag in inspection.pieces if flag
    ]
    assert html.unescape(re.sub("</?mark>", "", body)) == coloured.plain
    assert "http" not in page


@pytest.mark.parametrize("family", ["mistral", "phi", "gemma"])
def test_sentence_pieces_keep_their_spaces(section, family):
    tokenizer = family_tokenizer(family)
    inspection = inspect_row(section, tokenizer, 1)
    assert "".join(text for text, _ in inspection.pieces) == tokenizer.decode(inspection.tokens.input_ids)
