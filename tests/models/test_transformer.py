"""The Transformer against torch.nn.Transformer, its positions against their formula, fairseq's checkpoint layouts."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fp8repro.errors import UserError
from fp8repro.models.parts import SinusoidalPositions
from fp8repro.models.transformer import (
    Transformer,
    TransformerConfig,
    export_fairseq_state,
    load_fairseq_checkpoint,
    transformer,
    upgrade_fairseq_state,
)

SIZE = {"width": 16, "ffn_width": 24, "heads": 4, "encoder_layers": 2, "decoder_layers": 3, "dropout": 0.0}
SOURCE = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 2, 1, 1], [2, 1, 1, 1, 1]])
DECODER_INPUT = torch.tensor([[2, 6, 5, 4], [2, 9, 1, 1], [2, 10, 11, 4]])


def make(**size: object) -> Transformer:
    torch.manual_seed(3)
    return transformer(12, **{**SIZE, **size})


def torch_oracle(model: Transformer) -> nn.Transformer:
    """torch's own Transformer with the same weights (post-norm, ReLU, no final normalization)."""
    c = model.config
    oracle = nn.Transformer(
        c.width, c.heads, c.encoder_layers, c.decoder_layers, c.ffn_width, 0.0, batch_first=True, norm_first=False
    )
    # nn.Transformer adds final norms, which the base model has not.
    oracle.encoder.norm, oracle.decoder.norm = None, None
    ours = model.state_dict()
    state = {}
    for stack, norms in (
        ("encoder", ("self_attn_layer_norm", "final_layer_norm")),
        ("decoder", ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")),
    ):
        for n in range(getattr(c, f"{stack}_layers")):
            layer = f"{stack}.layers.{n}"
            for theirs, name in (("self_attn", "self_attn"), ("multihead_attn", "encoder_attn")):
                if f"{layer}.{name}.q_proj.weight" not in ours:
                    continue
                for kind in ("weight", "bias"):
                    parts = [ours[f"{layer}.{name}.{p}_proj.{kind}"] for p in "qkv"]
                    state[f"{layer}.{theirs}.in_proj_{kind}"] = torch.cat(parts)
                    state[f"{layer}.{theirs}.out_proj.{kind}"] = ours[f"{layer}.{name}.out_proj.{kind}"]
            for kind in ("weight", "bias"):
                for i, norm in enumerate(norms, start=1):
                    state[f"{layer}.norm{i}.{kind}"] = ours[f"{layer}.{norm}.{kind}"]
                state[f"{layer}.linear1.{kind}"] = ours[f"{layer}.fc1.{kind}"]
                state[f"{layer}.linear2.{kind}"] = ours[f"{layer}.fc2.{kind}"]
    oracle.load_state_dict(state)
    return oracle


def oracle_logits(model: Transformer, oracle: nn.Transformer, source: Tensor, decoder_input: Tensor) -> Tensor:
    weight = model.encoder.embed_tokens.weight
    scale = math.sqrt(model.config.width)
    positions = model.encoder.positions
    masked = source.eq(1)
    hidden = oracle(
        scale * weight[source] + positions(source),
        scale * weight[decoder_input] + positions(decoder_input),
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(decoder_input.shape[1]),
        src_key_padding_mask=masked.float().masked_fill(masked, -math.inf),
        memory_key_padding_mask=masked.float().masked_fill(masked, -math.inf),
    )
    return hidden @ model.decoder.output_projection.weight.t()


@pytest.mark.parametrize("tie_output", [True, False])
def test_logits_and_gradients_equal_those_of_torchs_transformer(tie_output: bool) -> None:
    model = make(tie_output=tie_output)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.encoder.embed_tokens.weight[1] = 0
    oracle = torch_oracle(model)
    present = DECODER_INPUT.ne(1)
    ours = model(SOURCE, DECODER_INPUT)
    theirs = oracle_logits(model, oracle, SOURCE, DECODER_INPUT)
    torch.testing.assert_close(ours[present], theirs[present], rtol=1e-4, atol=1e-5)
    ours[present].square().sum().backward()
    theirs[present].square().sum().backward()
    q_grad = model.encoder.layers[1].self_attn.q_proj.weight.grad
    assert q_grad is not None
    assert q_grad.abs().max() > 0
    torch.testing.assert_close(
        q_grad, oracle.encoder.layers[1].self_attn.in_proj_weight.grad[:16], rtol=1e-3, atol=1e-4
    )
    cross = model.decoder.layers[0].encoder_attn.v_proj.weight.grad
    theirs_cross = oracle.decoder.layers[0].multihead_attn.in_proj_weight.grad[32:]
    torch.testing.assert_close(cross, theirs_cross, rtol=1e-3, atol=1e-4)


def test_positions_follow_their_formula_and_skip_padding_on_either_side() -> None:
    positions = SinusoidalPositions(8, pad=1)
    tokens = torch.tensor([[5, 6, 7, 1, 1], [1, 1, 5, 6, 7]])
    given = positions(tokens).numpy()
    frequencies = 10000.0 ** (-np.arange(4) / 3)
    for step in range(3):
        angles = (step + 2) * frequencies  # the first position is pad + 1 = 2
        expected = np.concatenate([np.sin(angles), np.cos(angles)])
        np.testing.assert_allclose(given[0, step], expected, atol=1e-6)
        np.testing.assert_allclose(given[1, step + 2], expected, atol=1e-6)
    assert not given[0, 3:].any()
    assert not given[1, :2].any()


def test_padding_changes_no_translation() -> None:
    model = make().eval()
    alone = model(torch.tensor([[9, 4, 2]]), DECODER_INPUT[1:2])
    left = model(torch.tensor([[1, 1, 9, 4, 2]]), DECODER_INPUT[1:2])
    torch.testing.assert_close(model(SOURCE[1:2], DECODER_INPUT[1:2]), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left, alone, rtol=1e-5, atol=1e-5)


def test_step_by_step_decoding_gives_the_logits_of_the_whole_sequence() -> None:
    model = make().eval()
    target = torch.tensor([[2, 6, 5, 4], [2, 9, 7, 7], [2, 10, 11, 4]])
    whole = model(SOURCE, target)
    state = model.begin(SOURCE)
    for step in range(2):
        torch.testing.assert_close(model.step(target[:, step], state)[0], whole[:, step], rtol=1e-4, atol=1e-5)
    rows = torch.tensor([2, 0, 0])
    state.select(rows)
    for step in range(2, 4):
        logits, _ = model.step(target[rows, step], state)
        torch.testing.assert_close(logits, whole[rows, step], rtol=1e-4, atol=1e-5)


def fairseq_names(encoder_layers: int, decoder_layers: int) -> set[str]:
    """Names as fairseq's README and code give them (transformer_wmt_en_de, shared embeddings)."""
    names = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight"}
    for stack, count in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        modules = [f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")]
        modules += ["self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"]
        if stack == "decoder":
            modules += [f"encoder_attn.{p}_proj" for p in ("q", "k", "v", "out")] + ["encoder_attn_layer_norm"]
        names |= {f"{stack}.layers.{n}.{m}.{k}" for n in range(count) for m in modules for k in ("weight", "bias")}
    return names


def test_parameters_have_fairseqs_names_and_the_output_projection_is_the_embedding() -> None:
    model = make()
    assert set(model.state_dict()) == fairseq_names(2, 3)
    assert model.decoder.output_projection.weight is model.encoder.embed_tokens.weight


def test_the_base_model_has_its_published_size() -> None:
    with torch.device("meta"):
        model = Transformer(TransformerConfig(vocab_size=32768))
    # 6 x 3,152,384 (encoder layer), 6 x 4,204,032 (decoder layer), 32,768 x 512 (embedding).
    assert sum(p.numel() for p in model.parameters()) == 6 * 3_152_384 + 6 * 4_204_032 + 32_768 * 512


def test_initialization() -> None:
    torch.manual_seed(0)
    model = transformer(1000, width=64, ffn_width=128, heads=4, encoder_layers=1, decoder_layers=1)
    attention = model.decoder.layers[0].encoder_attn
    bound = math.sqrt(6 / (64 + 64))
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert 0.97 * bound / math.sqrt(2) < projection.weight.abs().max() <= bound / math.sqrt(2)
    assert 0.97 * bound < attention.out_proj.weight.abs().max() <= bound
    assert not attention.out_proj.bias.any()
    embedding = model.encoder.embed_tokens.weight
    assert embedding.std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert not embedding[1].any()


def layout_of_2018(model: Transformer) -> dict[str, Tensor]:
    """Weights as fairseq saved them in 2018: fused projections, numbered norms, buffers, no output projection."""
    numbers = {
        "encoder": {"self_attn_layer_norm": 0, "final_layer_norm": 1},
        "decoder": {"self_attn_layer_norm": 0, "encoder_attn_layer_norm": 1, "final_layer_norm": 2},
    }
    state = model.state_dict()
    old: dict[str, Tensor] = {
        "encoder.embed_positions._float_tensor": torch.zeros(1),
        "decoder.embed_positions._float_tensor": torch.zeros(1),
        "encoder.version": torch.tensor([2.0]),
        "decoder.version": torch.tensor([2.0]),
    }
    for name, value in state.items():
        stack, parts = name.split(".")[0], name.split(".")
        if ".q_proj." in name:
            fused = torch.cat([state[name.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")])
            old[name.replace("q_proj.", "in_proj_")] = fused
        elif ".k_proj." in name or ".v_proj." in name or "output_projection" in name:
            continue
        elif parts[-2] in numbers[stack]:
            parts[-2:-1] = ["layer_norms", str(numbers[stack][parts[-2]])]
            old[".".join(parts)] = value
        else:
            old[name] = value
    return old


def test_a_checkpoint_of_2018_loads(tmp_path: Path) -> None:
    torch.manual_seed(5)
    saved = transformer(12, **SIZE)
    for parameter in saved.parameters():
        nn.init.normal_(parameter, std=0.3)
    arguments = argparse.Namespace(arch="transformer_wmt_en_de", encoder_attention_heads=4, decoder_attention_heads=4)
    checkpoint = {"args": arguments, "model": {k: v.half() for k, v in layout_of_2018(saved).items()}}
    torch.save(checkpoint, tmp_path / "old.pt")
    model = make()
    load_fairseq_checkpoint(tmp_path / "old.pt", model)
    half = {name: value.half().float() for name, value in saved.state_dict().items()}
    saved.load_state_dict(half)
    assert torch.equal(model(SOURCE, DECODER_INPUT), saved(SOURCE, DECODER_INPUT))
    assert model.decoder.output_projection.weight is model.encoder.embed_tokens.weight


def test_the_fused_projection_is_split_as_query_key_value() -> None:
    upgraded = upgrade_fairseq_state({"encoder.layers.0.self_attn.in_proj_bias": torch.arange(6.0)})
    values = {name.split(".")[-2]: value.tolist() for name, value in upgraded.items()}
    assert values == {"q_proj": [0, 1], "k_proj": [2, 3], "v_proj": [4, 5]}


def test_an_exported_checkpoint_loads_again(tmp_path: Path) -> None:
    saved = make()
    exported = export_fairseq_state(saved)
    assert set(exported["model"]) == fairseq_names(2, 3) | {"encoder.version", "decoder.version"}
    torch.save(exported, tmp_path / "new.pt")
    torch.manual_seed(9)
    model = transformer(12, **SIZE)
    load_fairseq_checkpoint(tmp_path / "new.pt", model)
    assert torch.equal(model(SOURCE, DECODER_INPUT), saved(SOURCE, DECODER_INPUT))


def test_checkpoints_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    exported = export_fairseq_state(make())
    path = tmp_path / "c.pt"
    torch.save(exported, path)
    with pytest.raises(UserError, match=r"model\.size\.heads: got 2, expected 4"):
        load_fairseq_checkpoint(path, make(heads=2))
    with pytest.raises(UserError, match=r"fc1\.weight has shape \[24, 16\], expected \[32, 16\]"):
        load_fairseq_checkpoint(path, make(ffn_width=32))
    with pytest.raises(UserError, match="unknown to this model"):
        load_fairseq_checkpoint(path, make(decoder_layers=2))
    with pytest.raises(UserError, match="missing in the checkpoint"):
        load_fairseq_checkpoint(path, make(decoder_layers=4))
    exported["cfg"]["model"]["encoder_normalize_before"] = True
    torch.save(exported, path)
    with pytest.raises(UserError, match="pre-norm"):
        load_fairseq_checkpoint(path, make())
    torch.save({"weights": 1}, path)
    with pytest.raises(UserError, match="no entry 'model'"):
        load_fairseq_checkpoint(path, make())
    path.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="cannot read") as caught:
        load_fairseq_checkpoint(path, make())
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read"):
        load_fairseq_checkpoint(tmp_path / "missing.pt", make())


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"depth": 3}, "model.size.depth: unknown setting"),
        ({"width": 20, "heads": 4}, "model.size.width: got 20, expected a multiple"),
        ({"ffn_width": 1.5}, "model.size.ffn_width: got 1.5, expected a whole number"),
        ({"encoder_layers": 0}, "model.size.encoder_layers: got 0"),
    ],
)
def test_wrong_dimensions_are_refused(size: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        transformer(12, **size)
