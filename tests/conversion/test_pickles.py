"""Paddle's pickles: every form is read, nothing that a file says is executed, and damage is an error."""

import collections
import os
import pickle
import re

import numpy as np
import pytest
import torch

from erniem_fast.conversion import RefusedPickleError
from erniem_fast.conversion.pickles import read_pickle, write_pickle
from tests.golden.cases import GOLDEN

PADDLES = GOLDEN / "paddle/base/model_state.pdparams"

ARRAYS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "columns": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "half": np.arange(1000, dtype=np.float16).reshape(10, 100),  # numpy keeps the bytes of arrays as large as this
    "big_endian": np.arange(4, dtype=">f4"),
    "integers": np.arange(4),
    "booleans": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
    "number": np.float64(2.5),
    "shapeless": np.array(3, np.int8),
}


@pytest.fixture
def written(tmp_path):
    """Writes an object, or bytes, as a file, and returns its path."""

    def write(content, protocol=2):
        path = tmp_path / "model_state.pdparams"
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
        return path

    return write


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_kind(written, protocol):
    pairs = {name: ("linear_0.w_0", array) for name, array in ARRAYS.items()}
    extra = {"StructuredToParameterName@@": {"matrix": "linear_0.w_0"}}
    for content in (ARRAYS | extra, pairs, collections.OrderedDict(ARRAYS)):
        tensors = read_pickle(written(content, protocol))
        assert tensors.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(tensors[name].numpy(), array)
            assert tensors[name].numpy().dtype == array.dtype.newbyteorder("=")
            tensors[name].fill_(1)  # a model can be trained in this memory


def test_uint16_is_bfloat16(written):
    values = torch.tensor([1.0, -2.5, 3e38, float("inf")]).bfloat16()
    tensors = read_pickle(written({"w": values.view(torch.uint16).numpy()}))
    assert tensors["w"].dtype == torch.bfloat16
    assert torch.equal(tensors["w"], values)


def test_arrays_that_paddle_cut_are_whole_again(written):
    array = np.arange(30, dtype=np.float32).reshape(5, 6)
    parts = {f"w@@.{index}": array.ravel()[index * 7 : index * 7 + 7] for index in range(5)}
    cut = {"w": {"OriginShape": (5, 6), "slices": list(parts)}}
    tensors = read_pickle(written({**parts, "b": array[0], "UnpackBigParamInfor@@": cut}))
    assert tensors.keys() == {"w", "b"}
    np.testing.assert_array_equal(tensors["w"].numpy(), array)
    del parts["w@@.3"]
    with pytest.raises(ValueError, match=r"lacks parts of 'w', which Paddle cut into slices"):
        read_pickle(written({**parts, "UnpackBigParamInfor@@": cut}))


def test_what_python_2_wrote(written):
    """Its strings were bytes, and hold the numbers."""
    number = b"S'\\x00\\x00\\x80?'\n"
    dtype = b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\nt" + dtype
    tensors = read_pickle(written(b"\x80\x02}S'w'\n" + array + b"I00\n" + number + b"tbs."))
    assert tensors["w"].tolist() == [1.0]


def test_tensors_of_static_graphs(written):
    """Paddle reduces them to an eval, which is not evaluated."""
    tensors = read_pickle(written({"w": Reduced(eval, "data", {"data": ARRAYS["matrix"]})}))
    np.testing.assert_array_equal(tensors["w"].numpy(), ARRAYS["matrix"])


def test_written_files_are_read_again(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(4).bfloat16(), "c": torch.randn(5, 3).half().T}
    write_pickle(tensors, tmp_path / "w")
    again = read_pickle(tmp_path / "w")
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    modules = set(re.findall(rb"\x8c.(numpy[\w.]*)", (tmp_path / "w").read_bytes()))
    assert modules == {b"numpy"}  # the only name that every version of numpy has
    plain = pickle.loads((tmp_path / "w").read_bytes(), encoding="latin1")  # as Paddle does
    np.testing.assert_array_equal(plain["a"], tensors["a"].numpy())


# ---- Hostile and damaged files


