"""LoRA on every kind of layer that takes an adapter, proved against torch, over a float and an int8 base."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.step_models import STEP_MODELS
from edge_sdk.bundle import Bundle
from edge_sdk.runtime import Stepper
from export import ProgramSpec, build_bundle
from export.errors import SpecError, UnknownTensor
from export.scopes.lora import LoraScope

RANK = 2


@pytest.mark.parametrize(
    ("net", "targets", "layers"),
    [
        ("encoder", ["*.q_proj", "*.v_proj"], ["layer.self_attn.q_proj", "layer.self_attn.v_proj"]),
        ("encoder", ["*.self_attn.*"], [f"layer.self_attn.{n}_proj" for n in ("q", "k", "v", "out")]),
        ("vit_lora", ["blocks.1.attention.[qv]"], ["blocks.1.attention.q", "blocks.1.attention.v"]),
        ("vit_lora", ["patches", "blocks.3.mlp.*", "head"], ["patches", "blocks.3.mlp.0", "blocks.3.mlp.2", "head"]),
        ("conv1d_all", ["*"], ["features.0", "features.3", "features.6", "head"]),
        ("depthwise_all", ["features.1.0", "features.2.0"], ["features.1.0", "features.2.0"]),
    ],
)
def test_an_adapter_of_every_kind_of_layer_is_proved_and_learns(
    tmp_path: Path, net: str, targets: list[str], layers: list[str]
) -> None:
    model = STEP_MODELS[net]
    x, y = model.example()
    programs = [ProgramSpec("lora", {"rank": RANK, "targets": targets}, precision) for precision in ("float", "int8")]
    report = build_bundle(
        model.make(0.125), (x, y), tmp_path / "net.bundle", name="net", loss=model.loss, programs=programs
    )
    with Bundle.open(report.path) as bundle:
        for entry in report.programs:
            assert entry.trained == tuple(f"{layer}.{part}" for layer in layers for part in ("lora_a", "lora_b"))
            assert entry.proof.max_relative_error < 1e-5
            program = bundle.program(entry.id)
            stepper = Stepper(bundle, program, bundle.initial(program))
            losses = [stepper.step({"d.x": x, "d.y": y}, {"lr": 0.01}).loss for _ in range(20)]
            stepper.close()
            assert losses[-1] < losses[0] - 0.01, entry.id


def test_a_part_of_a_packed_projection_changes_its_own_rows_only() -> None:
    from export.torch_import import forward_graph

    model = STEP_MODELS["encoder"]
    module = model.make(0.125)
    graph = forward_graph(module, model.example(2)[0])
    applied = LoraScope(RANK, 2.0 * RANK, ("*.v_proj",)).apply(graph, [n for n, _ in module.named_parameters()], 0)
    weight = module.layer.self_attn.in_proj_weight.detach()
    m = weight.shape[0] // 3
    trained = {t.name: torch.ones(t.value.shape) for t in applied.trainables}
    changed = applied.effective(trained, {"layer.self_attn.in_proj_weight": weight})["layer.self_attn.in_proj_weight"]
    assert torch.equal(changed[: 2 * m], weight[: 2 * m])
    assert torch.allclose(changed[2 * m :] - weight[2 * m :], torch.full((m, weight.shape[1]), 2.0 * RANK))


def test_an_adapter_that_saves_nothing_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    programs = [ProgramSpec("lora", {"rank": 4}, "float")]
    x = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32)
    with caplog.at_level(logging.WARNING):
        build_bundle(
            nn.Linear(7, 4), (x, np.arange(6) % 4), tmp_path / "b", name="net", loss="cross_entropy", programs=programs
        )
    assert any("rank 4 saves nothing over the weight [4, 7]" in message for message in caplog.messages)


def test_a_target_that_matches_nothing_lists_the_layers(tmp_path: Path) -> None:
    model = STEP_MODELS["encoder"]
    programs = [ProgramSpec("lora", {"targets": ["*.query"]})]
    with pytest.raises(UnknownTensor, match=r"layer\.self_attn\.q_proj"):
        build_bundle(
            model.make(0.125), model.example(4), tmp_path / "b", name="net", loss=model.loss, programs=programs
        )


@pytest.mark.parametrize(("net", "layers"), [("vit_lora", ["q", "v"]), ("encoder", ["q_proj", "v_proj"])])
def test_a_transformer_adapts_queries_and_values_unless_told_otherwise(
    tmp_path: Path, net: str, layers: list[str]
) -> None:
    model = STEP_MODELS[net]
    report = build_bundle(
        model.make(0.125), model.example(4), tmp_path / "b", name="net", loss=model.loss,
        programs=[ProgramSpec("lora", {"rank": RANK}, "float")],
    )  # fmt: skip
    adapted = {name.rpartition(".")[0].rpartition(".")[2] for name in report.programs[0].trained}
    assert adapted == set(layers)


@pytest.mark.parametrize(
    ("also", "own"),
    [
        (["head"], ["head.weight", "head.bias"]),
        (["norm"], [f"layer.norm{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")]),
        (["bias"], ["embed.bias", "layer.self_attn.in_proj_bias", "layer.self_attn.out_proj.bias",
                    "layer.linear1.bias", "layer.linear2.bias", "head.bias"]),
    ],
)  # fmt: skip
def test_head_norms_and_biases_may_train_beside_the_adapters(tmp_path: Path, also: list[str], own: list[str]) -> None:
    model = STEP_MODELS["encoder"]
    module = model.make(0.125)
    spec = ProgramSpec("lora", {"rank": RANK, "also_train": also}, "int8")
    example = model.example()
    report = build_bundle(module, example, tmp_path / "b", name="net", loss=model.loss, programs=[spec])
    entry = report.programs[0]
    assert [name for name in entry.trained if ".lora_" not in name] == own
    assert entry.proof.max_relative_error < 1e-5
    with Bundle.open(report.path) as bundle:
        program = bundle.program(entry.id)
        start = bundle.initial(program)
        named = dict(module.named_parameters())
        for name in own:
            assert bundle.tensors[name].merge == "mean"
            assert np.array_equal(start[name], named[name].detach().numpy())
        stepper = Stepper(bundle, program, start)
        losses = [stepper.step({"d.x": example[0], "d.y": example[1]}, {"lr": 0.01}).loss for _ in range(20)]
        moved = stepper.tensors()
        stepper.close()
    assert losses[-1] < losses[0] - 0.01
    assert all((moved[name] != start[name]).any() for name in own)


def test_the_rank_stabilised_scale_stands_in_the_tensor_table(tmp_path: Path) -> None:
    model = STEP_MODELS["encoder"]
    spec = ProgramSpec("lora", {"rank": 4, "alpha": 6.0, "scaling": "rank_stabilised"}, "float")
    report = build_bundle(
        model.make(0.25), model.example(4), tmp_path / "b", name="net", loss=model.loss, programs=[spec]
    )
    assert report.programs[0].proof.max_relative_error < 1e-5
    with Bundle.open(report.path) as bundle:
        assert {entry.scale for entry in bundle.tensors.values() if entry.merge == "lora_a"} == {3.0}


def test_a_head_that_trains_takes_no_adapter(tmp_path: Path) -> None:
    model = STEP_MODELS["encoder"]
    for targets, refused in ((["head"], True), (["head", "*.linear1"], False)):
        programs = [ProgramSpec("lora", {"rank": RANK, "targets": targets, "also_train": ["head"]}, "float")]
        build = (model.make(0.125), model.example(4), tmp_path / "b")
        if refused:
            with pytest.raises(SpecError, match="left without a layer"):
                build_bundle(*build, name="net", loss=model.loss, programs=programs)
        else:
            report = build_bundle(*build, name="net", loss=model.loss, programs=programs)
            assert not {"head.lora_a", "head.lora_b"} & set(report.programs[0].trained)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"also_train": ["heads"]}, "also_train"),
        ({"also_train": "head"}, "also_train"),
        ({"scaling": "rslora"}, "rank_stabilised"),
    ],
)
def test_an_option_with_a_wrong_value_lists_what_it_takes(options: dict, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        LoraScope.create(options)


def test_a_kind_of_tensor_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    programs = [ProgramSpec("lora", {"rank": 1, "also_train": ["norm"]}, "float")]
    x = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32)
    net = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 4))
    with pytest.raises(SpecError, match="'norm', and the model has no such tensor"):
        build_bundle(net, (x, np.arange(6) % 4), tmp_path / "b", name="net", loss="cross_entropy", programs=programs)
