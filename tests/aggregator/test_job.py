"""A job file is read strictly and checked against its bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from aggregator.job import JobError, check_against, load_job, render_reference
from aggregator.journal import read_status
from edge_sdk.bundle import Bundle
from edge_sdk.cli import main
from edge_sdk.errors import BundleError
from tests.tiny_bundle import HEAD, LORA, tiny_bundle

CHECKOUT = Path(__file__).resolve().parents[2]
JOB = f"""
site = "bremen"
job = "watch"
bundle = "tiny.bundle"
program = "{LORA}"
rounds = 3
[keys]
control = "control.key"
[devices]
registry = "devices.json"
[task]
steps = 30
learning_rate = 0.01
[merge]
rule = "product_svd"
"""


def written(tmp_path: Path, text: str = JOB) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(text)
    return path


def test_a_job_file_gives_its_values_and_the_defaults(tmp_path: Path) -> None:
    job = load_job(written(tmp_path))
    assert (job.site, job.rounds, job.task.steps, job.task.encoding) == ("bremen", 3, 30, "int8_row")
    assert job.bundle == tmp_path / "tiny.bundle"
    assert job.state == tmp_path / "state"
    assert job.round.quorum is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rounds = 3", "rounds = 3\nround = 4", "round"),
        ("rounds = 3", 'rounds = "3"', "rounds = '3' must be a whole number"),
        ("rounds = 3", "rounds = true", "rounds = True must be a whole number"),
        ("rounds = 3", "rounds = 0", "rounds = 0 must be above 0"),
        ("rounds = 3", "", "the key 'rounds' is missing"),
        ('site = "bremen"', 'site = "Bremen"', "site = 'Bremen' must be 1 to 32 lower-case"),
        ("[task]", "[broker]\nport = 70000\n[task]", "broker.port = 70000 must be from 0 to 65535"),
        ("steps = 30", "step = 30", "unknown key 'task.step'; did you mean 'task.steps'?"),
        ("steps = 30", "steps = 30\nepochs = 2", "either task.steps or task.epochs"),
        ("learning_rate = 0.01", "learning_rate = nan", "must be a number"),
        ("steps = 30", 'steps = 30\nencoding = "int2"', "one of float32, float16, int8_row, int4_row, top_k"),
        ("[task]", "[round]\nquorum = 1\nminimum = 2\n[task]", "round.quorum = 1 is below round.minimum = 2"),
        ("rounds = 3", "rounds =", "not a TOML file"),
    ],
)
def test_a_wrong_job_file_is_refused_by_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(JobError, match="job.toml: ") as caught:
        load_job(written(tmp_path, JOB.replace(old, new)))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        (LORA, "tiny/full", BundleError, f"no program 'tiny/full'; it has .*{HEAD}"),
        (LORA, HEAD, JobError, "merge.rule: .* has none: use rule"),
        (LORA, "tiny/evaluate/head/float", JobError, "only accumulates"),
        ("product_svd", "middle", JobError, "merge.rule: .*there are .*product_svd"),
        ('"product_svd"', '"mean"\nlora = { rank = 1 }', JobError, "merge.lora.rank: the rule .* does not use it"),
        ('"product_svd"', '"product_svd"\nserver = { optimizer = "adam" }', JobError, "changes the basis"),
        ('"product_svd"', '"stack"', JobError, "merge.rule: .*no side term"),
        ('"product_svd"', '"freeze_a"', JobError, "merge.rule: .* needs programs with factors 'b'"),
        ("[merge]", "[assign]\ncycle = ['x']\n[merge]", BundleError, "no program 'x'"),
        ("learning_rate = 0.01", "learning_rate = 99.0", JobError, "task.learning_rate = 99 is outside 0 to 10"),
        ("steps = 30", "steps = 30\nhyper = { beta = 1.0 }", JobError, "task.hyper.beta: .* has only lr, weight_decay"),
    ],
)
def test_a_job_that_does_not_fit_its_bundle_is_refused(
    tmp_path: Path, old: str, new: str, error: type[Exception], message: str
) -> None:
    job = load_job(written(tmp_path, JOB.replace(old, new)))
    with Bundle.open(tiny_bundle(tmp_path / "tiny.bundle")) as bundle, pytest.raises(error, match=message) as caught:
        check_against(job, bundle)
    assert error is not JobError or str(caught.value).startswith(f"{job.file}: ")


def test_a_job_that_fits_passes(tmp_path: Path) -> None:
    with Bundle.open(tiny_bundle(tmp_path / "tiny.bundle")) as bundle:
        check_against(load_job(written(tmp_path)), bundle)


def test_the_reference_is_in_step_with_the_keys() -> None:
    assert (CHECKOUT / "docs" / "job-file.md").read_text() == render_reference()


def test_a_job_that_never_ran_has_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path)
    assert read_status(load_job(path)).state == "new"
    assert main(["job", "status", str(path)]) == 0
    assert "bremen/watch: new, round 0 of 3" in capsys.readouterr().out


def test_an_error_is_one_line_and_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["job", "keys", str(written(tmp_path, JOB.replace("rounds", "round")))]) == 3
    assert capsys.readouterr().err.count("\n") == 1
