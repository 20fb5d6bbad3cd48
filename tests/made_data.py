"""Small datasets, and a tokenizer, made on the spot."""

import io

import datasets
import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


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


TEXT = "the a cat dog bird fish sees likes finds follows red blue big small old and or not here there ."


def tokenizer(**kwargs):
    """A tokenizer of some twenty words."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *TEXT.split()])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
        **kwargs,
    )
