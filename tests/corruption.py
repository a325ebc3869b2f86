"""For tests: good inputs of every kind, one file of them damaged, and what the command line makes of it.

`judge` takes a run apart: what is allowed is an output that is whole and loads, or one line, exit code 2 and nothing left behind.
Commands run in a warm process; where that one dies or hangs, the command is run again as a user would, and that counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when tensorflow is imported

import numpy as np
import tensorflow as tf

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 120.0
PER_WORKER = 100  # commands that a process runs
SIZE = 6  # pixels of the images

# Reads a command per line, and whether the output is to be loaded; writes [code, stdout, stderr, what is wrong with the output].
# What C++ writes to the file descriptors counts too.
WORKER = """
import json, os, sys, tempfile
answers = os.fdopen(os.dup(1), "w")
from tfquant.quiet import quiet_start
quiet_start()
import tensorflow as tf
from absl.testing import flagsaver
from tfquant import calibrate

def run(command):
    held = [tempfile.TemporaryFile() for _ in range(2)]
    saved = [os.dup(1), os.dup(2)]
    for file, number in zip(held, (1, 2)):
        os.dup2(file.fileno(), number)
    try:
        with flagsaver.flagsaver():
            code = calibrate.main(calibrate.parse(["calibrate", *command]))
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        import traceback
        where = traceback.extract_tb(error.__traceback__)[-1]
        code = f"{type(error).__name__} in {os.path.basename(where.filename)}:{where.lineno}: {error}"[:500]
    sys.stdout.flush(), sys.stderr.flush()
    for number, copy in zip((1, 2), saved):
        os.dup2(copy, number)
        os.close(copy)
    texts = []
    for file in held:
        file.seek(0)
        texts.append(file.read().decode(errors="replace"))
        file.close()
    return [code, *texts]

def load(path):
    try:
        tf.saved_model.load(path)
        return ""
    except Exception as error:
        return f"it does not load: {type(error).__name__}: {error}"[:300]

for line in sys.stdin:
    task = json.loads(line)
    if "load" in task:
        answer = load(task["load"])
    else:
        answer = run(task["run"])
    answers.write(json.dumps(answer) + "\\n")
    answers.flush()
