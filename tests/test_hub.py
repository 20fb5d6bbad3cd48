"""Publishing over real HTTP: what arrives, what never leaves, what is said when it fails, and both ways to load it."""

import hashlib
import json
import os
import shutil
import sys

import numpy as np
import processes
import pytest
import torch
from hub_server import ADA, BOB, READER
from huggingface_hub import HfApi
from made_data import tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, pipeline
from typer.testing import CliRunner

import lmu_hf
from lmu_hf import (
    LMUConfig,
    LMUFeatureExtractor,
    LMUForCausalLM,
    LMUForSequenceClassification,
    LMUForTimeSeriesPrediction,
    LMUForTokenClassification,
    LMUModel,
)
from lmu_hf.baselines import RecurrentConfig, RecurrentForSequenceClassification
from lmu_hf.card import BEGIN, END
from lmu_hf.cli import app
from lmu_hf.errors import InputError


def push(*arguments):
    return CliRunner().invoke(app, ["push", *[str(argument) for argument in arguments]])


loads_images = pytest.mark.skipif(
    getattr(AutoImageProcessor, "is_dummy", False),
    reason="early versions of transformers 5 load no images without torchvision",
)


@pytest.fixture
def quick(monkeypatch):
    """Cards whose example is not run; that it runs, and what it prints, is tested with the card."""
    monkeypatch.setattr("lmu_hf.card.run_example", lambda *arguments: "7: 0.981")


@pytest.fixture
def model(digits_model, tmp_path):
    return shutil.copytree(digits_model, tmp_path / "model")


def content(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_python(code, environment, **arguments):
    values = "".join(f"{name} = {value!r}\n" for name, value in arguments.items())
    finished = processes.run([sys.executable, "-c", values + code], env={**os.environ, **environment})
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


LOGITS = """
import sys
if hidden:
    sys.modules["lmu_hf"] = None  # from here on, importing it or a part of it fails
    try:
        import lmu_hf.model.layer
    except ImportError:
        pass
    else:
        raise AssertionError("lmu_hf is not hidden")
    options = {"trust_remote_code": True}
else:
    import lmu_hf
    options = {}
import hashlib, torch, transformers
for auto, auto_processor, name, revision in loads:
    model = getattr(transformers, auto).from_pretrained(name, revision=revision, **options).eval()
    processor = getattr(transformers, auto_processor).from_pretrained(name, revision=revision, **options)
    for loaded in (model, processor):
        assert type(loaded).__module__.startswith("transformers_modules." if hidden else "lmu_hf."), type(loaded)
    torch.manual_seed(0)
    with torch.inference_mode():
        output = model(input_values=torch.randn(3, 64, 1))
    print(hashlib.sha256(output[0].numpy().tobytes()).hexdigest())
"""
PIPELINE = """
from huggingface_hub import hf_hub_download
classify = transformers.pipeline("image-classification", "ada/digits", **options)
print(classify(hf_hub_download("ada/digits", "example.png"))[0]["label"])
"""


def digest(folder):
    torch.manual_seed(0)
    with torch.inference_mode():
        logits = LMUForSequenceClassification.from_pretrained(folder).eval()(input_values=torch.randn(3, 64, 1)).logits
    return hashlib.sha256(logits.numpy().tobytes()).hexdigest()


@loads_images
def test_up_and_down_both_ways(hub, model, tmp_path):
    """The whole way, in processes that share nothing: the command line up, Auto classes down, with and without lmu_hf."""
    before = content(model)
    command = [sys.executable, "-m", "lmu_hf.cli", "push", str(model), "digits"]
    finished = processes.run(command)
    assert finished.returncode == 0, finished.stderr
    assert f"{hub.url}/ada/digits" in finished.stdout
    assert content(model) == before

    remote = hub.files("ada/digits")
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "modeling_lmu.py"} <= set(remote)
    assert not [name for name in remote if name.endswith((".bin", ".pt"))]
    assert hashlib.sha256(remote["model.safetensors"]).hexdigest() in hub.large  # the way of large files
    for name, file in remote.items():
        assert ADA.encode() not in file, name
        assert name.endswith(".safetensors") or str(tmp_path).encode() not in file, name

    loads = [
        ("AutoModelForSequenceClassification", "AutoImageProcessor", "ada/digits", None),
        ("AutoModelForImageClassification", "AutoProcessor", "ada/digits", None),
    ]
    for hidden in (False, True):
        environment = hub.client(None, tmp_path / f"fresh-{hidden}")
        *printed, label = run_python(LOGITS + PIPELINE, environment, hidden=hidden, loads=loads).split()
        assert printed == [digest(model)] * 2
        assert label in "0123456789"
    predict = [sys.executable, "-m", "lmu_hf.cli", "predict", "ada/digits", str(model / "example.png"), "--json"]
    printed = processes.run(predict, check=True).stdout
    assert len(json.loads(printed)[0]["probabilities"]) == 10


