"""Our Transformer, data and loss against fairseq's own, and its model under our recipe; needs the extra [fairseq]."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.version import VersionBase
from packaging.version import Version
from torch import Tensor, nn

from fp8repro.data.translation.datasets import SPLITS, load_translation
from fp8repro.data.translation.synthetic import synthetic_corpus
from fp8repro.engines import products
from fp8repro.errors import UserError
from fp8repro.models import fairseq_model
from fp8repro.models.fairseq_model import FairseqTransformer, fairseq_transformer
from fp8repro.models.transformer import Transformer, export_fairseq_state, load_fairseq_checkpoint, transformer
from fp8repro.precision.injection import inject
from fp8repro.settings.recipes import load_recipe
from fp8repro.settings.schema import DecodeConfig
from fp8repro.training.tasks.decode import beam_search
from fp8repro.training.tasks.translation import smoothed_loss

VOCABULARY = 40
SIZE: dict[str, Any] = {"width": 16, "ffn_width": 24, "heads": 4, "encoder_layers": 2, "decoder_layers": 3}
SOURCE = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 2, 1, 1], [2, 1, 1, 1, 1]])
TARGET = torch.tensor([[6, 5, 4, 2], [9, 2, 1, 1], [10, 11, 4, 2]])
DECODER_INPUT = torch.tensor([[2, 6, 5, 4], [2, 9, 1, 1], [2, 10, 11, 4]])
PRESENT = TARGET.ne(1)


@pytest.fixture(autouse=True, scope="module")
def fairseq() -> None:
    pytest.importorskip("fairseq", reason="needs fairseq: pip install 'fp8repro[fairseq]'")


def pair(seed: int = 0) -> tuple[FairseqTransformer, Transformer]:
    """fairseq's model and ours with one set of random weights."""
    torch.manual_seed(seed)
    theirs, ours = (make(VOCABULARY, dropout=0.0, **SIZE) for make in (fairseq_transformer, transformer))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs.model.encoder.embed_tokens.weight.data[1] = 0
    state = theirs.model.state_dict()
    ours.load_state_dict({name: value for name, value in state.items() if not name.endswith(".version")})
    return theirs, ours


def named_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("form", ["ours", "fairseq's fused attention", "padded on the left"])
def test_logits_and_gradients_equal_fairseqs(form: str) -> None:
    theirs, ours = pair()
    source, lengths = SOURCE, SOURCE.ne(1).sum(1)
    if form == "padded on the left":
        source = torch.tensor([[5, 6, 7, 8, 2], [1, 1, 9, 4, 2], [1, 1, 1, 1, 2]])
    if form == "fairseq's fused attention":
        for module in theirs.modules():
            if hasattr(module, "skip_embed_dim_check"):
                module.skip_embed_dim_check = False
    expected = theirs.model(source, lengths, DECODER_INPUT)[0]
    given = ours(SOURCE, DECODER_INPUT)
    torch.testing.assert_close(given[PRESENT], expected[PRESENT], rtol=1e-4, atol=1e-5)
    if form == "ours":
        torch.testing.assert_close(theirs(SOURCE, DECODER_INPUT)[PRESENT], expected[PRESENT])
    smoothed_loss(expected, TARGET, 0.1)[0].backward()
    smoothed_loss(given, TARGET, 0.1)[0].backward()
    theirs_gradients, ours_gradients = named_gradients(theirs.model), named_gradients(ours)
    assert theirs_gradients.keys() == ours_gradients.keys()
    assert all(gradient.any() for name, gradient in theirs_gradients.items() if "k_proj.bias" not in name)
    for name, gradient in theirs_gradients.items():
        torch.testing.assert_close(ours_gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)


