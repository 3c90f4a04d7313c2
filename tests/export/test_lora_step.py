"""Adapters in step graphs: any factor may rest, side terms add, FedProx pulls back, and nothing changes at round 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from aggregator.merge import Contribution, Plan, Rule, merge
from aggregator.merge.lora import ALTERNATE, FREEZE_A, STACK
from edge_sdk.bundle import Bundle
from edge_sdk.runtime import Predictor, Stepper
from export import ProgramSpec, build_bundle
from export.errors import SpecError
from tests.export.models import example, net


def lora(**options: Any) -> ProgramSpec:
    return ProgramSpec("lora", {"rank": 2, **options}, options.pop("precision", "float"), "adamw")


def build(path: Path, *programs: ProgramSpec, kind: str = "mlp") -> Any:
    return build_bundle(net(kind), example(kind), path, name=kind, loss="cross_entropy", programs=list(programs))


@pytest.mark.parametrize("precision", ["float", "int8"])
@pytest.mark.parametrize("kind", ["mlp", "conv1d", "conv2d"])
@pytest.mark.parametrize("factors", ["ab", "a", "b"])
def test_gradients_agree_with_torch_whichever_factor_trains(
    tmp_path: Path, kind: str, factors: str, precision: str
) -> None:
    spec = ProgramSpec("lora", {"rank": 2, "factors": factors, "side_rank": 3}, precision, "sgd")
    report = build(tmp_path / "net.bundle", spec, kind=kind)
    (found,) = report.programs
    assert found.proof.oracle == "torch"
    assert found.proof.max_relative_error < 1e-5
    assert all(name.endswith(tuple(f"lora_{f}" for f in factors)) for name in found.trained)


@pytest.mark.parametrize("precision", ["float", "int8"])
def test_a_new_adapter_gives_the_output_of_the_base_bit_for_bit(tmp_path: Path, precision: str) -> None:
    x, _ = example("mlp")
    build(
        tmp_path / "net.bundle",
        ProgramSpec("lora", {"rank": 2, "side_rank": 2}, precision),
        ProgramSpec("head", {}, precision),
    )
    with Bundle.open(tmp_path / "net.bundle") as bundle:
        adapter, head = (next(p for p in bundle.programs.values() if p.scope == scope) for scope in ("lora", "head"))
        if precision == "int8":  # the head program keeps its last layer in float32
            full = Predictor(bundle, adapter, bundle.initial(adapter)).predict(x)
            without = {n: np.zeros_like(v) if n.endswith("lora_a") else v for n, v in bundle.initial(adapter).items()}
            np.testing.assert_array_equal(full, Predictor(bundle, adapter, without).predict(x))
            return
        np.testing.assert_array_equal(
            Predictor(bundle, adapter, bundle.initial(adapter)).predict(x),
            Predictor(bundle, head, bundle.initial(head)).predict(x),
        )


def test_a_factor_that_rests_is_given_with_the_start_and_stays(tmp_path: Path) -> None:
    x, y = example("mlp")
    build(tmp_path / "net.bundle", lora(factors="a"), lora(factors="b"))
    with Bundle.open(tmp_path / "net.bundle") as bundle:
        only_a, only_b = (bundle.program(f"mlp/lora/r2/{factor}/float") for factor in "ab")
        assert set(only_a.reads) == set(only_b.reads)
        model = bundle.initial(only_b)
        for number, (program, rule) in enumerate([(only_b, FREEZE_A), (only_a, ALTERNATE), (only_b, ALTERNATE)]):
            stepper = Stepper(bundle, program, model)
            first = stepper.step({"d.x": x, "d.y": y}, {"lr": 0.05}).loss
            losses = [stepper.step({"d.x": x, "d.y": y}, {"lr": 0.05}).loss for _ in range(10)]
            assert losses[-1] < first
            trained = stepper.tensors()
            assert set(trained) == set(program.tensors)
            plan = Plan(only_b, {program.id: program}, bundle.tensors, round=number + 1)
            rows = [Contribution("dev", 1, 5, model, trained, program.id)]
            model = {**model, **merge(rule.create(plan), rows, model).tensors}
            np.testing.assert_allclose(
                Predictor(bundle, program, model).predict(x), Predictor(bundle, only_b, model).predict(x)
            )
            stepper.close()


def test_what_stack_moves_into_the_side_term_is_served_unchanged(tmp_path: Path) -> None:
    x, y = example("mlp")
    build(tmp_path / "net.bundle", lora(side_rank=4))
    with Bundle.open(tmp_path / "net.bundle") as bundle:
        program = bundle.program("mlp/lora/r2/float")
        start = bundle.initial(program)
        stepper = Stepper(bundle, program, start)
        for _ in range(10):
            stepper.step({"d.x": x, "d.y": y}, {"lr": 0.05})
        trained = stepper.tensors()
        rows = [Contribution("dev", 1, 5, start, trained, program.id)]
        rule: Rule = STACK
        model = {**start, **merge(rule.create(Plan.of(program, bundle.tensors)), rows, start).tensors}
        assert not any(model[name].any() for name in model if name.endswith("lora_b"))
        served = Predictor(bundle, program, model).predict(x)
        np.testing.assert_allclose(served, Predictor(bundle, program, {**start, **trained}).predict(x), atol=1e-5)
        assert np.abs(served - Predictor(bundle, program, start).predict(x)).max() > 1e-3


def test_several_ranks_fit_into_one_bundle_when_they_are_named_by_rank(tmp_path: Path) -> None:
    report = build(tmp_path / "net.bundle", *(lora(rank=rank, named_by_rank=True, side_rank=2) for rank in (1, 2, 4)))
    assert [program.id for program in report.programs] == [f"mlp/lora/r{rank}/float" for rank in (1, 2, 4)]
    with pytest.raises(SpecError, match="would differ between two programs"):
        build(tmp_path / "other.bundle", lora(rank=1), lora(rank=2))


@pytest.mark.parametrize("optimizer", ["sgd+prox", "adamw+prox"])
def test_twenty_proximal_steps_follow_torch(tmp_path: Path, optimizer: str) -> None:
    module = net("mlp")
    x, y = example("mlp")
    path = tmp_path / "net.bundle"
    build_bundle(
        module, (x, y), path, name="mlp", loss="cross_entropy", programs=[ProgramSpec("full", {}, "float", optimizer)]
    )
    parameters = list(module.parameters())
    anchors = [p.detach().clone() for p in parameters]
    reference: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        if optimizer == "sgd+prox"
        else torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0)
    )
    with Bundle.open(path) as bundle:
        program = bundle.program("mlp/full/float")
        stepper = Stepper(bundle, program, bundle.initial(program))
        for _ in range(20):
            stepper.step({"d.x": x, "d.y": y}, {"lr": 0.05, "weight_decay": 0.0, "proximal": 0.7})
            loss = nn.functional.cross_entropy(module(torch.as_tensor(x)), torch.as_tensor(y))
            pull = sum(((p - a) ** 2).sum() for p, a in zip(parameters, anchors, strict=True))
            reference.zero_grad()
            (loss + 0.35 * pull).backward()  # type: ignore[no-untyped-call]
            reference.step()
        found = stepper.tensors()
        for name, value in module.named_parameters():
            np.testing.assert_allclose(found[name], value.detach().numpy(), atol=2e-4)
        stepper.close()


def test_the_pull_of_fedprox_is_a_hyper_parameter_of_one_graph(tmp_path: Path) -> None:
    x, y = example("mlp")
    path = tmp_path / "net.bundle"
    build_bundle(
        net("mlp"),
        (x, y),
        path,
        name="mlp",
        loss="cross_entropy",
        programs=[ProgramSpec("full", {}, "float", "sgd+prox")],
    )
    moved = {}
    with Bundle.open(path) as bundle:
        program = bundle.program("mlp/full/float")
        start = bundle.initial(program)
        for pull in (0.0, 1.0, 10.0):
            stepper = Stepper(bundle, program, start)
            for _ in range(30):
                stepper.step({"d.x": x, "d.y": y}, {"lr": 0.02, "proximal": pull})
            moved[pull] = float(np.sqrt(sum(np.sum((v - start[n]) ** 2) for n, v in stepper.tensors().items())))
            stepper.close()
    assert moved[0.0] > 1.5 * moved[1.0] > 2 * moved[10.0]
