"""`edgewise bundle`: shows what is in a bundle, finds what is wrong with it, and runs the model in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.bundle import Bundle
from edge_sdk.cli import main
from edge_sdk.keys import SigningKey
from edge_sdk.runtime import Predictor
from edge_sdk.tensors import pack
from tests.tiny_bundle import CLASSES, HEAD, LORA, tiny_bundle, tiny_data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "tiny.bundle")


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    return saved(tmp_path / "x.npy", tiny_data(20)[0])


def saved(path: Path, array: Any) -> Path:
    np.save(path, array)
    return path


def run(*arguments: object) -> int:
    return main(["bundle", *map(str, arguments)])


def asked(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def moved(path: Path, program_id: str, file: Path) -> dict[str, np.ndarray]:
    """Write tensors of `program_id` that predict otherwise than the bundle's own, as a gateway does."""
    draw = np.random.default_rng(5)
    with Bundle.open(path) as bundle:
        start = bundle.initial(bundle.program(program_id))
    tensors = {name: draw.normal(size=value.shape).astype(np.float32) for name, value in start.items()}
    file.write_bytes(pack(tensors))
    return tensors


def test_show_tells_what_a_bundle_holds(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = asked(capsys, "show", path)
    with Bundle.open(path) as bundle:
        assert content["digest"] == bundle.digest
    assert content["bytes"] == path.stat().st_size
    assert (content["name"], content["signed"]) == ("tiny", False)
    assert content["classes"] == ["left", "middle", "right"]
    assert content["fields"][1] == {"name": "d.y", "dtype": "int64", "shape": [], "classes": CLASSES}
    programs = {row["id"]: row for row in content["programs"]}
    assert programs[LORA] == {
        "id": LORA,
        "scope": "lora",
        "precision": "float",
        "rank": 2,
        "parameters": 2 * 4 + 3 * 2,
        "bytes_up": None,
        "bytes_down": None,
        "proof": None,
    }
    assert programs["tiny/evaluate/head/float"]["parameters"] == 0


def test_show_prints_cost_and_proof_as_the_exporter_wrote_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from export import ProgramSpec, build_bundle
    from tests.export.models import example, net

    report = build_bundle(
        net("mlp"),
        example("mlp"),
        tmp_path / "net.bundle",
        name="net",
        loss="cross_entropy",
        programs=[ProgramSpec("head")],
        release_key=SigningKey.generate(tmp_path / "release.key"),
    )
    entry = report.programs[0]
    assert run("show", report.path) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith(entry.id))
    assert f"bytes, signed\ndigest  {report.digest}\n" in shown
    assert line.split()[:5] == [entry.id, "head", "int8", "-", str(entry.parameters)]
    assert line.endswith(f"torch, {entry.proof.max_relative_error:.1e}")
    with Bundle.open(report.path) as bundle:
        blob = len(bundle.start_blob(bundle.program(entry.id)))
    assert line.split()[5:7] == [str(blob), str(blob)]


def test_a_whole_bundle_is_verified_and_its_signer_named_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = SigningKey.generate(tmp_path / "release.key")
    key.verify_key.save(tmp_path / "release.pub")
    path = tiny_bundle(tmp_path / "tiny.bundle", release_key=key)
    content = asked(capsys, "verify", path)
    assert (content["files"], content["signed"], content["signature_checked"]) == (7, True, False)
    assert asked(capsys, "verify", path, "--release-key", tmp_path / "release.pub")["signature_checked"]
    assert run("verify", path) == 0
    assert "the signature was not checked: give --release-key" in capsys.readouterr().out


def test_a_changed_byte_is_found_and_told_in_one_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = path.read_bytes()
    for position in (len(content) // 3, len(content) // 2, 2 * len(content) // 3):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.with_name("damaged.bundle").write_bytes(damaged)
        assert run("verify", path.with_name("damaged.bundle")) == 3
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"edgewise: {path.with_name('damaged.bundle')}: ")
        assert err.count("\n") == 1


@pytest.mark.parametrize("signed", [False, True], ids=["not signed", "signed by another key"])
def test_a_wrong_signature_is_refused_with_5(tmp_path: Path, capsys: pytest.CaptureFixture[str], signed: bool) -> None:
    SigningKey.generate(tmp_path / "release.key").verify_key.save(tmp_path / "release.pub")
    other = SigningKey.generate(tmp_path / "other.key")
    path = tiny_bundle(tmp_path / "tiny.bundle", release_key=other if signed else None)
    assert run("verify", path, "--release-key", tmp_path / "release.pub") == 5
    assert ("not one of the pinned release key" if signed else "is not signed") in capsys.readouterr().err


@pytest.mark.parametrize("program_id", [HEAD, LORA])
def test_predict_picks_the_program_whose_tensors_the_model_holds(
    path: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], program_id: str
) -> None:
    tensors = moved(path, program_id, tmp_path / "model.safetensors")
    content = asked(
        capsys,
        *("predict", path, "--input", samples),
        *("--model", tmp_path / "model.safetensors", "--output", tmp_path / "y"),
    )
    with Bundle.open(path) as bundle:
        expected = np.asarray(Predictor(bundle, bundle.program(program_id), tensors).predict(np.load(samples)))
    assert content["program"] == program_id
    assert content["labels"] == expected.argmax(axis=1).tolist()
    assert content["classes"] == [("left", "middle", "right")[label] for label in content["labels"]]
    assert len(set(content["labels"])) > 1
    np.testing.assert_array_equal(np.load(tmp_path / "y"), expected)


