"""The least work of every op of the model, counted by hand."""

from bench.roofline import Work
from erniem_fast import ErnieMModel

OPS = ("embeddings", "attention", "add_norm", "bias_gelu")
MATRIX_PRODUCTS, OPTIMIZER = "matrix products", "AdamW"


def count_work(model: ErnieMModel, lengths: list[int], training: bool) -> dict[str, Work]:
    """The work of every op on sequences of these lengths, of all layers together."""
    config, size = model.config, model.dtype.itemsize
    tokens, layers, hidden, inner = sum(lengths), config.num_hidden_layers, config.hidden_size, config.intermediate_size
    pairs = sum(length**2 for length in lengths)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    table = model.get_input_embeddings().weight.numel()
    # Rows of `hidden` that an op reads and writes for each token. Backward of a norm: two gradients come out of one and
    # the op's two inputs; of a GELU: one out of one and its input; of attention: q, k and v, and their gradients.
    moved = {"embeddings": (3, 3), "attention": (4, 8), "add_norm": (3, 5)}
    forward, backward = ({op: rows[i] * tokens * hidden for op, rows in moved.items()} for i in range(2))
    elements = {op: forward[op] + training * backward[op] for op in moved}
    products = 2 * tokens * (4 * hidden**2 + 2 * hidden * inner)
    return {
        MATRIX_PRODUCTS: Work(flops=layers * products * (3 if training else 1)),
        "attention": Work(
            layers * elements["attention"] * size, layers * 4 * pairs * hidden * (3.5 if training else 1)
        ),
        "add_norm": Work(bytes=2 * layers * elements["add_norm"] * size),
        "bias_gelu": Work(bytes=layers * (5 if training else 2) * tokens * inner * size),
        "embeddings": Work(bytes=elements["embeddings"] * size),
        # Of the word table's gradient only the batch's words are in memory.
        **({OPTIMIZER: Work(bytes=(7 * parameters - table) * size)} if training else {}),
    }