def test_more_padding_changes_neither_fairseqs_logits_nor_its_gradients() -> None:
    model, _ = pair()
    found = []
    for source_width, target_width in ((5, 4), (16, 8), (8, 24)):
        model.zero_grad()
        padded = [
            nn.functional.pad(ids, (0, width - ids.shape[1]), value=1)
            for ids, width in ((SOURCE, source_width), (DECODER_INPUT, target_width), (TARGET, target_width))
        ]
        logits = model(*padded[:2])
        smoothed_loss(logits, padded[2], 0.1)[0].backward()
        found.append((logits[:, :4][PRESENT].detach(), {n: g.clone() for n, g in named_gradients(model).items()}))
    (expected, gradients), *others = found
    for logits, theirs in others:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs, gradients, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_incremental_logits_equal_fairseqs_whole_and_incremental_ones() -> None:
    theirs, ours = (model.eval() for model in pair(1))
    rows = torch.tensor([2, 0, 0])
    target = torch.tensor([[2, 6, 5, 4], [2, 9, 7, 7], [2, 10, 11, 4]])
    whole = theirs.model(SOURCE, SOURCE.ne(1).sum(1), target)[0]
    states = theirs.begin(SOURCE), ours.begin(SOURCE)
    for step in range(4):
        if step == 2:
            for state in states:
                state.select(rows)
            target, whole = target[rows], whole[rows]
        for model, state in zip((theirs, ours), states, strict=True):
            logits, _ = model.step(target[:, step], state)  # type: ignore[arg-type]
            torch.testing.assert_close(logits, whole[:, step], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("beam", "alpha"), [(1, 1.0), (4, 0.6), (5, 0.0)])
def test_beam_search_finds_what_fairseqs_generator_finds(beam: int, alpha: float) -> None:
    from fairseq.data import Dictionary
    from fairseq.sequence_generator import SequenceGenerator

    dictionary = Dictionary()
    for index in range(VOCABULARY - len(dictionary)):
        dictionary.add_symbol(str(index))
    config = DecodeConfig(beam=beam, alpha=alpha, max_length_a=1.0, max_length_b=6)
    ends = 0
    for seed in range(4):
        theirs, ours = (model.eval() for model in pair(seed))
        for model in (theirs.model, ours):
            # Without this random weights repeat one word without end.
            model.encoder.embed_tokens.weight[3:] *= 0.3
        generator = SequenceGenerator(
            [theirs.model], dictionary, beam_size=beam, max_len_a=1, max_len_b=5, len_penalty=alpha, min_len=0
        )
        # One sentence at a time: fairseq takes the longest length of a batch for all of it.
        for source in (SOURCE[:1], SOURCE[1:2, :3]):
            sample = {"net_input": {"src_tokens": source, "src_lengths": source.ne(1).sum(1)}}
            expected = [(h["tokens"][:-1].tolist(), float(h["score"])) for h in generator.forward(sample)[0]]
            for model in (theirs, ours):
                (found,) = beam_search(model, source, config)
                assert [list(h.tokens) for h in found] == [tokens for tokens, _ in expected]
                assert [h.score for h in found] == pytest.approx([score for _, score in expected], abs=1e-4)
            ends += len(expected[0][0]) < source.shape[1] + 5
    assert ends, "some translation must end by itself"


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_the_smoothed_loss_equals_fairseqs_and_torchs(smoothing: float) -> None:
    from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

    torch.manual_seed(0)
    logits = torch.randn(3, 4, VOCABULARY, requires_grad=True)
    loss, nll = smoothed_loss(logits, TARGET, smoothing, "others")
    log_probs = torch.log_softmax(logits, -1).flatten(0, 1)
    expected, expected_nll = label_smoothed_nll_loss(
        log_probs, TARGET.flatten().unsqueeze(1), smoothing, ignore_index=1
    )
    torch.testing.assert_close(loss, expected.squeeze())
    torch.testing.assert_close(nll, expected_nll.squeeze())
    given, theirs = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(given, theirs)
    nvidia = nn.functional.cross_entropy(
        logits.flatten(0, 1), TARGET.flatten(), ignore_index=1, reduction="sum", label_smoothing=smoothing
    )
    torch.testing.assert_close(smoothed_loss(logits, TARGET, smoothing, "all")[0], nvidia)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for split, pairs in synthetic_corpus(train=200, valid=20, test=20).items():
        for side, language in enumerate(("en", "de")):
            (folder / f"{split}.{language}").write_text("".join(f"{p[side]}\n" for p in pairs), encoding="utf-8")
    return folder


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """fairseq's commands, without their logging and with the compatibility level of Hydra that they need.

    That level belongs to the process: a test that ran before may have raised it to ours.
    """
    monkeypatch.setattr(VersionBase.instance(), "version_base", Version("1.1"))
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def preprocess(text: Path, folder: Path, implementation: str) -> None:
    from fairseq import options
    from fairseq_cli import preprocess as command

    arguments = ["--source-lang", "en", "--target-lang", "de", "--joined-dictionary", "--destdir", str(folder)]
    for split in SPLITS:
        arguments += [f"--{split}pref", str(text / split)]
    command.main(options.get_preprocessing_parser().parse_args([*arguments, "--dataset-impl", implementation]))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("implementation", ["mmap", "cached"])
