"""Publishing a model on the Hugging Face Hub: what leaves, what never does, and one line for whatever goes wrong."""

from __future__ import annotations

import fnmatch
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .baselines import NOT_PUBLISHED
from .card import CARD, EXAMPLE, RESULT_FILE, is_draft, read_mapping, write_card
from .errors import HubError, InputError, first_line
from .plots import CONFUSION_MATRIX, LEARNING_CURVE, PREDICTIONS

logger = logging.getLogger(__name__)

# Everything that is a model, beside the code that `auto_map` names, and nothing else: no optimizer state, no training_args.bin,
# no logs, nobody's notes.
PUBLISHED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    RESULT_FILE,
    LEARNING_CURVE,
    CONFUSION_MATRIX,
    PREDICTIONS,
    EXAMPLE,
)
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")


@dataclass
class Published:
    """What a push did.

    Attributes:
        url: of the repository, or of the pull request.
        files: names of the files that are there now.
        left_out: names in the folder that are no part of a model, and stayed.
    """

    url: str
    files: list[str]
    left_out: list[str]


def push(
    model_dir: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    license: str | None = None,
    token: str | None = None,
    result: dict[str, Any] | None = None,
    message: str = "Upload model",
    card: bool = True,
) -> Published:
    """Publishes a model with its processor, its code and its card, all in one commit. The folder is only read.

    Args:
        model_dir: folder written by ``lmu-hf train`` or ``save_pretrained``.
        repo_id: ``user/name``, or ``name`` for the user's own. Made if it does not exist.
        private: make the repository private; refused where it exists and is public.
        create_pr: open a pull request instead of changing the branch.
        revision: branch, made if it does not exist; the main one when None.
        license: identifier of the weights' licence for the card; that of the card there, or Apache-2.0, when None.
        token: of the Hub; the one of ``hf auth login`` or ``HF_TOKEN`` when None.
        result: the record for the card, in place of ``result.json``.
        message: of the commit.
        card: write the card; False leaves the one that is there.

    Raises:
        InputError: the folder holds no publishable model, or name, token or rights are wrong.
        HubError: the Hub could not be reached or failed. Nothing is half done: a second try finishes the job.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if create_pr and revision not in (None, "main"):
        raise InputError("revision: a pull request is made against the main branch; leave out --revision or --create-pr")
    model_dir = Path(model_dir)
    files, left_out = collect(model_dir)
    api = HfApi(token=token, library_name="lmu-hf")
    check_for_secrets(files, model_dir, token or _stored_token())
    with _told(api.endpoint, repo_id):
        repo_id = _full_name(api, repo_id)
    with _told(api.endpoint, repo_id):
        existing = _existing_repo(api, repo_id, private, revision)
        operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        if card:
            own = _local_card(model_dir)
            if own is not None and existing.card is not None:
                left_out.append(f"{CARD} (the card on the Hub is kept up instead)")
            text = write_card(
                files,
                repo_id,
                result=result,
                revision=None if create_pr else revision,
                license=license,
                existing=own if existing.card is None else existing.card,
            )
            operations.append(CommitOperationAdd(CARD, text.encode()))
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        sent = [operation.path_in_repo for operation in operations]
        # Shards of an earlier push that was cut differently would be dead weight.
        stale = [name for name in existing.files if _matches(name, _WEIGHTS) and name not in files]
        operations += [CommitOperationDelete(name) for name in stale]
        commit = api.create_commit(
            repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr, num_threads=2
        )
    url = commit.pr_url if create_pr and commit.pr_url else f"{api.endpoint}/{repo_id}"
    return Published(url + (f"/tree/{revision}" if revision and not create_pr else ""), sent, left_out)


def replace_draft(folder: str | Path, repo_id: str, revision: str | None = None) -> None:
    """Puts a card of ours in the place of the draft that ``model.push_to_hub`` of transformers is about to upload.

    A card that somebody wrote stays as it is, and so does the draft where a card cannot be written; a warning says why.

    Args:
        folder: what is about to be uploaded.
        repo_id: ``user/name``.
        revision: branch that it goes to; None for the main one.
    """
    from huggingface_hub import ModelCard

    path = Path(folder) / CARD
    draft = path.read_text(encoding="utf-8")
    if not is_draft(draft):
        return
    tags = list(ModelCard(draft, ignore_metadata_errors=True).data.get("tags") or ())
    try:
        files, _ = collect(Path(folder))
        card = write_card(files, repo_id, result={"tags": tags} if tags else None, revision=revision)
    except InputError as error:
        logger.warning("the card stays the draft of transformers: %s", error)
        return
    path.write_text(card, encoding="utf-8")


def collect(model_dir: Path) -> tuple[dict[str, Path], list[str]]:
    """The files of a folder that belong to a model, name -> path, and the names of the others.

    Raises:
        InputError: it holds no model of this package, or one that could not be loaded without it.
    """
    if not model_dir.is_dir():
        raise InputError(f"model: no folder {model_dir}")
    if not (model_dir / "config.json").is_file():
        raise InputError(f"model: {model_dir} holds no config.json; give the folder of a trained model")
    files, left_out = {}, []
    for path in sorted(model_dir.iterdir()):
        if path.is_file() and _matches(path.name, PUBLISHED):
            files[path.name] = path
        elif path.name != CARD:
            left_out.append(path.name + ("/" if path.is_dir() else ""))
    config = read_mapping(files["config.json"])
    if config.get("model_type") == "recurrent":
        raise InputError(f"model: {model_dir} holds {NOT_PUBLISHED}")
    if config.get("model_type") != "lmu":
        raise InputError(f"model: expected a model of type 'lmu' in {model_dir}, found {config.get('model_type')!r}")
    if not any(_matches(name, ("model*.safetensors",)) for name in files):
        raise InputError(f"model: {model_dir} holds no weights; expected model.safetensors")
    named = [config.get("auto_map", {})]
    if "preprocessor_config.json" in files:
        named.append(read_mapping(files["preprocessor_config.json"]).get("auto_map", {}))
    try:
        code = [path for auto_map in named for path in _code(model_dir, auto_map)]
    except OSError:
        code = []
    if not code:
        raise InputError(f"model: {model_dir} lacks the code that travels with a model; load and save it with this version")
    files |= {path.name: path for path in code}
    return files, [name for name in left_out if name not in files]


def _code(model_dir: Path, auto_map: dict[str, str]) -> list[Path]:
    """The files of the classes in an ``auto_map`` and all that they import beside them; OSError if one is missing."""
    from transformers.dynamic_module_utils import get_relative_import_files

    modules = {model_dir / f"{name.partition('.')[0]}.py" for name in auto_map.values()}
    return sorted(modules | {Path(path) for module in modules for path in get_relative_import_files(module)})


def check_for_secrets(files: dict[str, Path], model_dir: Path, token: str | None) -> None:
    """Raises InputError if a file holds an access token or tells where on this machine it was made."""
    places = {str(model_dir.resolve()), f"{Path.home()}/", f"{Path(tempfile.gettempdir()).resolve()}/"}
    for name, path in files.items():
        with path.open("rb") as file:
            size = path.stat().st_size
            if name.endswith(".safetensors"):
                # Weights are numbers; words are in the header alone, whose length stands in front of it.
                size = min(size, int.from_bytes(file.read(8), "little"))
            content = file.read(size)
        if _TOKEN.search(content) or (token and token.encode() in content):
            raise InputError(f"model: {name} holds an access token and is not published; remove it, and revoke the token")
        if name == RESULT_FILE or name.endswith("config.json"):
            for word in _words(read_mapping(path)):
                if len(word) > 2 and Path(word).is_absolute() and _exists(word):
                    raise InputError(f"model: {name} names the local path {word} and is not published; remove it")
        if name.endswith(".json"):
            for place in places:
                if len(place) > 2 and place.encode() in content:
                    raise InputError(f"model: {name} names the local path {place} and is not published; remove it")


def _words(content: Any) -> Iterator[str]:
    """Every string in the content of a JSON file but the keys."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _words(value)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # no path at all: too long, or with a null in it
        return False