@pytest.mark.usefixtures("python_loop")  # which is all that travels
def test_signals_down_both_ways(hub, quick, tmp_path, monkeypatch):
    config = LMUConfig(input_size=1, memory_d=2, order=6, theta=[10, 40], hidden_cell="lstm", hidden_size=5, num_labels=3)
    LMUForSequenceClassification(config).save_pretrained(tmp_path / "model")
    LMUFeatureExtractor().save_pretrained(tmp_path / "model")
    assert push(tmp_path / "model", "waves").exit_code == 0
    autos = ("AutoModelForSequenceClassification", "AutoModelForAudioClassification")
    loads = [(auto, "AutoFeatureExtractor", "ada/waves", None) for auto in autos] + [
        (autos[0], "AutoProcessor", "ada/waves", None)
    ]
    printed = run_python(LOGITS, hub.client(None, tmp_path / "fresh"), hidden=True, loads=loads)
    assert printed.split() == [digest(tmp_path / "model")] * 3

    # Where lmu_hf is installed, nobody is asked whether to trust the code that travels along.
    questions: list = []
    monkeypatch.setattr("builtins.input", questions.append)
    assert pipeline("audio-classification", "ada/waves")(np.zeros(30))[0]["score"] > 0
    assert not questions


# Everything but images, which test_up_and_down_both_ways takes.
PIPELINES = """
import json, sys, torch, transformers
if hidden:
    sys.modules["lmu_hf"] = None
    options = {"trust_remote_code": True}
else:
    import lmu_hf
    options = {}
where = "transformers_modules." if hidden else "lmu_hf."
found = {}
for task, name, given in uses:
    if task == "series":
        model = transformers.AutoModelForTimeSeriesPrediction.from_pretrained(name, **options).eval()
        processor = transformers.AutoFeatureExtractor.from_pretrained(name, **options)
        inputs = processor([given, given[:-3]], return_tensors="pt")
        with torch.inference_mode():
            found[task] = model(**inputs)[0].tolist()
    else:
        pipe = transformers.pipeline(task, name, **options)
        model = pipe.model
        if task == "audio-classification":
            import numpy
            given = numpy.array(given)
        found[task] = pipe(given, **({"max_new_tokens": 6, "do_sample": False} if task == "text-generation" else {}))
    assert type(model).__module__.startswith(where), type(model)
print(json.dumps(found, default=float))
"""


@pytest.mark.usefixtures("python_loop")  # which is all that travels
def test_pipelines_down_both_ways(hub, quick, tmp_path):
    """Sound, text, tokens, generation and series, up with their processors and down with and without lmu_hf: the same answers."""
    words = tokenizer(padding_side="left")
    wave = np.sin(np.arange(60) / 5).tolist()
    text = "the cat sees a bird ."
    sizes = {"memory_d": 2, "order": 5, "theta": [6, 20], "hidden_cell": "gru", "hidden_size": 6, "num_labels": 3}
    reads = {
        "vocab_size": len(words),
        "pad_token_id": words.pad_token_id,
        "eos_token_id": words.eos_token_id,
        "input_size": 4,
    }
    kinds = [
        ("audio-classification", LMUForSequenceClassification, {"input_size": 1}, LMUFeatureExtractor(), wave),
        ("text-classification", LMUForSequenceClassification, reads, words, text),
        ("token-classification", LMUForTokenClassification, reads, words, text),
        ("text-generation", LMUForCausalLM, reads, words, text),
        ("series", LMUForTimeSeriesPrediction, {"input_size": 1}, LMUFeatureExtractor(), wave),
    ]
    uses = []
    for task, cls, more, processor, given in kinds:
        torch.manual_seed(0)
        cls(LMUConfig(**sizes, **more, initializer_range=0.3)).save_pretrained(tmp_path / task)
        processor.save_pretrained(tmp_path / task)
        pushed = push(tmp_path / task, task)
        assert pushed.exit_code == 0, pushed.output
        uses.append((task, f"ada/{task}", given))
    found = []
    for hidden in (False, True):
        environment = hub.client(None, tmp_path / f"fresh-{hidden}")
        found.append(json.loads(run_python(PIPELINES, environment, hidden=hidden, uses=uses).splitlines()[-1]))
    assert found[0] == found[1]
    assert set(found[0]) == {task for task, *_ in kinds}
    assert len(found[0]["token-classification"]) == 6
    assert found[0]["text-generation"][0]["generated_text"].startswith(text)


