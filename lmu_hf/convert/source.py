"""Reading Keras checkpoints: HDF5 files and ``.keras`` archives, without TensorFlow and without trusting the file.

Nothing in a file is run or unpickled, no link out of it is followed, and no array is read before its shape has been compared
with the one that the architecture asks for.

What Keras writes, by the content and not by the name of the file:

| content                                   | written by                                    |
|-------------------------------------------|-----------------------------------------------|
| zip of config.json and model.weights.h5   | ``.keras`` of Keras 3 and of tf.keras >= 2.12 |
| HDF5 with ``model_weights``               | whole models of Keras 2, and ``.h5`` of 3     |
| HDF5 with the attribute ``layer_names``   | ``save_weights`` of Keras 2                   |
| HDF5 with ``layers`` or ``_layer_check..``| ``.weights.h5`` of Keras 3 and tf.keras 2     |
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError

MAX_JSON = 16 << 20  # bytes; the configuration of a large model has some 100 kB
MAX_WEIGHTS = 4 << 30  # bytes of all weights of a file
MAX_RATIO = 100  # a compressed array larger than this over its stored size is no array of trained weights
MAX_OBJECTS = 20_000  # groups and arrays in one file
MAX_DEPTH = 24
PROBE, PROBE_SECONDS = Path(__file__).with_name("probe.py"), 20.0
_CONTAINER = re.compile("(?:layers|_layer_checkpoint_dependencies)/([^/]+)/")
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"


@dataclass
class StoredArray:
    """An array of a file, not read yet.

    Attributes:
        path: its path inside the layer, parts joined by "/", for example "rnn/lmu_cell/kernel".
        shape: its shape.
        read: returns it, float32 or float64.
    """

    path: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def leaf(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def parents(self) -> list[str]:
        """The other parts."""
        return self.path.split("/")[:-1]


@dataclass
class StoredLayer:
    """The arrays of one layer.

    Attributes:
        name: name of the layer, or of its group.
        arrays: in the order of the file.
        numbered: the arrays have positions for names (Keras 3), so that groups and shapes must tell what they are.
        inside: path of the model inside of the model that it belongs to.
    """

    name: str
    arrays: list[StoredArray]
    numbered: bool = False
    inside: str = ""


@dataclass
class Source:
    """A checkpoint.

    Attributes:
        name: what to call it in messages.
        layers: the layers that have weights, in the order of the file.
        config: the model's configuration as Keras wrote it, None for weights alone.
        loss: name of the training loss, if the file tells.
        keras_version: as the file says.
        sha256: of the file.
    """

    name: str
    layers: list[StoredLayer]
    config: dict[str, Any] | None = None
    loss: str | None = None
    keras_version: str | None = None
    sha256: str | None = None
    closing: list[Callable[[], None]] = field(default_factory=list)

    def close(self) -> None:
        """Closes the file."""
        while self.closing:
            self.closing.pop()()


def open_source(source: Any) -> Source:
    """Opens a checkpoint, or looks into a live Keras model.

    Args:
        source: path of a file, or a model with ``to_json()`` and ``layers``.

    Raises:
        InputError: it is missing, damaged, hostile, or none of the known formats.
    """
    if not isinstance(source, str | Path):
        return _open_model(source)
    path = Path(source)
    if path.is_dir():
        raise InputError(f"{path}: expected a .keras or .h5 file, found a folder; TensorFlow's SavedModel is not supported")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(8)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    try:
        if head == _HDF5_MAGIC:
            opened = _open_hdf5(path, path)
        elif head[:4] == b"PK\x03\x04":
            opened = _open_archive(path)
        else:
            raise InputError(f"{path}: expected an HDF5 file or a .keras archive, found neither; is the download complete?")
    except InputError:
        raise
    except Exception as error:  # of zipfile, zlib, h5py: many kinds for bytes that are not what they should be
        raise InputError(f"{path}: damaged or cut off: {' '.join(str(error).split())[:200]}") from error
    opened.sha256 = digest
    return opened


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def read_json(text: bytes | str, what: str) -> Any:
    """Parses JSON, with one error for everything that can be wrong with it."""
    if len(text) > MAX_JSON:
        raise InputError(f"{what}: expected at most {MAX_JSON >> 20} MiB of JSON, found {len(text) >> 20} MiB")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what}: expected JSON, found something else: {str(error)[:100]}") from error


def h5py_module() -> Any:
    """h5py, or one clear error."""
    try:
        import h5py
    except ImportError as error:
        raise InputError("reading Keras files needs h5py; pip install 'lmu-hf[convert]'") from error
    return h5py


def _open_archive(path: Path) -> Source:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}

        def read(name: str, limit: int) -> bytes:
            info = members[name]
            bomb = info.file_size > (1 << 20) and info.file_size > MAX_RATIO * max(info.compress_size, 1)
            if info.file_size > limit or bomb:
                raise InputError(
                    f"{path}: {name} unpacks to {info.file_size:,} bytes from {info.compress_size:,}; that is no checkpoint"
                )
            if info.flag_bits & 1:
                raise InputError(f"{path}: {name} is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(f"{path}: {name} is compressed in a way that Keras does not use")
            with archive.open(info) as member:
                # Not read(): that would unpack up to a gigabyte of a member that lies about its size.
                content = member.read(info.file_size)
                member.read(1)  # the end, where the checksum is compared
                return content

        for name in ("config.json", "model.weights.h5"):
            if name not in members:
                raise InputError(f"{path}: expected config.json and model.weights.h5 in the archive, found no {name}")
        config = read_json(read("config.json", MAX_JSON), f"{path}: config.json")
        metadata = read_json(read("metadata.json", MAX_JSON), f"{path}: metadata.json") if "metadata.json" in members else {}
        weights = io.BytesIO(read("model.weights.h5", MAX_WEIGHTS))
    if not isinstance(config, dict):
        raise InputError(f"{path}: config.json: expected a mapping, found {type(config).__name__}")
    opened = _open_hdf5(weights, path)
    opened.config = config
    opened.loss = _loss_name(config.get("compile_config"))
    if isinstance(metadata, dict) and "keras_version" in metadata:
        opened.keras_version = str(metadata["keras_version"])
    return opened


def _survives(file: Any, path: Path) -> None:
    """Raises InputError if the HDF5 library crashes or hangs on the file; see probe.py."""
    h5py_module()
    command = [sys.executable, "-I", str(PROBE)]
    with path.open("rb") if file is path else io.BytesIO(file.getbuffer()) as stream:
        content = stream.read()
    try:
        # One second more for every 20 MB.
        done = subprocess.run(
            command, input=content, capture_output=True, timeout=PROBE_SECONDS + len(content) / 2e7, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{path}: damaged: the HDF5 library does not come to an end with it") from error
    if done.returncode < 0:
        raise InputError(f"{path}: damaged: the HDF5 library crashes on it")


def _open_hdf5(file: Any, path: Path) -> Source:
    _survives(file, path)
    h5 = h5py_module().File(file, "r")
    try:
        top = set(h5)
        if "model_weights" in top or "layer_names" in h5.attrs or "layer_names0" in h5.attrs:
            weights = _child(h5, "model_weights", path) if "model_weights" in top else h5
            layers = _named_layers(weights, path)
        elif any(name.replace("\\", "/").split("/")[0] in ("layers", "_layer_checkpoint_dependencies") for name in top):
            layers = _numbered_layers(h5, path)
        else:
            raise InputError(
                f"{path}: expected the weights of a Keras model, found an HDF5 file with {sorted(top)[:5] or 'nothing'} in it"
            )
        config = _attribute(h5, "model_config")
        training = _attribute(h5, "training_config")
        version = _attribute(h5, "keras_version")
        if version is None and "model_weights" in top:
            version = _attribute(h5["model_weights"], "keras_version")
        parsed = None if config is None else read_json(config, f"{path}: model_config")
        if parsed is not None and not isinstance(parsed, dict):
            raise InputError(f"{path}: model_config: expected a mapping, found {type(parsed).__name__}")
        loss = None if training is None else _loss_name(read_json(training, f"{path}: training_config"))
    except BaseException:
        h5.close()
        raise
    return Source(str(path), layers, parsed, loss, version, closing=[h5.close])


def _text(value: Any) -> str:
    # h5py gives bytes, str or arrays of either, by the version of Keras that wrote them.
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _attribute(group: Any, name: str) -> str | None:
    return _text(group.attrs[name]) if name in group.attrs else None


def _names(group: Any, name: str, path: Path) -> list[str]:
    """A list of names, which Keras cuts into numbered attributes where it is longer than HDF5 allows."""
    if name in group.attrs:
        return [_text(entry) for entry in np.asarray(group.attrs[name]).reshape(-1)]
    names: list[str] = []
    index = 0
    while f"{name}{index}" in group.attrs:
        names += [_text(entry) for entry in np.asarray(group.attrs[f"{name}{index}"]).reshape(-1)]
        index += 1
    if not index:
        raise InputError(f"{path}: group {group.name} has no attribute {name}; not weights of a Keras model")
    return names


def _child(group: Any, name: str, path: Path) -> Any:
    """A member of a group; links are not followed, since they may lead out of the file."""
    import h5py

    for part in name.split("/"):
        link = group.get(part, getlink=True) if isinstance(group, h5py.Group) and part in group else None
        if link is None:
            raise InputError(f"{path}: the file names {name!r}, but has no such weights; damaged or cut off?")
        if not isinstance(link, h5py.HardLink):
            raise InputError(f"{path}: {group.name}/{part} is a link; a Keras checkpoint has none, and it is not followed")
        group = group[part]
    return group


def _stored(dataset: Any, name: str, path: Path) -> StoredArray:
    import h5py

    if not isinstance(dataset, h5py.Dataset):
        raise InputError(f"{path}: {name}: expected an array, found a group")
    shape, dtype = dataset.shape, dataset.dtype
    if shape is None or dtype.kind != "f":
        return StoredArray(
            name, shape or (), lambda: _refuse(f"{path}: {name}: expected floating point numbers, found {dtype}")
        )

    def read() -> np.ndarray:
        if dataset.is_virtual or dataset.external:
            raise InputError(f"{path}: {name}: its numbers lie outside of the file; they are not read")
        size, stored = dataset.size * dtype.itemsize, dataset.id.get_storage_size()
        if size > MAX_WEIGHTS or (size > (1 << 20) and size > MAX_RATIO * max(stored, 1)):
            raise InputError(f"{path}: {name}: {shape} unpacks to {size:,} bytes from {stored:,}; that is no checkpoint")
        try:
            array = np.asarray(dataset[()])
        except Exception as error:  # as above
            raise InputError(f"{path}: {name}: damaged or cut off: {' '.join(str(error).split())[:150]}") from error
        array = array.astype(np.float64 if dtype.itemsize == 8 else np.float32)
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {name}: expected finite numbers, found NaN or infinity; the training had diverged")
        return array

    return StoredArray(name, tuple(shape), read)


def _refuse(message: str) -> np.ndarray:
    raise InputError(message)


def _clean(name: str) -> str:
    return re.sub(r":\d+$", "", name)


def _named_layers(weights: Any, path: Path) -> list[StoredLayer]:
    layers, count = [], 0
    listed = _names(weights, "layer_names", path)
    if len(set(listed)) != len(listed):
        raise InputError(f"{path}: a layer is listed twice; that is no checkpoint")
    for name in listed:
        group = _child(weights, name, path)
        names = _names(group, "weight_names", path)
        count += len(names)
        if count > MAX_OBJECTS:
            raise InputError(f"{path}: more than {MAX_OBJECTS:,} weights; that is no checkpoint")
        if names:
            layers.append(StoredLayer(name, [_stored(_child(group, n, path), _clean(n), path) for n in names]))
    return layers


def _numbered_layers(h5: Any, path: Path) -> list[StoredLayer]:
    by_layer: dict[tuple[str, str], list[StoredArray]] = {}
    for name, dataset in _walk(h5, path):
        # Keras 2 wrote the separators of Windows into some of its names.
        rest, inside = name.replace("\\", "/"), ""
        if not _CONTAINER.match(rest):
            continue
        # A model inside of the model has layers in turn.
        while match := _CONTAINER.match(rest):
            inside, layer, rest = f"{inside}/{match[1]}", match[1], rest[match.end() :]
        by_layer.setdefault((inside.rpartition("/")[0], layer), []).append(_stored(dataset, rest, path))
    layers = [
        StoredLayer(name, sorted(arrays, key=_natural), numbered=True, inside=inside)
        for (inside, name), arrays in by_layer.items()
    ]
    return sorted(layers, key=lambda layer: natural(layer.name))


def natural(name: str) -> tuple:
    """A key that sorts "lmu_10" behind "lmu_9"."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name))


