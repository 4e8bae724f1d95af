"""Damaged inputs for every reader of untrusted bytes. As a program: `fuzzing.py COUNT [READER ...]` prints figures.

A reader may accept an input or refuse it with one line; anything else that it raises, memory over a limit, a file
written outside its folder or a program started ends the program with the input that did it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image
from training_tools import tiny_config, tiny_network

from fp8repro.data.augmentation import plain_geometry, train_geometry
from fp8repro.data.pixels import read_image
from fp8repro.data.translation.datasets import load_translation
from fp8repro.data.translation.fairseq_binary import write_binary
from fp8repro.data.translation.text import Subwords
from fp8repro.data.translation.vocabulary import Vocabulary
from fp8repro.errors import RunFailure, UserError

MEMORY_LIMIT = 200 * 10**6
LONGEST_MESSAGE = 2000
# What readers trip over: numbers at the ends of their types, text that is none, numbers and lines without end.
NASTY = [
    *(n.to_bytes(size, "little", signed=n < 0) for n in (0, -1, 2**31 - 1, -(2**31)) for size in (4, 8)),
    *(n.to_bytes(8, "little", signed=True) for n in (2**62, 2**63 - 1, -(2**63))),
    *(b"", b"\n", b"\r\n\n", b"\0" * 9, b"\xff\xfe", b"\xc3\x28", b"\xf0\x9f\x98\x80", b"\xe2\x80\xa8", b"\t", b" "),
    *(b"9" * 5000, b"-1", b"NaN", b"1e999", b"null", b"{" * 3000, b"[" * 3000, b'"', b"&a [*a]", b"${x}", b"../../x"),
]


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """A file with some of it cut off, overwritten, left out or put in twice; or something else altogether."""
    position = st.integers(0, max(0, len(whole) - 1))
    inserted = st.sampled_from(NASTY) | st.binary(max_size=20)

    def edit(data: bytes, change: tuple[str, int, int, bytes]) -> bytes:
        kind, at, length, new = change
        at = min(at, len(data))
        if kind == "cut":
            return data[:at]
        if kind == "flip":
            return data[:at] + bytes([data[at] ^ (1 << length % 8)]) + data[at + 1 :] if at < len(data) else data
        if kind == "repeat":
            return data[: at + length] + data[at:]
        kept = at + {"insert": 0, "overwrite": len(new), "drop": length}[kind]
        return data[:at] + (b"" if kind == "drop" else new) + data[kept:]

    kinds = st.sampled_from(["cut", "flip", "repeat", "insert", "overwrite", "drop"])
    changes = st.lists(st.tuples(kinds, position, st.integers(0, 64), inserted), min_size=1, max_size=5)

    def apply(changes: list[tuple[str, int, int, bytes]]) -> bytes:
        data = whole
        for change in changes:
            data = edit(data, change)
        return data

    return changes.map(apply) | st.binary(max_size=200) | st.sampled_from(NASTY)


Inputs = st.SearchStrategy[Any]
# Inputs, what reads one of them, and one that is whole.
Reader = tuple[Inputs, Callable[[Any], object], Any]


def binary_reader(folder: Path, layout: str = "mmap") -> Reader:
    """A folder of fairseq-preprocess, one of its files damaged."""
    words = Vocabulary([f"w{i}" for i in range(20)], list(range(20, 0, -1)))
    for language in ("en", "de"):
        words.save(folder / f"dict.{language}.txt")
        for split in ("train", "valid", "test"):
            stem = folder / f"{split}.en-de.{language}"
            write_binary(stem, [np.array([4, 7, 2]), np.array([5, 6, 9, 2]), np.array([2])], len(words))
            if layout == "legacy":
                _write_legacy(stem, [[4, 7, 2], [5, 6, 9, 2], [2]])
    (folder / "report.json").write_text('{"empty": 0}\n')
    (folder / "valid.de").write_text("a b\nc\n\n")
    names = sorted(path.name for path in folder.iterdir())
    return _damaged_folder(folder, names), lambda _: load_translation("fairseq_binary", str(folder)), None


def _write_legacy(stem: Path, sequences: list[list[int]]) -> None:
    sizes = [len(sequence) for sequence in sequences]
    offsets = np.cumsum([0, *sizes])
    header = np.array([1, 4, 4, len(sizes), len(sizes)], "<u8").tobytes()
    dimensions = np.arange(len(sizes) + 1, dtype="<i8").tobytes()
    body = dimensions + offsets.astype("<i8").tobytes() + np.array(sizes, "<i8").tobytes()
    Path(f"{stem}.idx").write_bytes(b"TNTIDX\0\0" + header + body)
    Path(f"{stem}.bin").write_bytes((np.concatenate(sequences) + 1).astype("<i4").tobytes())


def _damaged_folder(folder: Path, names: list[str]) -> Inputs:
    """Writes one damaged file a time, the others whole."""
    whole = {name: (folder / name).read_bytes() for name in names}

    def store(change: tuple[str, bytes]) -> str:
        for name, content in whole.items():
            (folder / name).write_bytes(content)
        (folder / change[0]).write_bytes(change[1])
        return change[0]

    return st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), damaged(whole[name]))).map(store)


def dictionary_reader(folder: Path) -> Reader:
    """A `dict.*.txt`."""
    path, whole = folder / "dict.en.txt", b"the 99\nof 50 #fairseq:overwrite\n\xc3\xa9t\xc3\xa9 3\nmadeupword0000 0\n"
    return damaged(whole), lambda data: Vocabulary.load(_stored(path, data)).encode(["the", "x"]), whole


def codes_reader(folder: Path) -> Reader:
    """A codes file of subword-nmt."""
    path, whole = folder / "codes", b"#version: 0.2\nt h\nth e</w>\n\xc3\xa9 t\no f</w>\n"
    line = "the theof of \u00e9t\u00e9 \U0001f600"
    return damaged(whole), lambda data: Subwords(_stored(path, data)).segment(line), whole


def text_reader(folder: Path) -> Reader:
    """Parallel text, prepared into a data set."""
    for split in ("train", "valid", "test"):
        (folder / f"{split}.en").write_text("the house is red .\na dog &amp; a cat\n\u201cyes\u201d\n" * 3)
        (folder / f"{split}.de").write_text("das Haus ist rot .\nein Hund &amp; eine Katze\n\u201eja\u201c\n" * 3)
    names = sorted(path.name for path in folder.iterdir())
    return (
        _damaged_folder(folder, names),
        lambda _: load_translation("parallel_text", str(folder), {"bpe_merges": 5, "max_length": 20}),
        None,
    )


def checkpoint_reader(folder: Path) -> Reader:
    """A checkpoint without its checksum, taken up by a run."""
    from fp8repro.training.checkpoint import read_checkpoint

    run = _tiny_run(folder)
    path = folder / "step-000000003.pt"
    torch.save(run.state(), path)
    whole = path.read_bytes()
    return damaged(whole), lambda data: run.load(read_checkpoint(_stored(path, data))), whole


def contents_reader(folder: Path) -> Reader:
    """A checkpoint that torch can read, and that holds something unexpected somewhere."""
    from fp8repro.settings.schema import run_config
    from fp8repro.training.checkpoint import read_checkpoint
    from fp8repro.training.run import summary

    run = _tiny_run(folder)
    path = folder / "step-000000003.pt"
    whole = run.state()

    def read(content: Any) -> None:
        torch.save(content, path)
        state = read_checkpoint(path)
        with contextlib.suppress(UserError):
            run_config(state["config"])
        run.load(state)
        # What was taken up can be trained on.
        run.scaler.update(False)
        next(iter(run.task.batches))
        for parameter in run.model.parameters():
            parameter.grad = torch.ones_like(parameter, dtype=torch.float32)
        run.masters.step(1.0, None)
        json.dumps(summary(run, "finished"))

    return changed(whole), read, whole


def weights_reader(folder: Path) -> Reader:
    """A state dict with torchvision's names, evaluated."""
    from fp8repro.training.evaluate import evaluate

    path, config = folder / "weights.pth", tiny_config(folder / "run")
    model = tiny_network("resnet18", 10, 1, 8)
    torch.save(model.state_dict(), path)
    whole, content = path.read_bytes(), dict(model.state_dict())

    def read(data: Any) -> None:
        if isinstance(data, bytes):
            _stored(path, data)
        else:
            torch.save(data, path)
        evaluate(path, config)

    return damaged(whole) | changed(content) | changed({"format": 1, "model": content}), read, whole