def test_every_auto_class_is_in_auto_map(tmp_path):
    """What is registered here is what the files offer elsewhere."""
    import transformers

    autos = [name for name in dir(transformers) if name.startswith("AutoModel")]
    heads = [getattr(lmu_hf, name) for name in lmu_hf.__all__ if name.startswith("LMUFor")]
    for cls in (LMUModel, *heads):
        registered = {name for name in autos if cls is getattr(transformers, name)._model_mapping.get(LMUConfig, None)}
        config = LMUConfig(order=4, hidden_size=3, vocab_size=10 if cls is LMUForCausalLM else None)
        cls(config).save_pretrained(tmp_path / cls.__name__)
        auto_map = json.loads((tmp_path / cls.__name__ / "config.json").read_text())["auto_map"]
        assert {name for name, path in auto_map.items() if path.endswith(f".{cls.__name__}")} == registered
        assert {"AutoConfig", "AutoModel"} <= set(auto_map)


@loads_images
def test_code_travels_again_when_it_came_from_the_hub(hub, model, quick, tmp_path):
    assert push(model, "digits").exit_code == 0
    code = """
import sys
sys.modules["lmu_hf"] = None
from transformers import AutoImageProcessor, AutoModelForImageClassification
for cls in (AutoModelForImageClassification, AutoImageProcessor):
    cls.from_pretrained("ada/digits", trust_remote_code=True).save_pretrained(folder)
"""
    run_python(code, hub.client(None, tmp_path / "fresh"), folder=str(tmp_path / "again"))
    for name in ("config.json", "preprocessor_config.json"):
        for path in json.loads((tmp_path / "again" / name).read_text())["auto_map"].values():
            assert "--" not in path  # would send readers back to where it came from
            assert (tmp_path / "again" / f"{path.partition('.')[0]}.py").exists()


@loads_images
def test_revisions_branches_and_tags(hub, model, quick, tmp_path):
    assert push(model, "digits").exit_code == 0
    api, first = HfApi(), hub.repos["ada/digits"].refs["main"]
    api.create_tag("ada/digits", tag="v1", revision="main")
    old = digest(model)
    weights = load_file(model / "model.safetensors")
    save_file(
        {name: value + 0.01 for name, value in weights.items()}, model / "model.safetensors", metadata={"format": "pt"}
    )
    assert push(model, "digits").exit_code == 0
    assert digest(model) != old
    common = ("AutoModelForImageClassification", "AutoImageProcessor", "ada/digits")
    loads = [(*common, revision) for revision in (first, "v1", None)]
    printed = run_python(LOGITS, hub.client(None, tmp_path / "fresh"), hidden=True, loads=loads)
    assert printed.split() == [old, old, digest(model)]

    finished = push(model, "digits", "--revision", "trial")
    assert finished.exit_code == 0, finished.stderr
    assert finished.stdout.split()[2].endswith("/ada/digits/tree/trial")
    assert b'revision = "trial"' in hub.files("ada/digits", "trial")["README.md"]
    assert b"revision" not in hub.files("ada/digits")["README.md"].partition(b"```python")[2].partition(b"```")[0]
    assert push(model, "digits", "--revision", "trial").exit_code == 0  # the branch exists by now
    refused = push(model, "digits", "--revision", "refs/pr/9")
    assert refused.exit_code == 2
    assert "revision: not found in ada/digits" in refused.stderr