def _natural(array: StoredArray) -> tuple:
    return natural(array.path)


def _walk(h5: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """All arrays. Written out, because hard links can make a circle of groups."""
    import h5py

    count, stack = 0, [("", h5, 0)]
    while stack:
        prefix, group, depth = stack.pop()
        for name in group:
            count += 1
            if count > MAX_OBJECTS or depth > MAX_DEPTH:
                raise InputError(f"{path}: more than {MAX_OBJECTS:,} groups, or {MAX_DEPTH} levels; that is no checkpoint")
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise InputError(f"{path}: {prefix}{name} is a link; a Keras checkpoint has none, and it is not followed")
            child = group[name]
            if isinstance(child, h5py.Group):
                stack.append((f"{prefix}{name}/", child, depth + 1))
            else:
                yield f"{prefix}{name}", child


def _loss_name(training: Any) -> str | None:
    """The loss of a training configuration, as snake case; None if it does not tell one."""
    loss = training.get("loss") if isinstance(training, dict) else None
    if isinstance(loss, list | tuple) and len(loss) == 1:
        loss = loss[0]
    if isinstance(loss, dict):
        loss = loss.get("config") if loss.get("class_name") == "function" else loss.get("class_name")
    return snake_case(loss) if isinstance(loss, str) else None


def snake_case(name: str) -> str:
    """Keras' names of layers for classes: "SimpleRNNCell" -> "simple_rnn_cell"."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _open_model(model: Any) -> Source:
    if not callable(getattr(model, "to_json", None)) or not hasattr(model, "layers"):
        raise InputError(f"source: expected a path or a Keras model, found {type(model).__name__}")
    layers = []
    for layer in model.layers:
        arrays = []
        for weight in layer.weights:
            name = _clean(getattr(weight, "path", None) or weight.name)
            shape = tuple(int(size) for size in weight.shape)
            arrays.append(StoredArray(name, shape, partial(_finite, weight)))
        if arrays:
            layers.append(StoredLayer(layer.name, arrays))
    loss = getattr(model, "loss", None)
    loss = loss if isinstance(loss, str) else getattr(loss, "__name__", None) or (type(loss).__name__ if loss else None)
    config = read_json(model.to_json(), "to_json()")
    version = config.get("keras_version") if isinstance(config, dict) else None
    library = sys.modules.get(type(model).__module__.split(".")[0])
    version = version or getattr(library, "__version__", None)  # Keras 3 does not write it there
    return Source(f"the Keras model {model.name!r}", layers, config, snake_case(loss) if loss else None, version)


def _finite(weight: Any) -> np.ndarray:
    array = weight.numpy() if hasattr(weight, "numpy") else np.asarray(weight)
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise InputError(f"{weight.name}: expected finite floating point numbers, found others; the training had diverged")
    return array.astype(np.float64 if array.dtype.itemsize == 8 else np.float32)
