"""Every cell of the paper's plan, full-size models and all, on small stand-ins of ImageNet and WMT16."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from fp8repro.data.translation.synthetic import synthetic_corpus
from fp8repro.paper.plan import make_plan, plan_file, study_cells
from fp8repro.reproduce import needs
from fp8repro.settings.schema import run_config
from fp8repro.training.loop import train

CELLS = sorted({name for study in plan_file()["studies"] for name in study_cells(study, "paper")})
SETTINGS = {
    "image": ["data.image_size=80", "data.workers=0", "trainer.batch_size=8", "trainer.eval_train=false"],
    "translation": [
        "data.workers=0",
        "trainer.batch_size=300",
        "trainer.eval_batch_size=2000",
        "decode.max_length_a=0",
    ],
}


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """1,000 classes named as ImageNet's, one tiny JPEG each in train/ and val/."""
    root = tmp_path_factory.mktemp("imagenet")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(1000):
            folder = root / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            pixels = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{folder.name}_0.JPEG")
    return str(root)


@pytest.fixture(scope="module")
def wmt16(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The files that scripts/prepare_wmt16.py leaves, with generated sentences."""
    root = tmp_path_factory.mktemp("wmt16")
    corpus = synthetic_corpus(1, 400, 8, 8, 18)
    for split, pairs in corpus.items():
        for side, language in enumerate(("en", "de")):
            (root / f"{split}.{language}").write_text("".join(f"{pair[side]}\n" for pair in pairs), encoding="utf-8")
    return str(root)


@pytest.mark.long
@pytest.mark.parametrize("name", CELLS)
def test_every_cell_of_the_paper_trains_two_steps(
    name: str, imagenet: str, wmt16: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path(wmt16) / "cache"))
    # A batch of 8 starts with gradients of 23 at ResNet-50's first convolution, which a loss scale of 10,000 lifts over
    # FP16's range in every step (6.7 at a batch of 32 and full size; the larger, the smaller). Blocks that start as the
    # identity keep them in range.
    get_model = torchvision.models.get_model
    monkeypatch.setattr(
        torchvision.models,
        "get_model",
        lambda name, **options: get_model(name, **{**options, "zero_init_residual": True}),
    )
    roots: dict[str, str | None] = {"image": imagenet, "translation": wmt16}
    task = "translation" if name.startswith(("gnmt", "transformer")) else "image"
    settings = ["profile=paper", "trainer.max_steps=2", "logger=none", "device=cpu", "trainer.telemetry_every=1"]
    _, (cell,) = make_plan([*settings, *SETTINGS[task]], [name], roots)
    assert needs.missing("paper", [cell], roots) == []
    config = replace(run_config(cell.config), run_dir=str(tmp_path / "run"))
    assert config.profile == "paper"
    summary = train(config)
    assert (summary["status"], summary["steps"], summary["experiment"]) == ("finished", 2, name)
    # Full size: torchvision's parameter counts; the translation models without their vocabulary's share.
    known = {"resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032}
    if task == "image":
        assert summary["parameters"] == known[cell.model]
    else:
        assert summary["parameters"] > {"gnmt": 120e6, "transformer": 44e6}[cell.model]