def test_pull_requests(hub, model, quick, monkeypatch):
    assert push(model, "digits").exit_code == 0
    main = dict(hub.files("ada/digits"))
    monkeypatch.setenv("HF_TOKEN", BOB)
    refused = push(model, "ada/digits")
    assert refused.exit_code == 2
    assert "may not write to ada/digits" in refused.stderr
    finished = push(model, "ada/digits", "--create-pr", "--license", "mit")
    assert finished.exit_code == 0, finished.stderr
    assert f"{hub.url}/ada/digits/discussions/1" in finished.stdout
    assert b"license: mit" in hub.files("ada/digits", "refs/pr/1")["README.md"]
    assert hub.files("ada/digits") == main
    refused = push(model, "ada/digits", "--create-pr", "--revision", "trial")
    assert refused.exit_code == 2
    assert "pull request is made against the main branch" in refused.stderr


def test_private_repositories(hub, model, quick, tmp_path, monkeypatch):
    assert push(model, "secret", "--private").exit_code == 0
    assert hub.repos["ada/secret"].private
    assert LMUConfig.from_pretrained("ada/secret", cache_dir=tmp_path / "hers").order == 8
    for token in ("", BOB):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(OSError, match="ada/secret"):
            LMUConfig.from_pretrained("ada/secret", cache_dir=tmp_path / f"others-{token}")
    monkeypatch.setenv("HF_TOKEN", ADA)
    # What is meant to be private does not land in a public repository.
    assert push(model, "open").exit_code == 0
    before = dict(hub.files("ada/open"))
    refused = push(model, "open", "--private")
    assert refused.exit_code == 2
    assert "ada/open exists and is public" in refused.stderr
    assert hub.files("ada/open") == before


def test_nothing_else_leaves(hub, model, quick):
    (model / "optimizer.pt").write_bytes(b"state")
    (model / "notes.txt").write_text("for nobody")
    (model / "my_script.py").write_text("password = 1")
    torch.save({"hub_token": ADA}, model / "training_args.bin")
    (model / "checkpoint-7").mkdir()
    (model / "checkpoint-7" / "config.json").write_text("{}")
    finished = push(model, "digits")
    assert finished.exit_code == 0, finished.stderr
    remote = hub.files("ada/digits")
    assert not {"optimizer.pt", "notes.txt", "training_args.bin", "checkpoint-7/config.json", "my_script.py"} & set(remote)
    assert not any(ADA.encode() in file for file in remote.values())
    for name in ("optimizer.pt", "notes.txt", "training_args.bin", "checkpoint-7/", "my_script.py"):
        assert name in finished.stdout.partition("not published:")[2]


@pytest.mark.parametrize("name", ["result.json", "config.json", "modeling_lmu.py", "model.safetensors"])
def test_a_token_in_a_file_is_refused(hub, model, quick, name):
    if name == "model.safetensors":
        save_file(load_file(model / name), model / name, metadata={"format": "pt", "note": ADA})
    elif name.endswith(".json"):
        (model / name).write_text(json.dumps({**json.loads((model / name).read_text()), "note": ADA}))
    else:
        (model / name).write_text((model / name).read_text() + f"\n# {ADA}\n")
    refused = push(model, "digits")
    assert refused.exit_code == 2
    assert f"{name} holds an access token" in refused.stderr
    assert ADA not in refused.stderr
    assert not hub.requests  # nothing was sent, not even a question


def test_a_local_path_in_a_file_is_refused(hub, model, quick):
    result = json.loads((model / "result.json").read_text())
    (model / "result.json").write_text(json.dumps({**result, "folder": str(model)}))
    refused = push(model, "digits")
    assert refused.exit_code == 2
    assert "result.json names the local path" in refused.stderr
    assert "ada/digits" not in hub.repos


@pytest.mark.parametrize("name", ["result.json", "config.json", "preprocessor_config.json"])
def test_a_path_of_this_machine_is_refused_wherever_it_leads(hub, model, quick, name):
    """Data and tokenizers lie anywhere, not only at home."""
    elsewhere = lmu_hf.__path__[0]
    content = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps({**content, "task": {"tokenizer": [elsewhere]}}))
    refused = push(model, "digits")
    assert refused.exit_code == 2
    assert f"{name} names the local path {elsewhere}" in refused.stderr
    (model / name).write_text(json.dumps({**content, "task": {"tokenizer": ["/nowhere/at all", "/", "a/b", "\0"]}}))
    assert push(model, "digits").exit_code == 0