def image_reader(folder: Path) -> Reader:
    """Images of all kinds, and images that claim to be enormous."""
    sources = []
    for name, mode in (("JPEG", "RGB"), ("PNG", "P"), ("PPM", "RGB"), ("BMP", "RGB"), ("TIFF", "RGB"), ("WEBP", "RGB")):
        for compressed in ({}, {"compression": "tiff_lzw"}) if name == "TIFF" else ({},):
            buffer = io.BytesIO()
            Image.effect_noise((20, 16), 50).convert(mode).save(buffer, name, **compressed)
            sources.append(buffer.getvalue())
    # The first is the largest that may be; the others are refused.
    buffer = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(buffer, "PNG")
    bombs = [buffer.getvalue(), *(_png(side, side) for side in (5_000, 12_000, 30_000, 2**31 - 1))]
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n%%EOF\n"
    transforms = [train_geometry("auto", True, 16), plain_geometry(64)]
    path = folder / "image.jpg"

    def read(data: bytes) -> None:
        image = read_image(str(_stored(path, data)))
        for transform in transforms:
            transform(image)

    return st.one_of(*map(damaged, sources), st.sampled_from([*bombs, postscript])), read, sources[0]


def _png(width: int, height: int) -> bytes:
    """A one-bit PNG that claims a size; as far as it has pixels, they are black and cost next to nothing."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = min(height, 20_000)
    packer = zlib.compressobj(9)
    row = bytes(1 + (min(width, 100_000) + 7) // 8)
    pixels = b"".join([*(packer.compress(row) for _ in range(rows)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def record_reader(folder: Path) -> Reader:
    """A run's records: compared and explained."""
    import yaml

    from fp8repro.cli.explain import explain
    from fp8repro.results.comparison import FORMATS, comparison, render
    from fp8repro.results.records import read_metrics, read_records

    config = tiny_config(folder / "run", "fp8")
    summary = {"status": "finished", "model": "resnet18", "data": "digits", "precision": "fp8", "seed": 0, "steps": 9}
    summary |= {"loss_scaling": "constant", "profile": "embedded", "top1": 50.0, "skipped_steps": 2}
    rows = [
        {"kind": "train", "step": 9, "loss": 1.5, "loss_scale": 8.0, "skipped_steps": 2, "grad_norm": None, "lr": 0.1},
        {"kind": "event", "step": 3, "what": "skipped", "text": "a gradient was not finite"},
        {"kind": "diagnosis", "step": 9, "first": {"layer": "fc", "role": "error"}, "rows": []},
        {"kind": "telemetry", "step": 9, "rows": [{"layer": "fc", "role": "error", "nonzero": 9, "underflow": 1}]},
    ]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read(_: str) -> None:
        records, _problems = read_records([folder])
        table = comparison(records)
        for form in FORMATS:
            render(table, form)
        read_metrics(folder, "train")
        lines, _sound = explain(folder)
        assert all(line.isprintable() for line in lines)

    return _damaged_folder(folder, ["config.yaml", "metrics.jsonl", "summary.json"]), read, None