class Reduced:
    """What a pickle makes of it is a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE = {
    "os.system": (Reduced(os.system, "touch hacked"), r"posix\.system|nt\.system"),
    "eval": (Reduced(eval, "__import__('os').system('touch hacked')"), r"builtins\.eval of \(\"__import__"),
    "eval of names": (Reduced(eval, "data", {"data": Reduced(exec, "1")}), r"builtins.exec"),
    "eval of a text": (Reduced(eval, "data", {"data": "1"}), r"builtins\.eval of \('data'"),
    "getattr": (Reduced(getattr, "a", "upper"), r"builtins.getattr"),
    "import": (Reduced(__import__, "os"), r"builtins.__import__"),
    "numpy's loader": (Reduced(np.load, "x.npy"), r"numpy.*load"),
    "an object array": (np.array([{}, None], dtype=object), "dtype 'O8'"),
    "an array of text": (np.array(["a", "b"]), "dtype 'U1'"),
    "a structured array": (np.zeros(2, [("a", "f4"), ("b", "i4")]), "dtype 'V8'"),
    "a memory map": (b"cnumpy.core.memmap\nmemmap\n(S'/etc/passwd'\ntR.", r"numpy\.core\.memmap\.memmap"),
    "attributes": (b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.", r"_reconstruct\.__globals__"),
    "changes a function": (b"c_codecs\nencode\n}S'_function'\nI1\nsb.", "it asks to change a function"),
    "changes its slots": (b"c_codecs\nencode\n(N}S'_function'\nI1\nstb.", "it asks to change a function"),
    "another encoding": (b"c_codecs\nencode\n(S'a'\nS'rot13'\ntR.", "it encodes text as 'rot13'"),
    "an extension": (b"\x80\x02\x82\x01.", "extension code"),
    "a persistent id": (b"Pfile\n.", "persistent"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(written, tmp_path, monkeypatch, name):
    content, named = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    path = written(content if isinstance(content, bytes) else {"w": content})
    with pytest.raises((RefusedPickleError, ValueError), match=named) as caught:
        read_pickle(path)
    assert repr(str(path)) in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_the_remedy_is_told(written):
    message = r"was not read: it asks for .*\. Get the file from its publisher; if you trust it, load it in Paddle and"
    with pytest.raises(RefusedPickleError, match=message):
        read_pickle(written({"w": Reduced(os.system, "touch hacked")}))


def test_shapes_and_bytes_have_to_agree(written):
    """numpy would read beyond the bytes, if it were asked to."""
    data = pickle.dumps({"w": np.zeros(300, np.float32)}, 2)
    for count in (301, 299, -300):
        size = b"J" + (count).to_bytes(4, "little", signed=True)
        changed = data.replace(b"M" + (300).to_bytes(2, "little"), size)
        assert changed != data
        with pytest.raises(RefusedPickleError, match=rf"shape \({count},\) .* does not have the bytes for it"):
            read_pickle(written(changed))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds data of type list, not tensors by name; save model.state_dict"),
        ({"epoch": 3}, "holds data of type int by the name of 'epoch', not a tensor"),
        ({"model": {"w": np.zeros(2)}}, "holds data of type dict by the name of 'model', not a tensor"),
        ({0: np.zeros(2)}, "has a tensor by the name of 0; save the state_dict"),
        ({"w": np.zeros(2), "UnpackBigParamInfor@@": 3}, "has 3 as 'UnpackBigParamInfor@@', not what Paddle cut"),
        (b"", "is not a whole .pdparams file"),
        (b"not a pickle", "is not a whole .pdparams file"),
    ],
)
def test_other_contents_are_named(written, content, message):
    with pytest.raises(ValueError, match=message):
        read_pickle(written(content))


def test_every_cut_of_a_file_is_an_error(written):
    data = PADDLES.read_bytes()
    for length in range(0, len(data), 997):
        with pytest.raises(ValueError, match=r"is not a whole \.pdparams file"):
            read_pickle(written(data[:length]))


def test_changed_bytes_never_crash(written):
    """A byte of the opcodes changed: the file is read, refused or damaged."""
    data = pickle.dumps({"w": np.arange(4, dtype=np.float32), "b": ("n", np.zeros(1))}, 2)
    random = np.random.RandomState(0)
    outcomes = collections.Counter()
    for _ in range(300):
        changed = bytearray(data)
        changed[random.randint(len(data))] = random.randint(256)
        try:
            read_pickle(written(bytes(changed)))
            outcomes["read"] += 1
        except (RefusedPickleError, ValueError) as error:
            outcomes[type(error)] += 1
    assert len(outcomes) == 3, outcomes
