"""`Embedder`: what Ray Data maps texts to vectors with."""

import os
import sys

import numpy as np
import torch

from .loading import load
from .vectors import embed


class Embedder:
    """A model that adds vectors to batches of rows, for `ds.map_batches(Embedder, ...)` of Ray Data.

        ds.map_batches(
            Embedder,
            fn_constructor_kwargs={"model": "intfloat/multilingual-e5-small", "weights": "int8"},
            compute=ray.data.ActorPoolStrategy(size=4),  # workers; concurrency=4 in older releases
            num_cpus=8,  # of each worker
            batch_size=1024,
        )

    Each worker loads the model once and computes with as many threads as it has CPUs. Ray starts a worker that died
    anew, and gives its batch to a worker again, so that no row is lost. Columns stay beside the vectors; rows keep
    their order if `ray.data.DataContext.get_current().execution_options.preserve_order = True`.
    """

    def __init__(
        self,
        model: str,
        *,
        column: str = "text",
        output_column: str = "embedding",
        weights: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        threads: int | None = None,
        **options,
    ) -> None:
        """Loads the model.

        Args:
            model: a folder with a model and its tokenizer, which all workers can read, or a name on the hub; a
                `SentenceTransformer` where modules.json is.
            column: of the texts.
            output_column: of the vectors, float32 `(rows, dimension)`.
            weights: as of `erniem_fast.optimize`.
            device: by default the GPU that the worker was given, or else the CPU.
            dtype: of the model: `float32`, `bfloat16` or `float16`.
            threads: of torch; by default the CPUs that Ray gives to the worker. Outside of Ray they stay as they are.
            options: of `erniem_fast.embed`.
        """
        threads = _assigned_cpus() if threads is None else threads
        if threads is not None:
            torch.set_num_threads(threads)
            os.environ["RAYON_NUM_THREADS"] = str(threads)  # of fast tokenizers
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model, tokenizer = load(model, weights, device, dtype)
        self.column, self.output_column = column, output_column
        self.options = {"show_progress_bar": False, "tokenizer": tokenizer, **options}
        embed(self.model, [], **self.options)  # what is wrong with the options is told before there are rows

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch, with a column more.

        Raises:
            TypeError: the batch is no dictionary of arrays, or a text is no string.
            ValueError: the batch has no such column, or one with the name of the vectors' column.
        """
        if not isinstance(batch, dict):
            raise TypeError(f"batch is of type {type(batch).__name__}; pass batch_format='numpy' to map_batches.")
        if self.column not in batch:
            raise ValueError(f"column={self.column!r} is not in the rows; they have {', '.join(batch)}.")
        if self.output_column in batch:
            raise ValueError(f"output_column={self.output_column!r} is in the rows already; name another one.")
        return {**batch, self.output_column: embed(self.model, batch[self.column], **self.options)}


def _assigned_cpus() -> int | None:
    """The CPUs of this worker of Ray, one at least; None outside of a worker."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.get_actor_id() is None and context.get_task_id() is None:
        return None
    return max(1, int(context.get_assigned_resources().get("CPU", 1)))