def test_baselines_are_not_published(hub, tmp_path):
    model = RecurrentForSequenceClassification(RecurrentConfig(cell="lstm", hidden_size=3))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="baselines are not published"):
        model.push_to_hub("lstm")
    refused = push(tmp_path, "lstm")
    assert refused.exit_code == 2
    assert "holds a baseline, to compare with" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not hub.repos


def test_wrong_names_tokens_and_folders(hub, model, quick, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    no_code = shutil.copytree(model, tmp_path / "no_code")
    (no_code / "layer.py").unlink()  # not named in auto_map, only imported by what is
    no_weights = shutil.copytree(model, tmp_path / "no_weights")
    (no_weights / "model.safetensors").unlink()
    damaged = shutil.copytree(model, tmp_path / "damaged")
    (damaged / "result.json").write_text("nothing")
    cases = [
        (tmp_path / "nowhere", "x", ADA, "no folder"),
        (tmp_path / "empty", "x", ADA, "holds no config.json"),
        (tmp_path / "bert", "x", ADA, "expected a model of type 'lmu'"),
        (no_code, "x", ADA, "lacks the code"),
        (no_weights, "x", ADA, "holds no weights"),
        (damaged, "x", ADA, "result.json cannot be read"),
        (model, "a b", ADA, "repo: "),
        (model, "a/b/c", ADA, "repo: "),
        (model, "x", "hf_wrong", "token: refused by the Hub"),
        (model, "x", "", "token: not logged in"),
        (model, "x", READER, "may not write to ada/x"),
        (model, "bob/x", ADA, "may not write to bob/x"),
    ]
    before = content(model)
    for folder, name, token, message in cases:
        monkeypatch.setenv("HF_TOKEN", token)
        refused = push(folder, name)
        assert refused.exit_code == 2, (message, refused.output, refused.exception)
        assert message in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr
    assert content(model) == before
    assert not hub.repos


def test_another_model_is_not_overwritten(hub, model, quick):
    api = HfApi()
    api.create_repo("bert")
    api.upload_file(path_or_fileobj=b'{"model_type": "bert"}', path_in_repo="config.json", repo_id="ada/bert")
    refused = push(model, "bert")
    assert refused.exit_code == 2
    assert "ada/bert holds a model of type 'bert' and is left as it is" in refused.stderr
    assert set(hub.files("ada/bert")) == {".gitattributes", "config.json"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "whoami", 500),
        ("GET", "whoami", None),
        ("POST", "repos/create", 503),
        ("POST", "validate-yaml", 500),
        ("POST", "preupload", 502),
        ("POST", "lfs/objects/batch", 500),
        ("PUT", "/lfs/", 500),
        ("PUT", "/lfs/", None),
        ("POST", "verify", 500),
        ("POST", "/commit/", 500),
        ("POST", "/commit/", None),
    ],
)
def test_a_failure_in_the_middle(hub, model, quick, method, path, status):
    """One line, nothing half published, the folder untouched; a second try finishes the job without sending weights twice."""
    before = content(model)
    hub.fail(method, path, status, times=1000)
    failed = push(model, "digits")
    assert failed.exit_code == 1, (failed.output, failed.exception)
    assert failed.stderr.startswith("lmu-hf: hub: ")
    assert len(failed.stderr.strip().splitlines()) == 1
    assert "ada/digits" not in hub.repos or set(hub.files("ada/digits")) == {".gitattributes"}
    assert content(model) == before

    sent = {request for request in hub.requests if request.startswith("PUT")} if path == "/commit/" else set()
    hub.failures.clear()
    hub.requests.clear()
    finished = push(model, "digits")
    assert finished.exit_code == 0, finished.stderr
    assert "model.safetensors" in hub.files("ada/digits")
    assert not sent & set(hub.requests)


def test_a_hiccup_is_got_over(hub, model, quick):
    hub.fail("PUT", "/lfs/", 503)
    hub.fail("POST", "preupload", 502)
    assert push(model, "digits").exit_code == 0