@dataclass
class _Existing:
    files: list[str]
    card: str | None


def _existing_repo(api: Any, repo_id: str, private: bool, revision: str | None) -> _Existing:
    """What is there already.

    Raises:
        InputError: it holds another kind of model, or is public though it should be private.
    """
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return _Existing([], None)
    if private and not info.private:
        raise InputError(f"private: {repo_id} exists and is public; choose another name, or change it in its settings first")
    try:
        names = api.list_repo_files(repo_id, revision=revision)
    except RevisionNotFoundError:
        names, revision = api.list_repo_files(repo_id), None  # a branch that is about to be made, from the main one
    with tempfile.TemporaryDirectory() as folder:

        def read(name: str) -> str | None:
            try:
                path = api.hf_hub_download(repo_id, name, revision=revision, local_dir=folder)
            except EntryNotFoundError:
                return None
            return Path(path).read_text(encoding="utf-8", errors="replace")

        if "config.json" in names:
            found = re.search(r'"model_type"\s*:\s*"([^"]*)"', read("config.json") or "")
            if found is None or found[1] != "lmu":
                kind = f"a model of type {found[1]!r}" if found else "another kind of model"
                raise InputError(f"repo: {repo_id} holds {kind} and is left as it is; choose another name")
        return _Existing(names, read(CARD) if CARD in names else None)


