"""The functions of csrc/, called from several threads at once."""

import subprocess
import sys

import pytest

from erniem_fast import extension

pytestmark = pytest.mark.skipif(not extension.is_built("cpu"), reason="the native library cannot be built here")


THREADS = """
import sys, threading
import torch
from erniem_fast import ErnieMConfig, ErnieMModel
from erniem_fast.ops import native
from erniem_fast.ops.native_encoder import few_tokens

sys.setswitchinterval(1e-6)
torch.set_num_threads(1)
sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
model = ErnieMModel(ErnieMConfig(vocab_size=9, **sizes)).eval()
ids, x, weight, failures = torch.full((1, 5), 7), torch.ones(4, 8), torch.ones(8, 8), []
barrier = threading.Barrier(8)

def first_calls():
    barrier.wait()
    model(ids).pooler_output.sum().backward()
    with torch.inference_mode():
        model(ids)
    for _ in range(600):
        native._linked.cache_clear()  # so that the next call is a first one
        few_tokens(torch.empty(4, 8), x, weight, None)

def run():
    try:
        first_calls()
    except Exception as error:
        failures.append(repr(error))

threads = [threading.Thread(target=run) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(failures)
"""


def test_first_calls_from_several_threads():
    result = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stdout + result.stderr
