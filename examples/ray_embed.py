"""Embeds a file or a folder of texts with Ray Data: on this machine, or on the cluster that RAY_ADDRESS names.

    pip install 'erniem-fast[ray]'
    python examples/ray_embed.py --model intfloat/multilingual-e5-small --input texts.jsonl --output vectors \\
        --workers 4 --cpus 2 --weights int8

The output is a folder of Parquet files with all columns of the input, and the vectors in `embedding`.
"""

import argparse
import sys
from pathlib import Path

import ray

from erniem_fast.embedding import Embedder

READERS = {
    ".jsonl": ray.data.read_json,
    ".csv": ray.data.read_csv,
    ".parquet": ray.data.read_parquet,
    ".txt": ray.data.read_text,  # into a column `text`
}


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    ray.init(ignore_reinit_error=True)
    ray.data.DataContext.get_current().execution_options.preserve_order = arguments.keep_order
    rows = READERS[arguments.format or Path(arguments.input).suffix](arguments.input)
    embedded = rows.map_batches(
        Embedder,
        fn_constructor_kwargs={"model": arguments.model, "column": arguments.column, "weights": arguments.weights},
        compute=ray.data.ActorPoolStrategy(size=arguments.workers),
        num_cpus=arguments.cpus,
        num_gpus=arguments.gpus,
        batch_size=arguments.batch_size,
    )
    embedded.write_parquet(arguments.output)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that all workers can read, or a name on the hub")
    parser.add_argument("--input", required=True, help="a file or a folder, here or in a cloud's storage")
    parser.add_argument("--format", choices=READERS, help="of the input, if its name does not end so")
    parser.add_argument("--output", required=True, help="a folder for Parquet files")
    parser.add_argument("--column", default="text", help="the column of the texts (default: text)")
    parser.add_argument("--weights", help="as of erniem_fast.optimize, for example int8")
    parser.add_argument("--workers", type=int, default=1, help="processes that hold the model (default: 1)")
    parser.add_argument("--cpus", type=int, default=1, help="CPUs of each worker (default: 1)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each worker (default: 0)")
    parser.add_argument("--batch-size", type=int, default=1024, help="rows that a worker is given (default: 1024)")
    parser.add_argument("--keep-order", action="store_true", help="write rows in the order in which they were read")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