def test_data_of_fairseq_preprocess_is_read_as_fairseq_reads_it(
    text_folder: Path, tmp_path: Path, implementation: str
) -> None:
    from fairseq.data import Dictionary, data_utils

    preprocess(text_folder, tmp_path, implementation)
    data = load_translation("fairseq_binary", str(tmp_path))
    dictionary = Dictionary.load(str(tmp_path / "dict.en.txt"))
    assert data.vocabulary.tokens == dictionary.symbols
    for split, ours in zip(SPLITS, (data.train, data.valid, data.test), strict=True):
        for language, sequences in (("en", ours.source), ("de", ours.target)):
            theirs = data_utils.load_indexed_dataset(str(tmp_path / f"{split}.en-de.{language}"), dictionary)
            if implementation == "cached":
                theirs.prefetch(list(range(len(theirs))))
            assert len(sequences) == len(theirs) == (200 if split == "train" else 20)
            assert sequences.sizes.tolist() == list(theirs.sizes)
            for index in range(len(theirs)):
                np.testing.assert_array_equal(sequences[index], theirs[index].numpy())


@pytest.mark.usefixtures("quiet")
def test_a_checkpoint_of_fairseq_train_loads_into_our_model(text_folder: Path, tmp_path: Path) -> None:
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq_cli import train as command

    preprocess(text_folder, tmp_path / "data", "mmap")
    arguments = [str(tmp_path / "data"), "--arch", "transformer_wmt_en_de", "--share-all-embeddings", "--cpu"]
    for side in ("encoder", "decoder"):
        arguments += [f"--{side}-embed-dim", "16", f"--{side}-ffn-embed-dim", "24", f"--{side}-attention-heads", "4"]
    arguments += ["--encoder-layers", "2", "--decoder-layers", "3", "--optimizer", "adam", "--lr", "0.001"]
    arguments += ["--max-tokens", "500", "--max-update", "2", "--save-dir", str(tmp_path), "--disable-validation"]
    command.main(convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), arguments)))
    path = tmp_path / "checkpoint_last.pt"
    vocabulary = load_translation("fairseq_binary", str(tmp_path / "data")).vocabulary
    theirs, ours = (make(len(vocabulary), **SIZE).eval() for make in (fairseq_transformer, transformer))
    theirs.model.load_state_dict(torch.load(path, weights_only=False)["model"])
    load_fairseq_checkpoint(path, ours)
    with torch.no_grad():
        expected = theirs(SOURCE, DECODER_INPUT)
        torch.testing.assert_close(ours(SOURCE, DECODER_INPUT)[PRESENT], expected[PRESENT], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"model\.size\.heads: got 2, expected 4"):
        load_fairseq_checkpoint(path, transformer(len(vocabulary), **{**SIZE, "heads": 2}))
    with pytest.raises(UserError, match=r"embed_tokens\.weight has shape"):
        load_fairseq_checkpoint(path, transformer(len(vocabulary) + 8, **SIZE))


@pytest.mark.usefixtures("quiet")
def test_what_we_export_loads_into_fairseq(text_folder: Path, tmp_path: Path) -> None:
    from fairseq import checkpoint_utils
    from fairseq.tasks.translation import TranslationConfig, TranslationTask

    preprocess(text_folder, tmp_path, "mmap")
    vocabulary = load_translation("fairseq_binary", str(tmp_path)).vocabulary
    ours = transformer(len(vocabulary), **SIZE).eval()
    torch.save(export_fairseq_state(ours), tmp_path / "ours.pt")
    task = TranslationTask.setup_task(TranslationConfig(data=str(tmp_path), source_lang="en", target_lang="de"))
    (theirs,), _ = checkpoint_utils.load_model_ensemble([str(tmp_path / "ours.pt")], task=task)
    with torch.no_grad():
        expected = theirs.eval()(SOURCE, SOURCE.ne(1).sum(1), DECODER_INPUT)[0]
        torch.testing.assert_close(ours(SOURCE, DECODER_INPUT)[PRESENT], expected[PRESENT], rtol=1e-4, atol=1e-5)


