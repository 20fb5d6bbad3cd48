"""What a forward and a backward pass have to compute and to move. Plain Python, imports nothing heavy.

Floating point operations, a multiply-add being two, of the products alone: everything pointwise is small beside them. Bytes are
those that pass through the device's memory if no tensor that is as long as the sequence stays in a cache: each such tensor as
often as a product or a time loop goes over it. The matrix of a recurrence is read once per step, from a cache; those bytes are
counted apart.
"""

from typing import NamedTuple

FLOAT = 4  # bytes

GATES = {"rnn": 1, "lstm": 4, "gru": 3, "nn.RNN": 1, "nn.LSTM": 4, "nn.GRU": 3}


class Work(NamedTuple):
    """Of a forward and a backward pass.

    Attributes:
        flops: operations.
        bytes: bytes through the memory.
        matrix_bytes: bytes of matrices through the caches, per step and row of the batch.
    """

    flops: float
    bytes: float
    matrix_bytes: float

    @property
    def intensity(self) -> float:
        """Operations per byte of memory."""
        return self.flops / self.bytes


def lmu_work(case: dict, chunk: int, *, folds: bool = True) -> Work:
    """An LMU with a tanh cell and input_to_hidden, in chunks: fed back, or uncoupled and folded into the weights that read it.

    Args:
        case: its sizes, as in ``cases.CASES``.
        chunk: steps per chunk C.
        folds: uncoupled layers only: whether the memory is folded, rather than written.
    """
    batch, steps, dims, order = case["batch"], case["steps"], case["memory_d"], case["order"]
    inputs, hidden, coupled = case["input_size"], case["hidden_size"], case.get("coupled", False)
    width = hidden + dims * coupled
    chunks = -(-steps // chunk)
    total = chunks * chunk
    rows = batch * total
    # Multiply-adds forwards, and how often as many backwards: once for the inputs' gradient, once for the weights'.
    products = [
        (rows * inputs * width, 1),  # x has no gradient
        (rows * hidden * width, 2),
        (batch * chunks * dims * order * (order + chunk), 1),  # to the next chunk, by constants
    ]
    if coupled:
        # u of the chunk so far; the gradient of its weights goes over all lags, which are zero where there was none.
        products += [(rows * (chunk - 1) / 2 * dims * width, 1), (rows * (chunk - 1) * dims * width, 0)]
    if coupled or folds:
        # From the memory at the start of a chunk, and the operator of that; uncoupled, in one product with that of its u.
        rows_of_operator = chunk * dims * (order if coupled else order + chunk)
        products += [(rows * dims * order * width, 2), (rows_of_operator * order * width, 1)]
    if not coupled:
        products.append(
            (rows * dims * chunk * width, 2) if folds else (rows * dims * order * (order + chunk), 2)
        )  # once more for the weights
        products.append((rows * inputs * dims, 1))
        if not folds:
            products.append((rows * dims * order * width, 2))
    flops = 2 * sum(count * (1 + again) for count, again in products)
    sums, state = rows * width, rows * hidden
    starts = batch * chunks * dims * order
    numbers = 2 * rows * inputs  # read by either pass
    numbers += 3 * sums  # known: from the inputs, with the memory's part, read by the loop
    numbers += state + starts  # written forwards
    numbers += (
        state + 2 * state + 4 * sums + 2 * starts
    )  # backwards: grad; h for its slope and for R; grad of the sums; starts
    numbers += 4 * rows * dims  # u and its gradient
    if coupled or folds:
        numbers += 4 * chunk * dims * order * width  # the operator, built and read, and its gradient
    else:
        numbers += 4 * rows * dims * order  # the memory of all steps and its gradient
    return Work(flops, FLOAT * numbers, 2 * hidden * width * FLOAT)


def naive_work(case: dict) -> Work:
    """The same layer step by step, as it is written down."""
    batch, steps, dims, order = case["batch"], case["steps"], case["memory_d"], case["order"]
    inputs, hidden, coupled = case["input_size"], case["hidden_size"], case.get("coupled", False)
    memory, rows = dims * order, batch * steps
    per_step = [(memory * order, 1), ((memory + hidden) * hidden, 2), (inputs * hidden, 1), (inputs * dims, 1)]
    if coupled:
        per_step += [(hidden * dims, 2), (memory * dims, 2)]
    flops = 2 * rows * sum(count * (1 + again) for count, again in per_step)
    numbers = rows * (2 * inputs + 6 * memory + 6 * hidden + 4 * dims)  # each state written, read, and again backwards
    matrices = order * order + (memory + hidden) * hidden + (hidden + memory) * dims * coupled
    return Work(flops, FLOAT * numbers, 2 * FLOAT * matrices)


def peer_work(name: str, case: dict) -> Work:
    """torch's RNN, LSTM or GRU of the same hidden size."""
    rows, inputs, hidden = case["batch"] * case["steps"], case["input_size"], case["hidden_size"]
    width = GATES[name] * hidden
    flops = 2 * rows * (inputs * width * 2 + hidden * width * 3)
    numbers = rows * (2 * inputs + 3 * width + 4 * width + 4 * hidden)
    return Work(flops, FLOAT * numbers, 2 * FLOAT * hidden * width)


def shares(work: Work, milliseconds: float, flops_per_s: float, bytes_per_s: float) -> dict[str, float]:
    """What part of the device's limits a time of so many ms amounts to, and the shortest time that they allow, in ms."""
    seconds = milliseconds / 1e3
    return {
        "flops": work.flops / seconds / flops_per_s,
        "bytes": work.bytes / seconds / bytes_per_s,
        "limit_ms": 1e3 * max(work.flops / flops_per_s, work.bytes / bytes_per_s),
    }
