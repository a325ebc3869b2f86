"""Calibration data: every kind of source becomes a re-iterable stream of checked batches.

`open_data` is the one entry. Whatever can be read without touching the samples (names, shapes, dtypes and the number
of samples of files and arrays) is checked when the data are opened, and the rest while they are iterated. No more than
a batch or two is in memory at a time, so that memory does not grow with the number of samples.
"""

import contextlib
import dataclasses
import importlib
import inspect
import itertools
import math
import os
import re
import sys
import types
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

import numpy as np

from tfquant.errors import ConfigError, DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp"})


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """(pixels - mean) / deviation, of pixels of 0..255.

    Attributes:
        mean: one for all channels, or one for each of RGB (of BGR where `bgr`).
        deviation: likewise.
        bgr: whether the order of the channels is reversed before.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    bgr: bool = False

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """float32 pixels (..., height, width, channels), preprocessed; shape and dtype stay."""
        pixels = pixels[..., ::-1] if self.bgr else pixels
        return (pixels - np.array(self.mean, np.float32)) / np.array(self.deviation, np.float32)

    @property
    def needs_rgb(self) -> bool:
        return self.bgr or len(self.mean) > 1


PREPROCESS: Mapping[str, Preprocessing] = types.MappingProxyType(
    {
        "tf": Preprocessing((127.5,), (127.5,)),
        "torch": Preprocessing((255 * 0.485, 255 * 0.456, 255 * 0.406), (255 * 0.229, 255 * 0.224, 255 * 0.225)),
        "caffe": Preprocessing((103.939, 116.779, 123.68), (1.0,), bgr=True),
        "unit": Preprocessing((0.0,), (255.0,)),
        "none": Preprocessing((0.0,), (1.0,)),
    }
)

# By kind of the input's dtype: the kinds of data that may be cast to it. Integers are also checked value by value.
_CASTABLE = {"f": "fiub", "c": "cfiub", "i": "iub", "u": "iub", "b": "b", "O": "OSU"}

_FUNCTION_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """One input of the model's signature.

    Attributes:
        name: Name of the input.
        shape: Its dimensions, of which the first is the batch unless the data say otherwise; `()` is a scalar, a `None`
            dimension may be anything, and `None` as a whole means that the rank is unknown.
        dtype: NumPy name of its dtype, "object" for strings.
        batched: Whether the first axis can be a batch; else what Python code yields is one sample each.
    """

    name: str
    shape: tuple[int | None, ...] | None
    dtype: str
    batched: bool = True


class Batches:
    """Checked batches of calibration data; every iteration reads the source afresh.

    Iterating yields dictionaries from input name to a C-contiguous array of the input's shape and dtype.

    Attributes:
        samples: Number of samples that an iteration yields, `None` where that is not known beforehand.
        batched: Whether the first axis of every array (but of scalars) counts samples; else each sample is a call of its own.
    """

    samples: int | None
    batched: bool

    def __init__(
        self, plan: "_Plan", where: str, pieces: Callable[[], Iterator[dict[str, np.ndarray]]], samples: int | None = None
    ) -> None:
        self.samples = samples
        self.batched = plan.batched
        self._plan = plan
        self._where = where
        self._pieces = pieces

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return _rebatch(self._pieces(), self._plan, self._where)

    @property
    def count(self) -> int | None:
        """Number of batches that an iteration yields, `None` where that is not known beforehand."""
        return None if self.samples is None else -(-self.samples // self._plan.size)

    def rows(self, batch: Mapping[str, np.ndarray]) -> int:
        """Number of samples that a yielded batch holds."""
        return next((len(array) for array in batch.values() if array.ndim), 1) if self.batched else 1


def open_data(
    source: Any,
    inputs: Sequence[InputSpec],
    *,
    preprocess: str = "none",
    subset_size: int = 300,
    batch_size: int = 10,
    by_position: bool = True,
) -> Batches:
    """Opens calibration data of any supported kind.

    Args:
        source: Path of an `.npz` keyed by input name, of an `.npy` or of a folder of images (the latter two for models of
            one input); `"package.module:function"`; a function without arguments, a `tf.data.Dataset` or another
            re-iterable, which yield samples or batches as `x`, `(x,)` or `{name: x}`; an array of shape (samples, ...);
            or a dictionary from input name to such an array. Scalar inputs take an array of shape (samples,) or (), and
            from Python code one value for a whole item.
        inputs: The inputs of the model's signature, in the order in which items without names give them.
        preprocess: Key of `PREPROCESS`, for folders of images.
        subset_size: Largest number of samples to take.
        batch_size: Number of samples in a batch, unless the model has a fixed batch dimension, which then counts.
        by_position: Whether the order of several inputs is known; else items must name them.

    Returns:
        The batches. Each has `batch_size` samples, the last one perhaps fewer. Where samples differ in shape (the model has
        dimensions of unknown size) or in the value of a scalar input, a batch also ends where that changes. Arrays, files and
        images with one axis more than the inputs hold a call per sample: each is yielded alone, without a batch axis; so is
        each sample of a model that has but scalar inputs.

    Raises:
        DataError: The data are missing, broken, empty or do not fit the inputs. What only the samples can show is raised
            while iterating.
        ConfigError: An option has a value that it cannot have.
    """
    plan = _make_plan(tuple(inputs), preprocess, subset_size, batch_size, by_position)
    where = _label(source)
    if isinstance(source, str | os.PathLike):
        source = _locate(source)
    if isinstance(source, Path) and source.is_dir():
        return _open_images(source, plan, preprocess)
    if preprocess != "none":
        raise ConfigError(
            _one_line(f"preprocess is for folders of images; other data must come preprocessed. Received: {preprocess!r}.")
        )
    if isinstance(source, Path):
        return _open_file(source, plan)
    if isinstance(source, np.ndarray):
        return _open_arrays({_only_input(plan, where).name: source}, plan, where)
    _refuse_labels(source, plan)
    if isinstance(source, Mapping):
        return _open_arrays({name: _as_array(value, name, where) for name, value in source.items()}, plan, where)
    return _open_python(source, plan, where)


# Options and messages


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How an iteration cuts the samples into batches."""

    inputs: tuple[InputSpec, ...]
    size: int  # samples in a batch
    limit: int  # samples in all
    exact: bool  # the model takes nothing but full batches
    batched: bool  # else each sample is a call
    by_position: bool  # items need not name the inputs

    @property
    def scalars(self) -> list[str]:
        return [spec.name for spec in self.inputs if spec.shape == ()]

    def settled(self, arrays: Mapping[str, "_Shaped"] | None = None) -> "_Plan":
        """The plan for data that have these arrays, or for Python data: whether and how they are batched."""
        ranks = {spec.name: len(spec.shape) for spec in self.inputs if spec.shape}
        one_by_one = arrays is None and not any(spec.batched for spec in self.inputs if spec.shape != ())
        if (
            one_by_one
            or len(self.scalars) == len(self.inputs)
            or (arrays is not None and ranks and all(len(arrays[name].shape) == rank + 1 for name, rank in ranks.items()))
        ):
            return dataclasses.replace(self, size=1, batched=False)
        fixed = {spec.shape[0] for spec in self.inputs if spec.shape and spec.shape[0] is not None}
        if len(fixed) > 1:
            _fail(f"The model's inputs must agree on the batch dimension. Received: {[spec.shape for spec in self.inputs]}.")
        if not fixed:
            return self
        size = fixed.pop()
        if self.limit < size:
            raise ConfigError(f"subset_size must be at least {size}, the model's fixed batch. Received: {self.limit}.")
        return dataclasses.replace(self, size=size, limit=self.limit // size * size, exact=True)

    def known(self, samples: int, arrays: Mapping[str, "_Shaped"]) -> int | None:
        """How many of `samples` will be yielded, if that can be told: full batches of one scalar value may be fewer."""
        return None if self.exact and any(arrays[name].shape for name in self.scalars) else samples

    def usable(self, rows: int, where: str) -> int:
        """Number of samples that will be taken out of `rows`."""
        count = min(rows, self.limit)
        count -= count % self.size if self.exact else 0
        if not count:
            self.fail_empty(rows, where)
        return count

    def fail_empty(self, rows: int, where: str) -> NoReturn:
        if not rows:
            _fail(f"The calibration data hold no samples; give some hundred typical ones. Received: {where}.")
        _fail(
            f"The model takes batches of exactly {self.size} samples, and {where} has no {self.size} consecutive samples of "
            f"one shape{' and scalar value' if self.scalars else ''}; give more samples. Received: {rows} samples."
        )


def _make_plan(inputs: tuple[InputSpec, ...], preprocess: str, subset_size: int, batch_size: int, by_position: bool) -> _Plan:
    if preprocess not in PREPROCESS:
        raise ConfigError(_one_line(f"preprocess must be one of {_names(PREPROCESS)}. Received: {preprocess!r}."))
    for option, value in (("subset_size", subset_size), ("batch_size", batch_size)):
        if not isinstance(value, int | np.integer) or value < 1:
            raise ConfigError(_one_line(f"{option} must be a positive integer. Received: {value!r}."))
    if not inputs:
        _fail("Calibration needs a model with inputs. Received: a model with none.")
    return _Plan(inputs, int(batch_size), int(subset_size), False, True, by_position or len(inputs) == 1)


def _fail(message: str, cause: BaseException | None = None) -> NoReturn:
    raise DataError(_one_line(message)) from cause


def _one_line(text: str) -> str:
    return " ".join(part.strip() for part in text.splitlines())


def _describe(error: BaseException) -> str:
    try:
        told = str(error)
    except Exception:  # the user's own class may fail here too
        told = "no message"
    message = re.sub(r"\{\{.*?\}\} ?", "", _one_line(told))  # TensorFlow's {{function_node ...}}
    text = f"{type(error).__name__}: {message}"
    return text if len(text) <= 300 else text[:300] + "..."  # and its messages can run to pages


def _names(names: Iterable[Any]) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"


def _label(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source)
    return str(getattr(source, "__qualname__", type(source).__name__))


def _only_input(plan: _Plan, where: str) -> InputSpec:
    if len(plan.inputs) != 1:
        _fail(
            f"{where} gives data for one input, but the model has {len(plan.inputs)}; save an .npz keyed by input name. "
            f"Received: a model with inputs {_names(spec.name for spec in plan.inputs)}."
        )
    return plan.inputs[0]


# Checks, of data and of headers alike


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...


def _check_names(inputs: Sequence[InputSpec], names: Collection[Any], where: str) -> None:
    expected = [spec.name for spec in inputs]
    if set(names) != set(expected):
        _fail(f"{where} must have exactly the model's inputs, {_names(expected)}; rename or drop. Received: {_names(names)}.")


def _check_arrays(plan: _Plan, arrays: Mapping[str, _Shaped], where: str) -> int:
    """Checks shapes and dtypes of one array (samples, ...) for each input, and returns the number of samples.

    A scalar input may have an array of shape (): one value for all samples.
    """
    for spec in plan.inputs:
        _check_shape(spec, arrays[spec.name].shape, plan.batched, where)
        _check_dtype(spec, arrays[spec.name].dtype, where)
    rows = {spec.name: arrays[spec.name].shape[0] for spec in plan.inputs if arrays[spec.name].shape}
    if len(set(rows.values())) > 1:
        _fail(f"{where} must have the same number of samples for every input. Received: {rows}.")
    return next(iter(rows.values()), 1)


def _check_shape(spec: InputSpec, shape: tuple[int, ...], batched: bool, where: str) -> None:
    if spec.shape == ():
        if len(shape) > 1:
            _fail(f"Input {spec.name!r} in {where} is a scalar: give shape (samples,) or (). Received: {shape}.")
        return
    if spec.shape is None:
        wanted: tuple[int | None, ...] = (None,) * max(len(shape), 1)
    else:
        wanted = (None, *spec.shape[1:]) if batched else (None, *spec.shape)
    if len(shape) != len(wanted) or any(want not in (None, got) for want, got in zip(wanted, shape, strict=True)):
        expected = "any with a batch dimension" if spec.shape is None else wanted
        _fail(f"Input {spec.name!r} in {where} has the wrong shape; expected {expected}. Received: {shape}.")
    if 0 in shape[1:]:
        _fail(f"Samples of input {spec.name!r} in {where} must not be empty. Received: shape {shape}.")


def _check_dtype(spec: InputSpec, dtype: np.dtype, where: str) -> None:
    try:
        kind = _kind_of(np.dtype(spec.dtype))
    except TypeError as error:
        _fail(f"Input {spec.name!r} of the model has a dtype that NumPy lacks. Received: {spec.dtype}.", error)
    if _kind_of(dtype) not in _CASTABLE.get(kind, ""):
        wanted = "strings" if kind == "O" else spec.dtype
        _fail(f"Input {spec.name!r} in {where} cannot be cast safely; convert it to {wanted}. Received: {dtype}.")


def _kind_of(dtype: np.dtype) -> str:
    return "f" if dtype.name == "bfloat16" else dtype.kind  # which NumPy calls a void


def _convert(spec: InputSpec, array: np.ndarray, first: int, where: str) -> np.ndarray:
    """Casts a batch whose first sample has the index `first`; always copies, as generators may reuse their buffer."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(spec.dtype, order="C", subok=False)  # a memmap would pass on its class
    if _kind_of(cast.dtype) in "fc":
        bad, problem = ~np.isfinite(cast), f"NaN or infinity (as {spec.dtype})"
    elif cast.dtype.kind == "O":
        flags = [not isinstance(value, str | bytes) for value in cast.flat]
        bad, problem = np.array(flags, bool).reshape(cast.shape), "something that is not a string"
    else:
        bad, problem = cast != array, f"a value that does not fit {spec.dtype}"
    if bad.any():
        where_bad = tuple(np.argwhere(bad)[0])
        _fail(
            f"Input {spec.name!r} has {problem} in sample {first + int(where_bad[0])} of {where}; mend or drop that sample. "
            f"Received: {array[where_bad]}."
        )
    return cast


# Batches


def _rebatch(pieces: Iterator[dict[str, np.ndarray]], plan: _Plan, where: str) -> Iterator[dict[str, np.ndarray]]:
    """Joins and cuts pieces of any number of rows into batches of `plan.size`; casts no more than a batch at a time."""
    pending: list[dict[str, np.ndarray]] = []
    rows = total = 0
    kind: Any = None
    empty = True
    for piece in _runs(pieces, plan):
        length = len(next(iter(piece.values())))
        start = 0
        previous, kind = kind, _kind(piece, plan)
        if pending and kind != previous:
            if not plan.exact:
                yield _join(pending, plan)
                empty = False
            pending, rows = [], 0
        while start < length and total < plan.limit:
            take = min(plan.size - rows, length - start, plan.limit - total)
            pending.append({s.name: _convert(s, piece[s.name][start : start + take], total, where) for s in plan.inputs})
            start, rows, total = start + take, rows + take, total + take
            if rows == plan.size:
                yield _join(pending, plan)
                pending, rows, empty = [], 0, False
        if total == plan.limit:  # before the next piece is asked for: it may cost something, or never come
            break
    if pending and not plan.exact:
        yield _join(pending, plan)
    elif empty:
        plan.fail_empty(total, where)


def _runs(pieces: Iterator[dict[str, np.ndarray]], plan: _Plan) -> Iterator[dict[str, np.ndarray]]:
    """Cuts pieces where the value of a scalar input changes: a batch is fed with one. Drops pieces without rows."""
    for piece in pieces:
        columns = [piece[name] for name in plan.scalars]
        cuts = {int(row) + 1 for column in columns for row in np.flatnonzero(column[1:] != column[:-1])}
        for start, end in itertools.pairwise([0, *sorted(cuts), len(next(iter(piece.values())))]):
            if start < end:
                yield {name: array[start:end] for name, array in piece.items()}


def _kind(piece: Mapping[str, np.ndarray], plan: _Plan) -> Any:
    """What rows of one batch have in common: the shapes of their arrays, and the values of scalars."""
    return {name: array.shape[1:] for name, array in piece.items()}, [piece[name][0].tolist() for name in plan.scalars]


def _join(pieces: list[dict[str, np.ndarray]], plan: _Plan) -> dict[str, np.ndarray]:
    """One batch of all rows. Scalars lose the axis of the samples; where each sample is a call, so does everything."""
    batch = {}
    for spec in plan.inputs:
        arrays = [piece[spec.name] for piece in pieces]
        if plan.batched and spec.shape != ():
            batch[spec.name] = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        else:
            batch[spec.name] = arrays[0][:1].reshape(arrays[0].shape[1:])
    return batch


# Arrays and files


def _open_arrays(arrays: Mapping[str, np.ndarray], plan: _Plan, where: str) -> Batches:
    _check_names(plan.inputs, arrays, where)
    plan = plan.settled(arrays)
    samples = plan.usable(_check_arrays(plan, arrays, where), where)

    def pieces() -> Iterator[dict[str, np.ndarray]]:
        yield {name: array[:samples] if array.ndim else np.broadcast_to(array, samples) for name, array in arrays.items()}

    return Batches(plan, where, pieces, plan.known(samples, arrays))


def _locate(source: str | os.PathLike[str]) -> Any:
    """Returns the path of what exists, or the function that `module:function` names."""
    text = os.fsdecode(source)
    if os.path.exists(text):
        return Path(text)
    if isinstance(source, str) and _FUNCTION_NAME.fullmatch(source):
        return _import_function(source)
    _fail(f"The calibration data do not exist; give a path, module:function or Python data. Received: {text}.")


def _import_function(text: str) -> Callable[[], Any]:
    module_name, _, attribute = text.partition(":")
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.insert(0, directory)  # for good: the function may import its neighbours when it is called
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script without a main guard may exit
        _fail(f"Cannot import module {module_name!r} from {directory} or sys.path ({_describe(error)}). Received: {text}.", error)
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        _fail(f"Module {module_name!r} has no {attribute!r}; name a function that yields samples. Received: {text}.", error)
    if not callable(found):
        _fail(f"{text} must be a function without arguments that yields samples. Received: {type(found).__name__}.")
    function: Callable[[], Any] = found
    return function


def _open_file(path: Path, plan: _Plan) -> Batches:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _open_npz(path, plan)
    if suffix == ".npy":
        name = _only_input(plan, str(path)).name
        with _file_errors(path):
            array = np.load(path, mmap_mode="r")  # allow_pickle stays False
            if not isinstance(array, np.ndarray):
                raise ValueError("an .npz archive under the name of an .npy")
        return _open_arrays({name: array}, plan, str(path))
    _fail(f"Calibration data must be an .npz, an .npy or a folder of images (jpg, png, bmp). Received: {path}.")


@contextlib.contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and numpy.lib.format raise a dozen kinds between them
        _fail(f"Cannot read {path}: not readable, corrupt or truncated; write it anew. Received: {_describe(error)}.", error)


@dataclasses.dataclass(frozen=True)
class _Member:
    """An array inside an .npz."""

    file: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])


def _open_npz(path: Path, plan: _Plan) -> Batches:
    with _file_errors(path), zipfile.ZipFile(path) as archive:
        files = {info.filename.removesuffix(".npy"): info for info in archive.infolist() if info.filename.endswith(".npy")}
        if list(files) == ["arr_0"] and len(plan.inputs) == 1:  # np.savez(path, x) names it so
            files = {plan.inputs[0].name: files["arr_0"]}
        _check_names(plan.inputs, files, str(path))
        members = {name: _read_member(archive, info, path) for name, info in files.items()}
    plan = plan.settled(members)
    samples = plan.usable(_check_arrays(plan, members, str(path)), str(path))
    return Batches(plan, str(path), lambda: _stream_npz(path, members, plan.size, samples), plan.known(samples, members))


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> _Member:
    with archive.open(info) as stream:
        shape, fortran, dtype = _read_header(stream)
        header_bytes = stream.tell()
    if fortran or dtype.hasobject:
        what = "pickled Python objects" if dtype.hasobject else "Fortran order"
        _fail(f"{info.filename} in {path} must be saved as a plain array in C order. Received: {what}.")
    if info.file_size - header_bytes != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{info.filename} holds {info.file_size} bytes, which its shape {shape} and dtype {dtype} belie")
    return _Member(info.filename, shape, dtype)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"npy format version {version}, of which only 1.0 and 2.0 can be streamed")


def _stream_npz(path: Path, members: Mapping[str, _Member], size: int, samples: int) -> Iterator[dict[str, np.ndarray]]:
    with contextlib.ExitStack() as stack:
        with _file_errors(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            streams = {name: stack.enter_context(archive.open(member.file)) for name, member in members.items()}
            for stream in streams.values():
                _read_header(stream)
            single = {name: _read_rows(streams[name], member, 1) for name, member in members.items() if not member.shape}
        for start in range(0, samples, size):
            rows = min(size, samples - start)
            with _file_errors(path):
                piece = {
                    name: np.broadcast_to(single[name], rows) if name in single else _read_rows(streams[name], member, rows)
                    for name, member in members.items()
                }
            yield piece


def _read_rows(stream: IO[bytes], member: _Member, rows: int) -> np.ndarray:
    data = stream.read(rows * member.row_bytes)
    if len(data) != rows * member.row_bytes:
        raise EOFError(f"{member.file} ends early")
    return np.frombuffer(data, member.dtype).reshape(rows, *member.shape[1:])


# Folders of images


def _open_images(folder: Path, plan: _Plan, preprocess: str) -> Batches:
    spec = _only_input(plan, str(folder))
    size = _image_size(spec, preprocess)
    paths = _find_images(folder)
    is_bytes = spec.dtype == "uint8"
    if is_bytes and preprocess != "none":
        raise ConfigError(
            f"preprocess must be none: input {spec.name!r} takes pixels as they are, uint8. Received: {preprocess!r}."
        )
    head = np.broadcast_to(np.zeros((), np.uint8 if is_bytes else np.float32), (len(paths), *size))  # takes no memory
    plan = plan.settled({spec.name: head})
    found = _check_arrays(plan, {spec.name: head}, str(folder))
    samples = plan.usable(found, str(folder))
    chosen = [paths[index * found // samples] for index in range(samples)]

    def pieces() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, samples, plan.size):
            images = np.stack([_read_image(path, size) for path in chosen[start : start + plan.size]])
            yield {spec.name: np.rint(images) if is_bytes else PREPROCESS[preprocess](images)}

    return Batches(plan, str(folder), pieces, samples)


def _image_size(spec: InputSpec, preprocess: str) -> tuple[int, int, int]:
    match spec.shape:
        case (_, int(height), int(width), 1 | 3 as channels) | (int(height), int(width), 1 | 3 as channels) if (
            height > 0 and width > 0
        ):
            if channels == 1 and PREPROCESS[preprocess].needs_rgb:
                raise ConfigError(f"preprocess {preprocess!r} needs RGB. Received: input {spec.name!r} with 1 channel.")
            return height, width, channels
    _fail(
        f"A folder of images needs a model input of fixed shape (batch, height, width, 1 or 3), or without batch; give an "
        f".npz for input {spec.name!r}. Received: shape {spec.shape}."
    )


def _find_images(folder: Path) -> list[str]:
    paths = [
        os.path.join(directory, name)
        for directory, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
    ]
    if not paths:
        _fail(f"The folder holds no images (jpg, jpeg, png or bmp). Received: {folder}.")
    # By parts of the path, so that what is in one folder stays together whatever its name sorts next to.
    return sorted(paths, key=lambda path: path.split(os.sep))


def _read_image(path: str, size: tuple[int, int, int]) -> np.ndarray:
    """Decodes, resizes and crops one image.

    Args:
        path: Path of the file.
        size: Height, width and channels to give it.

    Returns:
        float32 array of shape `size`, 0..255.

    Raises:
        DataError: The file cannot be read or decoded.
    """
    import tensorflow as tf

    height, width, channels = size
    with _file_errors(Path(path)):
        image = _decode(Path(path).read_bytes(), channels)
        found_height, found_width = image.shape[:2]
        # The common evaluation transform (224 out of 256), and never smaller than the crop.
        short = round(min(height, width) * 256 / 224)
        scale = max(short / min(found_height, found_width), height / found_height, width / found_width)
        scaled = max(height, round(found_height * scale)), max(width, round(found_width * scale))
        image = tf.image.resize(image, scaled, antialias=True).numpy()
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    cropped: np.ndarray = image[top : top + height, left : left + width]
    return cropped


def _decode(contents: bytes, channels: int) -> Any:
    """Decodes to a uint8 tensor of shape (height, width, channels)."""
    import tensorflow as tf

    if not contents.startswith(b"BM"):
        return tf.io.decode_image(contents, channels=channels, expand_animations=False)
    image = tf.io.decode_bmp(contents)  # which, unlike the others, cannot convert channels
    if image.shape[-1] == 1:
        image = tf.image.grayscale_to_rgb(image)
    return tf.image.rgb_to_grayscale(image[..., :3]) if channels == 1 else image[..., :3]


# Python data


def _open_python(source: Any, plan: _Plan, where: str) -> Batches:
    make = source
    if not callable(source):
        try:
            once = iter(source) is source
        except TypeError as error:
            _fail(f"Calibration data must be a path, an array, a dataset, a list or a function. Received: {where}.", error)
        if once:
            _fail(
                f"Calibration data {where} can be iterated only once; pass the function that makes them, not its result. "
                f"Received: {type(source).__name__}."
            )

        def make() -> Any:
            return source

    plan = plan.settled()
    return Batches(plan, where, lambda: _python_pieces(make, plan, where))


def _refuse_labels(source: Any, plan: _Plan) -> None:
    """Raises DataError on arrays (x, y) for a model of one input: they would be taken for two items."""
    if not isinstance(source, list | tuple) or len(source) != 2 or not all(hasattr(item, "__array__") for item in source):
        return
    shape = plan.inputs[0].shape
    if len(plan.inputs) != 1 or not shape:
        return

    def fits(array: np.ndarray, wanted: tuple[int | None, ...]) -> bool:
        return array.ndim == len(wanted) and all(w in (None, got) for w, got in zip(wanted, array.shape, strict=True))

    x, y = (_as_array(item, plan.inputs[0].name, f"item {index}") for index, item in enumerate(source))
    if not fits(x, (None, *shape[1:])) or not y.ndim or len(x) != len(y):
        return  # samples, or batches of several sizes
    other = not fits(y, (None, *shape[1:])) and not fits(y, shape[1:])
    if other or (y.dtype.kind in "iub" and x.dtype.kind == "f"):
        _fail(
            f"Item 1 of the calibration data looks like labels: pass the inputs alone. "
            f"Received: a {type(source).__name__} of arrays of shapes {x.shape} and {y.shape}."
        )


def _python_pieces(make: Callable[[], Any], plan: _Plan, where: str) -> Iterator[dict[str, np.ndarray]]:
    for index, item in enumerate(_items(make, where)):
        place = f"item {index} of {where}"
        piece = {name: _as_array(value, name, place) for name, value in _by_name(item, plan, place).items()}
        for spec in plan.inputs:
            array = piece[spec.name]
            if spec.shape == () and array.ndim:
                _fail(f"Input {spec.name!r} in {place} is a scalar: give one value for the item. Received: {array.shape}.")
            if spec.shape and array.ndim == len(spec.shape) - (1 if plan.batched else 0):
                piece[spec.name] = array[np.newaxis]  # one sample
        rows = _check_arrays(plan, piece, place)
        yield {name: array if array.ndim else np.broadcast_to(array, rows) for name, array in piece.items()}


def _items(make: Callable[[], Any], where: str) -> Iterator[Any]:
    def ask(what: Callable[[], Any]) -> Any:
        try:
            return what()
        except StopIteration:
            return end
        except (Exception, SystemExit, GeneratorExit) as error:  # the user's code may raise anything
            _fail(f"Calibration data {where} failed while iterating; mend that code. Received: {_describe(error)}.", error)

    end = object()
    items = ask(make)
    if inspect.iscoroutine(items):
        items.close()
        _fail(f"Calibration data {where} are made by an async function; give an ordinary one. Received: a coroutine.")
    iterator = ask(lambda: iter(items))
    while (item := ask(lambda: next(iterator))) is not end:
        yield item


def _by_name(item: Any, plan: _Plan, place: str) -> Mapping[str, Any]:
    names = [spec.name for spec in plan.inputs]
    if isinstance(item, Mapping):
        _check_names(plan.inputs, item, place)
        return item
    if not plan.by_position:
        wanted = ", ".join(f"{name!r}: ..." for name in names)
        _fail(
            f"The model does not tell the order of its inputs, so {place} must name them: {{{wanted}}}. "
            f"Received: {type(item).__name__}."
        )
    values = item if isinstance(item, list | tuple) else [item]
    if len(values) != len(names) or any(isinstance(value, Mapping | tuple) for value in values):
        _fail(
            f"{place[0].upper()}{place[1:]} must be one array for each of the model's inputs ({_names(names)}); drop labels, "
            f"of a tf.data.Dataset with `.map(lambda x, y: x)`. "
            f"Received: {type(item).__name__} of {_names(type(value).__name__ for value in values)}."
        )
    return dict(zip(names, values, strict=True))


def _as_array(value: Any, name: str, where: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except Exception as error:  # whatever the value's own __array__ raises
        _fail(f"Input {name!r} in {where} is not an array; give a NumPy array. Received: {_describe(error)}.", error)