def layout_of_2018(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """fused in_proj, layer_norms.N, sinusoidal buffers, no output projection, version 2."""
    norms = {"self_attn_layer_norm": "0", "encoder_attn_layer_norm": "1"}
    old: dict[str, Tensor] = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[-2] in ("k_proj", "v_proj") or parts[1] in ("output_projection", "version"):
            continue
        if parts[-2] == "q_proj":
            fused = [state[name.replace("q_proj", kind)] for kind in ("q_proj", "k_proj", "v_proj")]
            old[name.replace("q_proj.", "in_proj_")] = torch.cat(fused)
        elif parts[-2].endswith("layer_norm"):
            last = "2" if parts[0] == "decoder" else "1"
            old[".".join([*parts[:3], "layer_norms", norms.get(parts[-2], last), parts[-1]])] = value
        else:
            old[name] = value
    for stack in ("encoder", "decoder"):
        old[f"{stack}.embed_positions._float_tensor"] = torch.zeros(1)
        old[f"{stack}.version"] = torch.tensor([2.0])
    return old


@torch.no_grad()
def test_the_layout_of_2018_means_the_same_to_fairseq_and_to_us(tmp_path: Path) -> None:
    saved, _ = pair(2)
    old = layout_of_2018(saved.model.state_dict())
    torch.save({"args": Namespace(arch="transformer_wmt_en_de"), "model": old}, tmp_path / "old.pt")
    theirs, ours = (model.eval() for model in pair(3))
    load_fairseq_checkpoint(tmp_path / "old.pt", ours)
    # fairseq's own upgrade of the names.
    upgraded = {name: value.clone() for name, value in old.items()}
    theirs.model.upgrade_state_dict(upgraded)
    theirs.model.load_state_dict(upgraded, strict=False)
    expected = theirs(SOURCE, DECODER_INPUT)
    torch.testing.assert_close(expected, saved.eval()(SOURCE, DECODER_INPUT))
    torch.testing.assert_close(ours(SOURCE, DECODER_INPUT)[PRESENT], expected[PRESENT], rtol=1e-4, atol=1e-5)


def test_fairseqs_model_trains_under_the_recipe() -> None:
    torch.manual_seed(0)
    model = fairseq_transformer(VOCABULARY, dropout=0.0, **SIZE)
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    report = inject(model, load_recipe("fp8"), backend="emulate")
    assert report.names("exempt") == ["model.decoder.output_projection"]
    assert set(report.names("converted")) | set(report.names("exempt")) == linears
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    seen: set[tuple[str, str]] = set()

    def observer(layer: str, product: str, operands: tuple[products.Operand, ...]) -> None:
        seen.add((layer, product))
        expected = "fp16" if layer.endswith("output_projection") else "e5m2"
        assert {operand.fmt.name for operand in operands} == {expected}, layer

    losses = []
    for step in range(60):
        model.fp8_context.begin(step)  # type: ignore[union-attr,operator]
        loss = smoothed_loss(model(SOURCE, DECODER_INPUT), TARGET)[0]
        with model.fp8_context.observe(observer):
            (loss * 1000).backward()
            if not step:
                model(SOURCE, DECODER_INPUT)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.div_(1000)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # Scores and contexts, which fairseq computes by functions.
    attention = {layer for layer, _ in seen if ".fp8_products." in layer}
    count = sum(type(module).__name__ == "MultiheadAttention" for module in model.modules())
    assert len(attention) == 2 * count
    expected_products = {(layer, product) for layer in linears for product in ("forward", "error", "gradient")}
    assert seen == expected_products | {(layer, product) for layer in attention for product in ("forward", "error")}
    assert losses[-1] < 0.3 * losses[0]


def test_what_fairseq_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"tie_output: got False, expected True"):
        fairseq_transformer(VOCABULARY, tie_output=False, **SIZE)
    for name in [name for name in sys.modules if name.split(".")[0] == "fairseq"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'fp8repro\[fairseq\]'") as caught:
        fairseq_transformer(VOCABULARY, **SIZE)
    assert "\n" not in str(caught.value)


def test_importing_fairseq_changes_no_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = list(logging.root.handlers)
    for name in ("fairseq.tasks.text_to_speech", "fairseq.tasks.frm_text_to_speech"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    fairseq_model._import_fairseq("fairseq.models.transformer")
    assert logging.root.handlers == handlers
    assert logging.root.manager.disable == logging.NOTSET
