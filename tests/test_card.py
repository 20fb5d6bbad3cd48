"""The card reads as one that a careful person wrote: whole sentences, every number from the record, nothing empty or untrue."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard, ModelCardData
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from lmu_hf import (
    LMUConfig,
    LMUFeatureExtractor,
    LMUForCausalLM,
    LMUForSequenceClassification,
    LMUForTimeSeriesPrediction,
    LMUForTokenClassification,
    LMUModel,
    example,
)
from lmu_hf.card import BEGIN, END, write_card
from lmu_hf.description import kind_of, loss_name
from lmu_hf.errors import InputError
from lmu_hf.hub import collect

RESULTS = sorted((Path(__file__).parents[1] / "model_cards").glob("*.json"))


def card_of(folder, **kwargs):
    return write_card(collect(folder)[0], "ada/model", **kwargs)


def code_of(card):
    return re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1]


def output_of(card):
    return re.search(r"```text\n(.*?)\n```", card, re.DOTALL)[1]


def check_form(card):
    text = ModelCard(card).text
    sections = re.split(r"^## ", text.partition(END)[0], flags=re.MULTILINE)
    assert all(len(section.partition("\n")[2].strip()) > 20 for section in sections), "an empty section"
    for wrong in ("None", "nan", "undefined", "{{", "{%", "[]", "{}", "fine-tuned", " .", " ,", "\n\n\n"):
        assert wrong not in re.sub(r"```python.*?```", "code", text, flags=re.DOTALL), wrong
    assert len(re.findall("^# ", text, re.MULTILINE)) == 1
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1, table
    return [section.partition("\n")[0] for section in sections[1:]]


@pytest.fixture(scope="module")
def digits_card(digits_model):
    return card_of(digits_model)


def test_card_of_images(digits_card, digits_model):
    result = json.loads((digits_model / "result.json").read_text())
    assert check_form(digits_card) == ["Use", "Scores", "Data", "Training", "Limits", "Licence", "Citation"]
    card = ModelCard(digits_card)
    assert card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.base_model is None
    assert card.data.datasets is None  # scikit-learn's digits are no dataset of the Hub
    found = {(entry.dataset_split, entry.metric_type): entry.metric_value for entry in card.data.eval_results}
    assert found == {(part, metric): value for part, scores in result["scores"].items() for metric, value in scores.items()}
    test = result["scores"]["test"]
    assert f"| test | 360 | scored once, at the end | {100 * test['accuracy']:.2f} % | {test['loss']:.4g} |" in card.text
    assert f"{round(360 * test['accuracy'])} of 360 test rows are right" in card.text
    assert f"| Parameters | {result['parameters']['total']:,} |" in card.text
    for fact in (
        "Seed 0",
        "for 2 epochs in",
        "64 steps, one grey value per step, in a fixed random order",
        "learning_rate: 0.016",
    ):
        assert fact in card.text, fact
    for picture in re.findall(r"!\[[^]]{20,}\]\((.*?)\)", card.text):
        assert (digits_model / picture).is_file()


def test_the_example_is_run(digits_card, digits_model):
    """Its output is that of the model, and what it shows is what ran."""
    lines = output_of(digits_card).splitlines()
    assert len(lines) == 3
    assert all(re.fullmatch(r"\d: \d\.\d{3}", line) for line in lines)
    code = code_of(digits_card)
    assert "trust_remote_code=True" in code
    files = collect(digits_model)[0]
    assert example.run_example(code, files, "ada/model") == output_of(digits_card)
    assert (
        example.run_example(code.replace('_id = "ada/model"', '_id = "ada/model"\nprint(1)'), files, "ada/model")[0] == "1"
    )


def test_an_example_that_fails_is_an_error(digits_model, tmp_path):
    folder = shutil.copytree(digits_model, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(InputError, match="the usage example of its card does not run"):
        card_of(folder)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("lmu_hf.card.run_example", lambda *arguments: "7: 0.981")


@pytest.mark.parametrize("channels", [1, 2])
def test_card_of_signals_without_a_record(tmp_path, channels):
    """A model of save_pretrained alone: nothing is known of its training, and nothing is made up."""
    config = LMUConfig(
        input_size=channels,
        order=6,
        theta=40,
        hidden_cell=None,
        id2label={0: "slow", 1: "fast"},
        problem_type="single_label_classification",
    )
    LMUForSequenceClassification(config).save_pretrained(tmp_path)
    LMUFeatureExtractor(feature_size=channels).save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert check_form(card) == ["Use", "Limits", "Licence", "Citation"]
    assert {line.partition(":")[0] for line in output_of(card).splitlines()} == {"slow", "fast"}
    assert "The memory looks back 40 steps" in card
    parameters = sum(p.numel() for p in LMUForSequenceClassification(config).parameters())
    assert f"| Parameters | {parameters} |" in card
    assert ModelCard(card).data.eval_results is None


def test_card_of_regression_and_of_a_bare_model(tmp_path):
    config = LMUConfig(
        input_size=1, order=6, theta=[10, 40], memory_d=2, hidden_size=4, num_labels=1, problem_type="regression"
    )
    LMUForSequenceClassification(config).save_pretrained(tmp_path / "value")
    LMUFeatureExtractor().save_pretrained(tmp_path / "value")
    card = card_of(tmp_path / "value")
    check_form(card)
    assert "computes 1 value from a time series" in card
    assert np.isfinite(float(output_of(card).strip("[]")))
    LMUModel(LMUConfig(order=6, hidden_size=4, vocab_size=20, hidden_to_memory=True)).save_pretrained(tmp_path / "bare")
    card = card_of(tmp_path / "bare")
    assert output_of(card) == "torch.Size([1, 8, 4]) torch.Size([1, 4])"
    assert "chilkuri" not in card  # no parallel net


TOKENS = {"vocab_size": 22, "order": 6, "theta": 40, "hidden_size": 4, "num_labels": 2}
VALUES = {"input_size": 2, "order": 6, "theta": 40, "hidden_size": 4, "num_labels": 2}
HEADS = {
    "texts": (LMUForSequenceClassification, TOKENS, "text-classification", "sorts a text into one of 2 classes", 2),
    "tags": (LMUForTokenClassification, TOKENS, "token-classification", "each token of a text one of 2 labels", 1),
    "steps": (LMUForTokenClassification, VALUES, "token-classification", "each step of a time series one of 2 labels", 1),
    "language": (LMUForCausalLM, TOKENS, "text-generation", "predicts the next token of a text", 1),
    "series": (LMUForTimeSeriesPrediction, VALUES, "time-series-forecasting", "predicts the next value of a time series", 5),
    "one": (
        LMUForTimeSeriesPrediction,
        {**VALUES, "return_sequences": False, "horizon": 2, "prediction_length": 3},
        "time-series-forecasting",
        "predicts the values 2 to 4 steps ahead",
        3,
    ),
    "features": (LMUModel, VALUES, "feature-extraction", "a vector per step and one for the whole", 1),
    "labels": (
        LMUForSequenceClassification,
        {**VALUES, "problem_type": "multi_label_classification"},
        None,
        "which of 2 labels (LABEL_0, LABEL_1) fit a time series",
        2,
    ),
}


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """Examples are run here rather than in a process of their own, which takes seconds and has tests of its own."""

    def run(code, *_):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                exec(code.replace("ada/model", str(tmp_path)), {})
            except Exception as error:
                raise InputError(str(error)) from error
        return printed.getvalue().strip()

    monkeypatch.setattr("lmu_hf.card.run_example", run)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", HEADS)
def test_card_of_every_head(name, tmp_path):
    """Each says what its model does, and shows it at work."""
    cls, settings, pipeline_tag, does, lines = HEADS[name]
    cls(LMUConfig(**settings)).save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert check_form(card) == ["Use", "Limits", "Licence", "Citation"]
    assert ModelCard(card).data.pipeline_tag == pipeline_tag
    assert does in card
    assert f"AutoModel{'' if cls is LMUModel else cls.__name__.removeprefix('LMU')}.from_pretrained" in code_of(card)
    assert len(output_of(card).splitlines()) == lines


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("known", [True, False])
def test_card_with_a_tokenizer(known, tmp_path):
    """Its example is a text, unless the tokenizer makes nothing of that."""
    vocabulary = {"a": 0, "the": 1, **({"<unk>": 2} if known else {})}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>") if known else WordLevel(vocabulary))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    LMUForCausalLM(LMUConfig(**TOKENS)).save_pretrained(tmp_path)
    card = card_of(tmp_path)
    check_form(card)
    assert ("tokenizer.decode" in code_of(card)) == known
    assert ("AutoTokenizer" in code_of(card)) == known


def test_names_of_losses():
    """A loss is called what it is."""
    series, signal = ({"architectures": [f"LMUFor{name}"]} for name in ("TimeSeriesPrediction", "SequenceClassification"))
    for config, name in (
        (series, "loss (mean squared error)"),
        ({**series, "prediction_loss": "huber"}, "loss (Huber)"),
        (signal, "loss (cross-entropy, nats)"),
        ({**signal, "problem_type": "regression"}, "loss (mean squared error)"),
    ):
        assert loss_name(config, kind_of(config, {})) == name


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_card_of_published_results(path, digits_model, quick):
    """The records in model_cards are older than some fields of today's; a card comes out of them all the same."""
    result = json.loads(path.read_text())
    card = card_of(digits_model, result=result)
    check_form(card)
    identifier = result["dataset"]["id"]
    assert (", computed by lmu-hf. " in card) == (path.stem.partition("-")[0] in ("delay", "mackey"))
    assert not re.search(r"\b1 epochs", card)
    assert ModelCard(card).data.datasets == ([identifier] if identifier else None)
    assert (f"[{identifier}](https://huggingface.co/datasets/{identifier})" in card) == (identifier is not None)