def test_no_network(model, quick, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", ADA)
    failed = push(model, "digits")
    assert failed.exit_code == 1
    assert "no answer from http://127.0.0.1:9" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


def test_shards_of_an_earlier_cut_go(hub, quick, tmp_path):
    config = LMUConfig(order=8, hidden_size=16, num_labels=2)
    model = LMUForSequenceClassification(config)
    model.save_pretrained(tmp_path / "cut", max_shard_size="1KB")
    model.save_pretrained(tmp_path / "whole")
    assert push(tmp_path / "cut", "model").exit_code == 0
    assert "model.safetensors.index.json" in hub.files("ada/model")
    assert push(tmp_path / "whole", "model").exit_code == 0
    weights = [name for name in hub.files("ada/model") if "safetensors" in name]
    assert weights == ["model.safetensors"]


def test_what_a_person_wrote_survives(hub, model, quick):
    (model / "README.md").write_text("---\nlicense: mit\nlanguage: de\n---\nA word from me.\n")
    assert push(model, "digits").exit_code == 0
    card = hub.files("ada/digits")["README.md"].decode()
    assert card.count("A word from me.") == card.count(BEGIN) == card.count(END) == 1
    assert "license: mit" in card
    assert "language: de" in card

    written = card.replace(BEGIN, f"Read this first.\n\n{BEGIN}") + "\n## Thanks\n\nTo you.\n"
    HfApi().upload_file(path_or_fileobj=written.encode(), path_in_repo="README.md", repo_id="ada/digits")
    result = json.loads((model / "result.json").read_text())
    (model / "result.json").write_text(json.dumps({**result, "best_epoch": 1.0}))
    finished = push(model, "digits")
    assert "README.md (the card on the Hub is kept up instead)" in finished.stdout
    card = hub.files("ada/digits")["README.md"].decode()
    assert card.index("Read this first.") < card.index(BEGIN) < card.index(END) < card.index("A word from me.")
    assert card.index("A word from me.") < card.index("## Thanks")
    assert "The weights of epoch 1 were kept" in card
    third = push(model, "digits")
    assert third.exit_code == 0
    assert hub.files("ada/digits")["README.md"].decode() == card  # nothing grows from push to push

    HfApi().upload_file(path_or_fileobj=card.replace(END, "").encode(), path_in_repo="README.md", repo_id="ada/digits")
    refused = push(model, "digits")
    assert refused.exit_code == 2
    assert "found 1 and 0" in refused.stderr


@pytest.mark.usefixtures("python_loop")  # which is all that travels
def test_model_push_to_hub(hub, quick, tmp_path):
    """transformers' own way, with a card of ours in place of its draft; one that somebody wrote is left to them."""
    code = """
import torch
from lmu_hf import LMUConfig, LMUFeatureExtractor, LMUForSequenceClassification
model = LMUForSequenceClassification(LMUConfig(order=8, theta=20, hidden_size=4, num_labels=2))
LMUFeatureExtractor().push_to_hub("plain")
model.push_to_hub("plain", tags=["mine"])
LMUFeatureExtractor().push_to_hub("plain")
model.save_pretrained(folder)
LMUFeatureExtractor().save_pretrained(folder)
"""
    run_python(code, hub.client(ADA, tmp_path / "hers"), folder=str(tmp_path / "model"))
    remote = hub.files("ada/plain")
    assert not any(ADA.encode() in file or str(tmp_path).encode() in file for file in remote.values())
    loads = [("AutoModelForSequenceClassification", "AutoFeatureExtractor", "ada/plain", None)]
    printed = run_python(LOGITS, hub.client(None, tmp_path / "fresh"), hidden=True, loads=loads)
    assert printed.split() == [digest(tmp_path / "model")]
    card = remote["README.md"].decode()
    assert "More Information Needed" not in card
    assert BEGIN in card
    assert "- mine\n" in card
    assert "LABEL_0: 0." in card  # the example was run
    HfApi().upload_file(
        path_or_fileobj=b"---\nlicense: mit\n---\n# By hand\n", path_in_repo="README.md", repo_id="ada/plain"
    )
    LMUForSequenceClassification.from_pretrained(tmp_path / "model").push_to_hub("ada/plain")
    kept = hub.files("ada/plain")["README.md"].decode()
    assert "# By hand" in kept
    assert BEGIN not in kept


def test_a_card_that_cannot_be_written_stops_no_push(hub, monkeypatch, caplog):
    monkeypatch.setattr("lmu_hf.hub.write_card", refuse)
    LMUModel(LMUConfig(order=4, theta=20, hidden_size=4)).push_to_hub("bare")
    assert "the card stays the draft of transformers: no example" in caplog.text
    assert "model.safetensors" in hub.files("ada/bare")


def refuse(*arguments, **options):
    raise InputError("no example")