def page_reader(folder: Path) -> Reader:
    """Records of a plan's runs, one of their files damaged: everything on the page that is made from them."""
    import study_records as plan
    from sacrebleu.metrics import BLEU

    from fp8repro.paper.examples import correct_json
    from fp8repro.paper.run_folder import CORRECT, HYPOTHESES, REFERENCES
    from fp8repro.results.cells import Cells, read_cells
    from fp8repro.results.figures import figures
    from fp8repro.results.plots import svg
    from fp8repro.results.report import run_sheet
    from fp8repro.results.sheet import FORMATS
    from fp8repro.results.studies import sheets
    from fp8repro.results.verdicts import statement_sheet, verdicts

    plan.STEPS, plan.EPOCHS = 20, 1
    lines = ["the old clock is green .", "his sister offers three tables to my friend ."] * 5
    translated = [lines[0], *lines[:-1]]
    correct = np.arange(200) % 10 > 0
    names = ("resnet18_fp32", "resnet18_fp8", "gnmt_fp32", "gnmt_fp8")
    bleu = BLEU().corpus_score(translated, [lines]).score
    for name in names:
        summary = {"bleu": bleu} if "gnmt" in name else {}
        run = plan.write_run(folder, name, skips=(7,) if name == "gnmt_fp8" else (), score=90.0, **summary)
        if "gnmt" in name:
            (run / HYPOTHESES).write_text("".join(f"{line}\n" for line in translated))
            (run / REFERENCES).write_text("".join(f"{line}\n" for line in lines))
        else:
            (run / CORRECT).write_text(correct_json(correct, "order"))
    begun = plan.write_run(folder, "resnet50_reference", profile="midscale")
    (begun / "summary.json").unlink()

    def read(_: object) -> None:
        cells, _records, problems = read_cells([folder])
        text = "".join(problems)
        for profile in ("embedded", "midscale"):
            found = sheets(cells.get(profile, Cells()), profile)
            rows = [
                statement_sheet(verdicts(cells.get(profile, Cells()), profile)),
                run_sheet(cells.get(profile, Cells())),
            ]
            text += "".join(sheet.render(form) for sheet in (*found, *rows) for form in FORMATS)
            for figure in figures(cells.get(profile, Cells()), profile):
                figure.csv()
                # What is drawn comes from curves alone; a whole page takes seconds.
                if figure.name in ("loss_scale", "lost"):
                    svg(figure)
            # A damaged record of examples never counts for another number of them.
            for sheet in found:
                for row in sheet.rows if sheet.name == "weights" else ():
                    assert row.get("examples") in (None, len(correct), len(lines)), row
        # Refused is what leaves something out; of the run that is not finished, there is always a line.
        if len(problems) > 1 or "Left out" in text:
            raise UserError(problems[0] if problems else "left out, with a note")

    paths = [path for name in names for path in (folder / "embedded" / f"{name}-seed0").iterdir()] + list(
        begun.iterdir()
    )
    return _damaged_folder(folder, sorted(str(path.relative_to(folder)) for path in paths)), read, None