def test_without_a_model_the_bundle_predicts_with_its_own_tensors(
    path: Path, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Bundle.open(path) as bundle:
        program = bundle.program(LORA)
        expected = np.asarray(Predictor(bundle, program, bundle.initial(program)).predict(np.load(samples)))
    assert run("predict", path, "--input", samples, "--program", LORA) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"program {LORA}, 20 samples"
    names = ("left", "middle", "right")
    assert lines[1:] == [f"{index}: {label} {names[label]}" for index, label in enumerate(expected.argmax(axis=1))]


def test_one_sample_and_another_byte_order_are_read_as_what_they_are(
    path: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = np.load(samples)
    labels = asked(capsys, "predict", path, "--input", samples)["labels"]
    swapped = saved(tmp_path / "swapped.npy", x.astype(">f4"))
    assert asked(capsys, "predict", path, "--input", swapped)["labels"] == labels
    one = saved(tmp_path / "one.npy", x[3])
    assert asked(capsys, "predict", path, "--input", one)["labels"] == [labels[3]]


def test_what_is_no_classifier_is_summed_up(tmp_path: Path, samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    regression = [
        {"name": "d.x", "dtype": "float32", "shape": [4]},
        {"name": "d.y", "dtype": "float32", "shape": [CLASSES]},
    ]
    path = tiny_bundle(tmp_path / "tiny.bundle", fields=regression, classes=None)
    assert run("predict", path, "--input", samples) == 0
    assert "y.0: float32 [20, 3], " in capsys.readouterr().out
    content = asked(capsys, "predict", path, "--input", samples)
    assert content["outputs"] == {"y.0": {"dtype": "float32", "shape": [20, 3]}}
    assert "labels" not in content


def test_bad_input_is_one_line_that_names_the_file(
    path: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = tiny_data(20)[0]
    other = tiny_bundle(tmp_path / "wide.bundle", features=6)
    moved(other, HEAD, tmp_path / "other.safetensors")
    moved(path, LORA, tmp_path / "lora.safetensors")
    (tmp_path / "text.npy").write_text("1 2 3\n")
    (tmp_path / "cut.npy").write_bytes(samples.read_bytes()[:-8])
    np.savez(tmp_path / "two.npz", x=x)
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 64)
    (tmp_path / "large.safetensors").write_bytes(bytes(100_000))
    with_model = ["--input", samples, "--model"]
    cases: list[tuple[list[object], int, str]] = [
        (["--input", tmp_path / "none.npy"], 3, "none.npy: cannot be read"),
        (["--input", tmp_path / "text.npy"], 3, "text.npy: not a .npy file"),
        (["--input", tmp_path / "cut.npy"], 3, "cut.npy: not a .npy file"),
        (["--input", tmp_path / "two.npz"], 3, "two.npz: an archive of arrays"),
        (["--input", saved(tmp_path / "wide.npy", x.astype(np.float64))], 3, "wide.npy: d.x has dtype float64"),
        (["--input", saved(tmp_path / "thin.npy", x[:, :2])], 3, "thin.npy: d.x has shape [20, 2]"),
        (["--input", saved(tmp_path / "nan.npy", x * np.float32("nan"))], 3, "nan.npy: d.x of sample 0 holds NaN"),
        (["--input", samples, "--program", "tiny"], 3, "has no program 'tiny'"),
        (["--input", samples, "--program", "tiny/evaluate/head/float"], 3, "cannot predict"),
        ([*with_model, tmp_path / "none.safetensors"], 3, "none.safetensors: cannot be read"),
        ([*with_model, tmp_path / "noise.safetensors"], 3, "noise.safetensors: not a file of tensors"),
        ([*with_model, tmp_path / "large.safetensors"], 3, "large.safetensors: has 100000 bytes"),
        ([*with_model, tmp_path / "other.safetensors"], 3, "bias float32 [3], weight float32 [3, 6], expected"),
        ([*with_model, tmp_path / "lora.safetensors", "--program", HEAD], 3, f"expected those of {HEAD}: weight"),
        (["--input", samples, "--output", tmp_path / "no" / "y.npy"], 4, "y.npy: cannot be written"),
    ]
    for arguments, code, message in cases:
        assert run("predict", path, *arguments) == code, message
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert message in err


def test_the_command_runs_as_a_process_and_loads_no_runtime_to_look(path: Path) -> None:
    code = (
        "import sys; from edge_sdk.cli import main\n"
        f"code = main(['bundle', 'verify', {str(path)!r}])\n"
        "sys.exit(code or ('onnxruntime' in sys.modules and 'onnxruntime was loaded'))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert "good: 7 files as the manifest says, not signed" in result.stdout
