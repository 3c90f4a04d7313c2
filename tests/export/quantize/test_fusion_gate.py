"""What is quantized runs in integers, as the runtime has optimised it; and a float fallback is seen and named."""

from __future__ import annotations

import platform

import numpy as np
import pytest

from benchmarks.step_models import STEP_MODELS
from export.quantize.calibration import calibrate
from export.quantize.kernels import kernels_of
from export.quantize.pipeline import Data, Recipe, quantize_model
from export.quantize.ptq import stripped, to_integers
from export.quantize.report import GateFailed
from export.torch_import import forward_graph
from tests.export.quantize.nets import FAMILIES, family, run

ANY = ("accuracy", "latency")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_product_and_residual_sum_of_every_family_is_integer(name: str) -> None:
    model, x = family(name)
    ranges = calibrate(model, x).finish()
    for bits in (4, 8) if name == "tiny_resnet8" else (8,):
        kernels = kernels_of(stripped(to_integers(model, ranges, bits=bits)))
        assert kernels.floats == ()
        assert kernels.integer >= sum(node.op_type in ("Conv", "Gemm") for node in model.graph)
    if name == "tiny_resnet8":
        assert kernels.counts["QLinearAdd"] == 3


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the rewrite to unsigned codes is one of x86")
def test_signed_activations_leave_the_residual_net_in_float_and_the_gate_says_where() -> None:
    entry = STEP_MODELS["tiny_resnet8"]
    x, y = entry.example(24)
    with pytest.raises(
        GateFailed, match=r"fusion: \d operators run in float although they are quantized: Conv"
    ) as told:
        quantize_model(
            forward_graph(entry.make(), x[:2]),
            Data(x, y, x, y),
            Recipe(memory=False, signed=True, qat=None, allow=ANY),
            name="net",
        )
    assert "unsigned" in str(told.value)


def test_four_bits_take_half_the_bytes_of_eight_and_the_same_kernels() -> None:
    model, x = family("tiny_autoencoder")
    ranges = calibrate(model, x).finish()
    eight, four = (stripped(to_integers(model, ranges, bits=bits)) for bits in (8, 4))
    weights = 264_192  # of the ten products
    assert len(eight) - len(four) >= 0.25 * weights
    assert kernels_of(eight).counts == kernels_of(four).counts


def test_a_transformer_at_four_bits_multiplies_blocks(tmp_path) -> None:
    entry = STEP_MODELS["vit_all"]
    x, y = entry.example(4)
    found = quantize_model(
        forward_graph(entry.make(0.5), x[:2]),
        Data(x, y, x, y),
        Recipe(memory=False, bits=4, allow=("accuracy", "latency")),
    )
    assert "blocks" in found.report.method
    assert found.report.integer_kernels == 24  # six products in each of four blocks
    assert len(found.integer) < 0.3 * found.report.float_bytes
    assert found.report.snr_db > 15


def test_stripping_changes_no_number_and_saves_bytes() -> None:
    model, x = family("tiny_ds_cnn")
    made = to_integers(model, calibrate(model, x).finish())
    small = stripped(made)
    assert len(small) < 0.75 * made.ByteSize()
    assert (run(made.SerializeToString(), x) == run(small, x)).all()
    assert np.isfinite(run(small, x)).all()
