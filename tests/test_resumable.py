"""Output files that survive a stop, and the digests that say whether a run may go on."""

import pytest

from erniem_fast import resumable
from erniem_fast.resumable import ResumableOutput, digest, digest_of_folder


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def begin(output, **description):
    return ResumableOutput(output, description, ["a", "b"])


def finish(run):
    run.finish(lambda whole: whole.write_bytes((run.folder / "a").read_bytes() + (run.folder / "b").read_bytes()))


def test_parts_are_cut_to_what_was_appended(output):
    with begin(output) as run:
        run.append(2, a=b"one ", b=b"1")
        (run.folder / "a").write_bytes(b"one half of a r")
    with begin(output) as run:
        assert run.rows == 2
        run.append(1, a=b"two ")
        run.append(3, b=b"2")
        assert run.rows == 6
        finish(run)
    assert output.read_bytes() == b"one two 12"
    assert [output] == list(output.parent.iterdir())


def test_a_part_that_lost_bytes_is_refused(output):
    with begin(output) as run:
        run.append(1, a=b"one", b=b"1")
        (run.folder / "a").write_bytes(b"o")
    with pytest.raises(ValueError, match=r"lost some of its 3 bytes; remove .*out\.partial to begin anew"):
        begin(output)


def test_a_broken_state_is_refused(output):
    with begin(output) as run:
        (run.folder / "state.json").write_text("")
    with pytest.raises(ValueError, match=r"state\.json is broken .*; remove the folder to begin anew"):
        begin(output)


def test_an_error_of_the_disk_says_how_to_go_on(output, capsys):
    def work():
        with begin(output) as run:
            run.append(1, a=b"one")
            raise OSError("No space left on device")

    assert resumable.run(work, output) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert f"Start the same command again to go on from {output}.partial." in error


def test_one_process_at_a_time(output):
    with begin(output) as run:
        with pytest.raises(ValueError, match=r"Another process works in .*out\.partial; wait for it"):
            begin(output)
        run.append(1, a=b"one", b=b"1")
    with begin(output) as run:
        assert run.rows == 1


def test_an_output_that_is_there_is_refused(output):
    output.write_text("work")
    with pytest.raises(ValueError, match="is there already; remove it, or name another file"):
        begin(output)
    with pytest.raises(ValueError, match=r"there is no folder .*missing; make it first"):
        begin(output.with_name("missing") / "out")
    assert [output] == list(output.parent.iterdir())


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"x": 1, "same": 0}, {"x": 2, "same": 0}, "another way: x was 1 and is 2. Start"),
        ({"x": 1}, {"y": [True]}, "x was 1 and is None; y was None and is [True]. Start"),
        ({"x": {"b": 1, "a": 2}}, {"x": {"a": 2, "b": 1}}, "x was {'b': 1, 'a': 2} and is {'a': 2, 'b': 1}. Start"),
    ],
)
def test_what_changed_is_named(output, before, now, message):
    begin(output, **before).__exit__()
    with pytest.raises(ValueError, match="it as before to go on, or remove the folder") as error:
        begin(output, **now)
    assert message in str(error.value)
    begin(output, **before).__exit__()


def test_tuples_are_the_lists_that_json_holds(output):
    begin(output, x=("a", 1)).__exit__()
    begin(output, x=("a", 1)).__exit__()


def test_digest_of_a_file(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # The example of FIPS 180-2, appendix B.1
    assert digest(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder with a file that is digested whole, and one of which every other byte is, and the last."""
    monkeypatch.setattr(resumable, "PIECE", 1)
    monkeypatch.setattr(resumable, "PIECES", 8)
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "small").write_bytes(bytes(8))
    (folder / "1_Pooling/large").write_bytes(bytes(16))
    return folder


@pytest.mark.parametrize(("name", "places"), [("small", range(8)), ("1_Pooling/large", [*range(0, 16, 2), 15])])
def test_changed_contents_change_the_digest_of_a_folder(model, name, places):
    before, size = digest_of_folder(model), (model / name).stat().st_size
    for place in places:
        (model / name).write_bytes(bytes(place) + b"x" + bytes(size - place - 1))
        assert digest_of_folder(model) != before, place
    (model / name).write_bytes(bytes(size))
    assert digest_of_folder(model) == before


def test_names_and_sizes_change_the_digest_of_a_folder(model):
    digests = [digest_of_folder(model)]
    (model / "1_Pooling/large").write_bytes(bytes(17))
    digests.append(digest_of_folder(model))
    (model / "small").rename(model / "other")
    digests.append(digest_of_folder(model))
    (model / "empty").touch()
    assert len({*digests, digest_of_folder(model)}) == 4


def test_a_run_may_write_into_the_folder_of_its_model(model):
    before = digest_of_folder(model)
    with begin(model / "out") as run:
        run.append(1, a=b"one", b=b"1")
        assert digest_of_folder(model) == before