def test_one_epoch_is_one(digits_model, quick):
    result = json.loads((digits_model / "result.json").read_text())
    card = card_of(digits_model, result={**result, "history": result["history"][:1]})
    assert " for 1 epoch in " in card


def test_a_true_base_model_is_named(digits_model, quick):
    result = json.loads((digits_model / "result.json").read_text())
    card = card_of(digits_model, result={**result, "base_model": "bob/base"})
    assert ModelCard(card).data.base_model == "bob/base"
    assert "a fine-tuned [bob/base](https://huggingface.co/bob/base)" in card


def test_what_is_there_already(digits_model, quick):
    fresh = card_of(digits_model)
    assert card_of(digits_model, existing=fresh) == fresh
    # By hand: metadata that is not generated stays, tags are joined, the licence is the person's.
    edited = fresh.replace("license: apache-2.0", "license: mit\nlanguage: en").replace("- lmu\n", "- lmu\n- mine\n")
    data = ModelCard(card_of(digits_model, existing=edited)).data
    assert (data.license, data.language) == ("mit", "en")
    assert {"lmu", "mine"} <= set(data.tags)
    assert ModelCard(card_of(digits_model, existing=edited, license="bsd-3-clause")).data.license == "bsd-3-clause"
    # A card that somebody wrote alone stays whole, behind the generated part; a draft of transformers goes.
    kept = card_of(digits_model, existing="# Mine\n\nAll my words.\n")
    assert kept.index(END) < kept.index("# Mine") < kept.index("All my words.")
    words = "This model card has been automatically generated."
    draft = str(ModelCard.from_template(ModelCardData(tags=[]), model_description=words))
    assert card_of(digits_model, existing=draft) == fresh
    filled = draft.replace("[More Information Needed]", "Ada made it.", 1)
    assert "Ada made it." in card_of(digits_model, existing=filled)
    # What was true of the model before need not be so today.
    tuned = fresh.replace("library_name:", "base_model: bob/base\nlibrary_name:")
    assert ModelCard(card_of(digits_model, existing=tuned)).data.base_model is None
    for damaged in (fresh.replace(BEGIN, ""), fresh.replace(END, f"{END}\n{END}"), "---\na: [\n---\n" + BEGIN):
        with pytest.raises(InputError, match="card: "):
            card_of(digits_model, existing=damaged)