"""


# Good inputs


def image(pixels: np.ndarray, suffix: str) -> bytes:
    """An image of uint8 (height, width, 3) as a file."""
    if suffix == "jpg":
        return bytes(tf.io.encode_jpeg(pixels).numpy())
    if suffix == "png":
        return bytes(tf.io.encode_png(pixels).numpy())
    height, width, _ = pixels.shape
    rows = np.zeros((height, -(-width * 3 // 4) * 4), np.uint8)
    rows[:, : width * 3] = pixels[::-1, :, ::-1].reshape(height, -1)
    header = struct.pack("<IHHIIIIHHIIIIII", 54 + rows.size, 0, 0, 54, 40, width, height, 1, 24, 0, rows.size, 2835, 2835, 0, 0)
    return b"BM" + header + rows.tobytes()


def vocabulary_model(folder: Path) -> Path:
    """A SavedModel of two words each, with a table from a vocabulary file in its assets."""
    module = tf.Module()
    vocabulary = folder.with_name("vocabulary.txt")
    vocabulary.write_text("red\ngreen\nblue\nblack\n")
    initializer = tf.lookup.TextFileInitializer(
        str(vocabulary), tf.string, tf.lookup.TextFileIndex.WHOLE_LINE, tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER
    )
    module.table = tf.lookup.StaticVocabularyTable(initializer, num_oov_buckets=1)
    rng = np.random.default_rng(5)
    vectors, weights = (tf.constant(rng.normal(size=size).astype(np.float32)) for size in ((5, 8), (16, 4)))

    @tf.function(input_signature=[tf.TensorSpec((None, 2), tf.string, name="words")])
    def serve(words):
        found = tf.gather(vectors, module.table.lookup(words))
        return {"y": tf.nn.relu(tf.reshape(found, (-1, 16)) @ weights)}

    tf.saved_model.save(module, str(folder), signatures=serve)
    vocabulary.unlink()
    return folder


def _graph(variables: bool) -> tuple[tf.Graph, tf.Tensor, tf.Tensor]:
    rng = np.random.default_rng(1)
    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, (None, SIZE, SIZE, 3), name="image")
        kernel = rng.normal(size=(3, 3, 3, 4)).astype(np.float32)
        weights = v1.get_variable("kernel", initializer=kernel, use_resource=False) if variables else tf.constant(kernel)
        y = tf.identity(tf.nn.relu(tf.nn.conv2d(x, weights, 1, "SAME")), name="end")
    return graph, x, y


def make_inputs(folder: Path) -> None:
    """Tiny models of every kind in `folder`, calibration data of every kind, a plan and a job file."""
    import keras

    keras.utils.set_random_seed(4)
    layers = keras.layers
    x = keras.Input((SIZE, SIZE, 3), name="image")
    y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same", name="first")(x)))
    y = layers.Dense(3, activation="softmax")(layers.Flatten()(layers.MaxPooling2D(2)(y)))
    model = keras.Model(x, y, name="net")
    model.export(folder / "model", verbose=False)
    model.save(folder / "net.keras")
    model.save(folder / "net.h5")
    vocabulary_model(folder / "words")
    graph, x, y = _graph(variables=True)
    with graph.as_default(), tf.compat.v1.Session(graph=graph) as session:
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.saved_model.simple_save(session, str(folder / "old"), {"image": x}, {"y": y})
    (folder / "net.pb").write_bytes(_graph(variables=False)[0].as_graph_def().SerializeToString())
    rng = np.random.default_rng(0)
    images = rng.normal(size=(12, SIZE, SIZE, 3)).astype(np.float32)
    np.savez(folder / "data.npz", image=images)
    np.savez_compressed(folder / "packed.npz", image=images)
    np.save(folder / "data.npy", images)
    np.savez(folder / "words.npz", words=rng.choice(["red", "green", "blue"], (12, 2)))
    (folder / "pictures").mkdir()
    for index, suffix in enumerate(("jpg", "png", "bmp")):
        pixels = rng.integers(0, 256, (9, 8, 3)).astype(np.uint8)
        (folder / "pictures" / f"{index}.{suffix}").write_bytes(image(pixels, suffix))
    (folder / "job.yaml").write_text(
        "# the job of the tests\nsaved_model: model\ndata: data.npz\nformat: saved_model\noverwrite: false\n"
        "quantization:\n  estimator: minmax\n  subset_size: 12\n  batch_size: 4\n  verify: false\n"
        "  ignored_scope: ['re:nothing|net/first.*']\n  verify_batch_sizes: []\n"
    )
    worker = Worker(folder)
    try:
        code, _, err = worker.ask({"run": ["--saved_model=model", "--data=data.npz", "--noverify", "--output=plan"]}) or (
            -1,
            "",
            "",
        )
    finally:
        worker.close()
    assert code == 0, err
    for name in ("saved_model.pb", "fingerprint.pb"):
        (folder / "plan" / name).unlink()
    for name in ("assets", "variables"):
        shutil.rmtree(folder / "plan" / name)
    shutil.rmtree(folder / "tmp")


_DATA = "--data=data.npz"
# What is damaged (one of these files), and the command that reads it.
TARGETS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "model/saved_model.pb",
            "model/variables/variables.index",
            "model/variables/variables.data-00000-of-00001",
            "model/fingerprint.pb",
        ),
        ("--saved_model=model", _DATA),
    ),
    (("model/saved_model.pb", "model/variables/variables.data-00000-of-00001"), ("--saved_model=model", "--plan=plan")),
    (
        ("old/saved_model.pb", "old/variables/variables.index", "old/variables/variables.data-00000-of-00001"),
        ("--saved_model=old", _DATA),
    ),
    (("net.keras",), ("--saved_model=net.keras", _DATA)),
    (("net.h5",), ("--saved_model=net.h5", _DATA)),
    (("net.pb",), ("--saved_model=net.pb", _DATA)),
    (("net.pb",), ("--saved_model=net.pb", "--outputs=end", _DATA, "--format=graphdef")),
    (("plan/quant_plan.json", "plan/quant_plan.npz"), ("--saved_model=model", "--plan=plan/quant_plan.json")),
    (("data.npz",), ("--saved_model=model", _DATA)),
    (("packed.npz",), ("--saved_model=model", "--data=packed.npz")),
    (("data.npy",), ("--saved_model=model", "--data=data.npy")),
    (("pictures/0.jpg", "pictures/1.png", "pictures/2.bmp"), ("--saved_model=model", "--data=pictures", "--preprocess=tf")),
    (("job.yaml",), ("--config=job.yaml",)),
    (("words/assets/vocabulary.txt", "words/saved_model.pb"), ("--saved_model=words", "--data=words.npz")),
    (("words.npz",), ("--saved_model=words", "--data=words.npz")),
)


# Damage


def _flip(content: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    for _ in range(rng.randint(1, 20)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _cut(content: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    del content[rng.randrange(len(content)) :]


def _block(content: bytearray, rng: random.Random) -> slice:
    start = rng.randrange(len(content))
    return slice(start, min(len(content), start + rng.randint(1, max(1, len(content) // rng.choice([2, 10, 50])))))


def _zero(content: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    block = _block(content, rng)
    content[block] = bytes(block.stop - block.start)


def _duplicate(content: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    block = _block(content, rng)
    content[block.stop : block.stop] = content[block]


def _remove(content: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    del content[_block(content, rng)]


def _empty(content: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    content.clear()


def _noise(content: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    content[:] = rng.randbytes(len(content))


def _splice(content: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    other = rng.choice(others)
    del content[rng.randrange(len(content)) :]
    content += other[rng.randrange(len(other)) :]


DAMAGE: dict[str, Callable[[bytearray, random.Random, Sequence[bytes]], None]] = {
    "bits flipped": _flip,
    "cut": _cut,
    "a block of zeros": _zero,
    "a block twice": _duplicate,
    "a block missing": _remove,
    "empty": _empty,
    "noise": _noise,
    "spliced": _splice,
}
_WEIGHTS = (8, 4, 4, 3, 3, 1, 1, 3)


_OTHERS = ("net.keras", "net.h5", "net.pb", "data.npz", "model/saved_model.pb", "job.yaml")


def _damaged(content: bytes, damage: str, rng: random.Random, others: Sequence[bytes]) -> bytes:
    changed = bytearray(content)
    if changed:
        DAMAGE[damage](changed, rng, others)
    return bytes(changed)


def _within(content: bytes, damage: str, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """A zip with one damaged member, whose checksum is right all the same."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(changed, "w") as copy:
        chosen = rng.choice(archive.namelist())
        for name in archive.namelist():
            member = archive.read(name)
            copy.writestr(zipfile.ZipInfo(name), _damaged(member, damage, rng, others) if name == chosen else member)
    return changed.getvalue()


