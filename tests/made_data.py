"""Small datasets made on the spot."""

import io

import datasets
import numpy as np
from PIL import Image


def write_images(path, labels, shape=(28, 28), column="image", seed=0):
    """Random images with labels, as a parquet file with the columns of the Hub's MNIST."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in labels:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({column: rows, "label": labels}, features=features).to_parquet(str(path))
    return path


def read_images(path):
    """The pixels (rows, height, width) of such a file."""
    table = datasets.Dataset.from_parquet(str(path), keep_in_memory=True).cast_column("image", datasets.Image(decode=False))
    return np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in table])