def _full_name(api: Any, repo_id: str) -> str:
    """The name with its owner. Asks the Hub who we are in any case: a wrong token is better known before the work."""
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    owner = api.whoami()["name"]
    return repo_id if "/" in repo_id else f"{owner}/{repo_id}"


def _local_card(model_dir: Path) -> str | None:
    path = model_dir / CARD
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _stored_token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@contextmanager
def _told(endpoint: str, repo_id: str) -> Iterator[None]:
    """Turns what the client raises into one line that says what to do."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # of the HTTP library below
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except (InputError, HubError):
        raise
    except HFValidationError as error:
        raise InputError(f"repo: {error}") from error
    except LocalTokenNotFoundError as error:
        raise InputError("token: not logged in; run `hf auth login`, or set HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        raise InputError("hub: HF_HUB_OFFLINE is set, so that nothing can be published; unset it") from error
    except Exception as error:
        # The client wraps what happens while it uploads; the answer of the server, or the lack of one, is underneath.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HTTPError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, HfHubHTTPError):
            raise _explain(cause, repo_id) from error
        if cause is None and not isinstance(error, ConnectionError | RuntimeError | json.JSONDecodeError):
            raise  # not the Hub's doing
        raise HubError(
            f"hub: no answer from {endpoint} ({first_line(cause or error)}); nothing was changed, so try again later"
        ) from error


def _explain(error: Any, repo_id: str) -> InputError | HubError:
    from huggingface_hub.errors import RevisionNotFoundError

    status, said = error.response.status_code, error.server_message or first_line(error)
    if status == 401:
        return InputError("token: refused by the Hub; run `hf auth login` again, or correct HF_TOKEN")
    if status == 403:
        return InputError(f"token: it may not write to {repo_id}; use one with write access, your own name, or --create-pr")
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"revision: not found in {repo_id}")
    if status == 404:
        return InputError(f"repo: {repo_id} was not found, or may not be seen with this token")
    if status < 500 and status not in (408, 409, 412, 429):
        return InputError(f"hub: {repo_id} was refused with {status}: {said}")
    return HubError(
        f"hub: failed with {status}: {said}; {repo_id} is as it was, a second try goes on from there and sends nothing twice"
    )