READERS: dict[str, Callable[[Path], Reader]] = {
    "fairseq .idx/.bin": binary_reader,
    "fairseq .idx/.bin, legacy": lambda folder: binary_reader(folder, "legacy"),
    "dictionary": dictionary_reader,
    "BPE codes": codes_reader,
    "parallel text": text_reader,
    "checkpoint": checkpoint_reader,
    "checkpoint contents": contents_reader,
    "weights (.pth)": weights_reader,
    "image": image_reader,
    "run records": record_reader,
    "the page's records": page_reader,
}


def _stored(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _tiny_run(folder: Path) -> Any:
    from fp8repro.settings.schema import LossScalingConfig
    from fp8repro.training.distributed import World
    from fp8repro.training.run import build

    torch.manual_seed(0)
    config = tiny_config(folder / "run", "fp8", LossScalingConfig("dynamic"), batch_size=32)
    run = build(config, World())
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter, dtype=torch.float32)
    run.masters.step(1.0, None)
    return run


def changed(whole: Any) -> Inputs:
    """Plain values and tensors with one of them, anywhere, replaced or left out."""
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just([]) | st.just({})
    tensors = st.sampled_from([torch.zeros(0), torch.zeros(3, 3), torch.zeros(1).expand(10**9), torch.tensor([2**40])])
    new = plain | st.dictionaries(st.text(max_size=5), plain, max_size=3) | tensors | st.just(...)

    def replaced(value: Any, path: list[Any], leaf: Any) -> Any:
        if not path:
            return leaf
        step, *rest = path
        if isinstance(value, dict):
            inner = replaced(value[step], rest, leaf)
            return {k: inner if k == step else v for k, v in value.items() if k != step or inner is not ...}
        inner = replaced(value[step], rest, leaf)
        return [inner if i == step else v for i, v in enumerate(value) if i != step or inner is not ...]

    places = list(_places(whole))
    changes = st.lists(st.tuples(st.sampled_from(places), new), min_size=1, max_size=2)

    def apply(changes: list[tuple[list[Any], Any]]) -> Any:
        result = whole
        for path, leaf in changes:
            with contextlib.suppress(KeyError, IndexError, TypeError):
                result = replaced(result, path, leaf)
        return None if result is ... else result

    return changes.map(apply)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[list[Any]]:
    yield list(path)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


