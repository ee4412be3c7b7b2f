"""Records from text files."""

from itertools import islice

import pytest

from erniem_fast.pretraining import Pair, Sentence, TextFiles, TsvFiles


@pytest.fixture
def texts(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_bytes("\ufeffone\r\n\r\n zwei \n\u2028drei".encode())
    second.write_bytes("四\n\n".encode())
    return TextFiles(first, second, language="de")


def test_texts(texts):
    """Without empty lines, ends of lines, and the mark of an encoding; twice the same."""
    for _ in range(2):
        assert [each.text for each in texts] == ["one", "zwei", "drei", "四"]
    assert set(texts) == {Sentence(each, "de") for each in ("one", "zwei", "drei", "四")}


@pytest.mark.parametrize("count", range(5))
def test_reading_goes_on(count, texts, tmp_path):
    """After any line, also at the end of a file; an iteration beside it does not disturb it."""
    expected, lines = list(texts), iter(texts)
    assert list(islice(lines, count)) == expected[:count]
    state = texts.state_dict()
    again = TextFiles(*texts.paths, language="de")
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert list(again) == expected[count:]
    assert list(again) == list(texts) == expected
    assert list(lines) == expected[count:]


def test_the_state_of_other_files_is_refused(texts):
    """It would be taken for the end of an epoch, and the lines would be left out."""
    list(texts)
    state, one = texts.state_dict(), TextFiles(texts.paths[0])
    with pytest.raises(ValueError, match=r"at byte 4 of file 1, which .*a\.txt do not have"):
        one.load_state_dict(state)
    texts.paths[1].write_text("五", encoding="utf-8")
    with pytest.raises(ValueError, match=r"at byte 4 of file 1, which .*b\.txt do not have"):
        texts.load_state_dict(state)


def test_columns(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text('lang\ten\txx\nde\t"a\tb"\n\nfr\tc\td\textra\n', encoding="utf-8")
    pairs = TsvFiles(path, source="en", target="xx", source_language="en-US", target_language="lang")
    assert list(pairs) == [Pair('"a', 'b"', "en-US", "de"), Pair("c", "d", "en-US", "fr")]
    assert list(TsvFiles(path, source="lang", target="en")) == [Pair("de", '"a'), Pair("fr", "c")]
    with pytest.raises(ValueError, match="columns lang, en, xx, and none called 'source'"):
        TsvFiles(path)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt is not a file"):
        TextFiles(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="no paths; name a file"):
        TextFiles()
    path = tmp_path / "bad"
    path.write_bytes(b"good\nb\xe9se\n")
    with pytest.raises(ValueError, match="not UTF-8 in the line that ends at byte 10"):
        list(TextFiles(path))
    path.write_text("source\ttarget\nlonely\n", encoding="utf-8")
    with pytest.raises(ValueError, match="1 columns in the line 'lonely'"):
        list(TsvFiles(path))
