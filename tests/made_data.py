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