class Watch:
    """While entered, opening a file to write outside of a folder, or starting a program, is an error."""

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)
        self.on = False
        sys.addaudithook(self._look)

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork"):
            raise AssertionError(f"a program was started: {event} {arguments}")
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "shutil.rmtree")
        if event == "open" and isinstance(arguments[0], str):
            writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        path = os.fsdecode(arguments[0]) if writes and isinstance(arguments[0], (str, bytes, os.PathLike)) else None
        if path and not os.path.isabs(path) and event != "open" and arguments[-1] != -1:
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), path)
        if path and path != os.devnull and not os.path.realpath(path).startswith(self.folder):
            raise AssertionError(f"written outside its folder: {event} {path}")

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *_: object) -> None:
        self.on = False


def peak_memory() -> int:
    """Largest resident memory since `forget_peak`, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def forget_peak() -> int:
    """Begin to measure; gives the memory at present."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def fuzz(name: str, count: int, folder: Path, watch: Watch) -> dict[str, Any]:
    """Feed a reader; raises what it raises beyond a refusal in one line."""
    inputs, read, whole = READERS[name](folder)
    # Nothing is wrong with it, and what is loaded or compiled at first use is no finding.
    read(whole)
    figures = {"reader": name, "inputs": 0, "accepted": 0, "refused": 0, "largest_growth_mb": 0.0}

    @settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def feed(data: Any) -> None:
        figures["inputs"] += 1
        before = forget_peak()
        try:
            with watch, contextlib.redirect_stderr(io.StringIO()):
                read(data)
            figures["accepted"] += 1
        except (UserError, RunFailure) as error:
            # As the command line prints it.
            message = " ".join(str(error).split())
            assert message, "no message"
            assert len(message) < LONGEST_MESSAGE, "a message without end"
            assert "AssertionError" not in message, message
            figures["refused"] += 1
        growth = peak_memory() - before
        figures["largest_growth_mb"] = max(figures["largest_growth_mb"], round(growth / 1e6, 1))
        assert growth < MEMORY_LIMIT, f"{growth / 1e6:.0f} MB"

    begin = time.monotonic()
    feed()
    return figures | {"seconds": round(time.monotonic() - begin, 1)}


def main(arguments: list[str]) -> None:
    import fp8repro.training.tasks.classification

    count, *names = arguments
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    fp8repro.training.tasks.classification.make_resnet = tiny_network
    with tempfile.TemporaryDirectory() as root:
        os.environ["FP8REPRO_CACHE"] = str(Path(root) / "cache")
        watch = Watch(Path(root))
        # numpy and torch place their own files while they are warmed up.
        for number, name in enumerate(names or READERS):
            folder = Path(root) / str(number)
            folder.mkdir()
            print(json.dumps(fuzz(name, int(count), folder, watch)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
