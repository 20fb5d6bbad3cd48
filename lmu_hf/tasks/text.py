"""Classification of texts from any table with a text and a label per row, or from folders of .txt files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError
from .base import PARTS, TaskData, load_tables
from .rows import check_split_seed, columns, encode, label_names, split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OPTIONS = ("text_column", "label_column", "tokenizer", "vocab_size", "lowercase", "max_length", "split_seed")
EXTENSIONS = (".parquet", ".csv", ".jsonl", ".json")
PAD = "[PAD]"


class TokenPart(torch.utils.data.Dataset):
    """Texts as tokens with a class each.

    Args:
        tokens: per row a list of tokens.
        labels: class per row.
    """

    def __init__(self, tokens: list[list[int]], labels: list[int]):
        self.values = [torch.tensor(row, dtype=torch.int64) for row in tokens]
        self.labels = torch.tensor(labels, dtype=torch.int64)
        assert len(self.values) == len(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.values[index], "labels": self.labels[index]}


def load(
    data: str | None = None,
    processor: Any = None,
    text_column: str = "text",
    label_column: str = "label",
    tokenizer: str | None = None,
    vocab_size: int = 8000,
    lowercase: bool = False,
    max_length: int | None = None,
    split_seed: int = 0,
) -> TaskData:
    """Loads the task.

    Labels are whole numbers from 0 or names. Where validation or test part is missing, a tenth of the training rows is split
    off for it, stratified by label. The tokenizer is trained on the training part alone.

    Args:
        data: a .parquet, .csv, .jsonl or .json file; a folder of such files whose names begin with train, validation or test;
            a folder of texts, ``LABEL/*.txt`` or ``PART/LABEL/*.txt``; or an id on the Hub.
        processor: tokenizer of a trained model; made for the training part when None.
        text_column: name of the column of texts.
        label_column: name of the column of labels.
        tokenizer: a tokenizer to use, as a folder or an id on the Hub; None to train one.
        vocab_size: most tokens that a trained tokenizer has.
        lowercase: have a trained tokenizer ignore case.
        max_length: cut texts to this many tokens; how many were cut is recorded. None for never.
        split_seed: seed of a split.

    Raises:
        InputError: the data or an option is wrong, or a text has no token.
    """
    check_split_seed(split_seed)
    for name, value, least in (("vocab_size", vocab_size, 258), ("max_length", max_length, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InputError(f"task.{name}: expected a whole number >= {least}, found {value!r}")
    if not isinstance(lowercase, bool):
        raise InputError(f"task.lowercase: expected true or false, found {lowercase!r}")
    if data is None:
        raise InputError(
            f"data: expected --data with a file ({', '.join(EXTENSIONS)}), a folder of these or of LABEL/*.txt, or an id "
            "on the Hub"
        )
    tables = _text_folder(Path(data)) or load_tables(data, "text", EXTENSIONS)
    parts = columns(tables, {"text": text_column, "label": label_column}, data)
    names = label_names(tables["train"].features[label_column], parts["train"]["label"])
    for part, cells in parts.items():
        cells["label"] = encode(part, cells["label"], names)
        for index, text in enumerate(cells["text"]):
            if not isinstance(text, str):
                raise InputError(f"{part} row {index}: expected a text, found {str(text)[:60]!r}")
    how = split(parts, split_seed, "label")
    if processor is None:
        if tokenizer is None:
            processor = train_tokenizer(parts["train"]["text"], vocab_size, lowercase)
        else:
            processor = load_tokenizer(tokenizer)
        if max_length is not None:
            processor.model_max_length = max_length
    if not hasattr(processor, "pad_token_id"):
        raise InputError(f"model: this task needs a tokenizer, the model comes with a {type(processor).__name__}")
    tokens = {part: processor(cells["text"], verbose=False)["input_ids"] for part, cells in parts.items()}
    cut = 0
    for part in PARTS:
        lengths = [len(row) for row in tokens[part]]
        if not all(lengths):
            index = lengths.index(0)
            raise InputError(
                f"{part} row {index}: expected a text of at least one token, found {parts[part]['text'][index]!r}"
            )
        if max_length is not None and max(lengths) > max_length:
            cut += sum(length > max_length for length in lengths)
            # By the tokenizer, which keeps the tokens that it puts at the end.
            tokens[part] = processor(parts[part]["text"], truncation=True, max_length=max_length)["input_ids"]
    return TaskData(
        name="text",
        parts={part: TokenPart(tokens[part], parts[part]["label"]) for part in PARTS},
        processor=processor,
        label_names=names,
        dataset={
            "name": "texts" if Path(data).exists() else data,
            "id": None if Path(data).exists() else data,
            "split": how,
            "rows": {part: len(tokens[part]) for part in PARTS},
            **({} if max_length is None else {"cut": {"rows": cut, "to": max_length, "unit": "tokens"}}),
        },
        fields={"vocab_size": len(processor), "pad_token_id": processor.pad_token_id},
    )


def train_tokenizer(texts: list[str], vocab_size: int = 8000, lowercase: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on texts: it knows every text of every language, so it has no unknown token.

    Args:
        texts: of the training part only.
        vocab_size: most tokens that it has: one for padding, 256 for bytes, the rest learned.
        lowercase: ignore case.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Sequence([normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PAD, model_input_names=["input_ids", "attention_mask"])


def load_tokenizer(name: str) -> Any:
    """A tokenizer from a folder or the Hub, with a token for padding.

    Raises:
        InputError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a damaged file can raise anything; each means that there is no usable tokenizer
        raise InputError(f"task.tokenizer: {name} could not be loaded: {' '.join(str(error).split())[:300]}") from error
    if tokenizer.pad_token is None:
        # One of its own: the embedding of the padding is never trained, so no token of texts may serve for it.
        tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # not token_type_ids, which the model does not take
    return tokenizer


def _text_folder(folder: Path) -> dict[str, Any] | None:
    """Tables of a folder ``LABEL/*.txt`` or ``PART/LABEL/*.txt``; None if it is none."""
    from datasets import Dataset

    if not folder.is_dir() or not any(folder.glob("*/**/*.txt")):
        return None
    parts = [part for part in PARTS if (folder / part).is_dir()]
    roots = {part: folder / part for part in parts} if parts else {"train": folder}
    tables = {}
    for part, root in roots.items():
        rows: dict[str, list[str]] = {"text": [], "label": []}
        for file in sorted(root.glob("*/*.txt")):
            try:
                rows["text"].append(file.read_text(encoding="utf-8-sig"))
            except UnicodeDecodeError as error:
                raise InputError(f"data: {part}/{file.parent.name}/{file.name} is no text in UTF-8: {error}") from error
            rows["label"].append(file.parent.name)
        if not rows["text"]:
            raise InputError(f"data: expected LABEL/*.txt in the {part} part of {folder}, found none")
        tables[part] = Dataset.from_dict(rows)
    return tables