@dataclasses.dataclass(frozen=True)
class Case:
    """One file to damage, how, and the command that is run then."""

    seed: int
    file: str
    damage: str
    content: bytes
    command: tuple[str, ...]


def make_case(inputs: Path, seed: int) -> Case:
    """The case of a seed; always the same for the same inputs."""
    rng = random.Random(seed)
    files, command = rng.choice(TARGETS)
    file = rng.choice(files)
    damage = rng.choices(list(DAMAGE), _WEIGHTS)[0]
    content = (inputs / file).read_bytes()
    others = [(inputs / name).read_bytes() for name in _OTHERS]
    if Path(file).suffix in (".keras", ".npz") and rng.random() < 0.5:
        damage, content = f"{damage} inside", _within(content, damage, rng, others)
    else:
        content = _damaged(content, damage, rng, others)
    verify = () if command[0].startswith("--config") else ("--noverify",)
    return Case(seed, file, damage, content, (*command, *verify, "--output=out/int8"))


# Runs


def environment(folder: Path) -> dict[str, str]:
    (folder / "tmp").mkdir(exist_ok=True)
    path = os.pathsep.join([str(ROOT), str(folder)])
    return {**os.environ, "PYTHONPATH": path, "TMPDIR": str(folder / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}


class Worker:
    """A process with TensorFlow, that works in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment(folder),
        )
        self._received = b""

    def ask(self, task: dict[str, object]) -> object | None:
        """The answer, None when the process died or did not answer in time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return None
        while b"\n" not in self._received:
            ready, _, _ = select.select([self._process.stdout], [], [], TIMEOUT)
            piece = os.read(self._process.stdout.fileno(), 1 << 20) if ready else b""
            if not piece:
                return None
            self._received += piece
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a case.

    Attributes:
        kind: "refused", "accepted", "crashed" (TensorFlow did, and it was reported as it should be) or "wrong".
        line: what was printed, or what is wrong.
    """

    case: Case
    kind: str
    line: str


def corrupt(inputs: Path, seeds: Sequence[int]) -> Iterator[Verdict]:
    """Judges each seed, in a copy of `inputs` that is whole but for one file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(inputs, folder, dirs_exist_ok=True)
        worker, count = Worker(folder), 0
        try:
            for seed in seeds:
                if count == PER_WORKER:
                    worker.close()
                    worker, count = Worker(folder), 0
                count += 1
                case = make_case(inputs, seed)
                (folder / case.file).write_bytes(case.content)
                before = _listing(folder)
                answer = worker.ask({"run": case.command})
                if answer is None or answer[0] not in (0, 2) or _wrong_line(answer):
                    # Died, hung, or is about to be called wrong: what a user sees counts.
                    died = answer is None
                    worker.close()
                    _clear(folder, before)
                    answer = _real(case, folder)
                    worker, count = Worker(folder), 0
                    yield _verdict(case, folder, before, answer, worker, died)
                else:
                    yield _verdict(case, folder, before, answer, worker, False)
                _clear(folder, before)
                shutil.copyfile(inputs / case.file, folder / case.file)
        finally:
            worker.close()


def _real(case: Case, folder: Path) -> tuple[object, str, str]:
    command = [sys.executable, "-m", "tfquant.calibrate", *case.command]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, env=environment(folder), start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"no end after {TIMEOUT:.0f} s", "", ""
    return process.returncode, out.decode(errors="replace"), err.decode(errors="replace")


def _wrong_line(answer: Sequence[object]) -> str:
    """What is wrong with (code, stdout, stderr), or nothing."""
    code, out, err = answer
    lines = [line for line in str(err).splitlines() if line.strip()]
    if code == 0:
        return f"exit code 0, but stderr says: {lines[-1][:300]}" if "Traceback" in str(err) else ""
    if isinstance(code, str):
        return code
    if code != 2:
        return f"exit code {code}: {lines[-1][:500] if lines else 'no word'}"
    if out:
        return f"refused, but stdout says: {str(out)[:200]}"
    if len(lines) != 1 or not lines[0].startswith("tfquant.calibrate: "):
        return f"{len(lines)} lines: {' // '.join(lines)[:600]}"
    return ""


def _verdict(case: Case, folder: Path, before: set[str], answer: Sequence[object], worker: Worker, died: bool) -> Verdict:
    wrong = _wrong_line(answer)
    left = sorted(_listing(folder) - before)
    if wrong:
        return Verdict(case, "wrong", wrong)
    if answer[0] == 0:
        wrong = _wrong_output(folder, left, worker, "--format=graphdef" in case.command)
        return Verdict(case, "wrong" if wrong else "accepted", wrong)
    if left:
        return Verdict(case, "wrong", f"left behind: {', '.join(left[:5])}")
    line = str(answer[2]).strip().removeprefix("tfquant.calibrate: ")
    return Verdict(case, "crashed" if died or "TensorFlow crashed" in line or "Killed (" in line else "refused", line)


def _wrong_output(folder: Path, left: Sequence[str], worker: Worker, is_graph_def: bool) -> str:
    expected = {"frozen_graph.pb"} if is_graph_def else {"saved_model.pb", "variables"}
    found = {path.name for path in (folder / "out" / "int8").iterdir()} if (folder / "out" / "int8").is_dir() else set()
    lost = (expected | {"quant_plan.json", "quant_plan.npz"}) - found
    if lost:
        return f"the output lacks {', '.join(sorted(lost))}"
    strays = [name for name in left if name != "out" and not name.startswith("out/int8")]
    if strays:
        return f"left behind: {', '.join(strays[:5])}"
    if is_graph_def:
        return "" if (folder / "out" / "int8" / "frozen_graph.pb").stat().st_size else "the graph is empty"
    answer = worker.ask({"load": "out/int8"})
    return "loading the output ends the process" if answer is None else str(answer)


def _listing(folder: Path) -> set[str]:
    """All paths but what a process removes when it ends."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in names if not name.startswith("tmp/__autograph_generated_file")}


def _clear(folder: Path, before: set[str]) -> None:
    for name in sorted(_listing(folder) - before, reverse=True):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
