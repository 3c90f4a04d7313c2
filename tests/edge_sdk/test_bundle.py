"""A bundle is opened whole and unchanged, or not at all."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.bundle import SIGNED_PREFIX, Bundle
from edge_sdk.errors import BundleError
from edge_sdk.keys import SigningKey
from edge_sdk.tensors import unpack
from tests.tiny_bundle import HEAD, LORA, tiny_bundle


def test_a_bundle_tells_its_programs_tensors_and_fields(bundle: Bundle) -> None:
    assert set(bundle.programs) == {HEAD, LORA, "tiny/evaluate/head/float", "tiny/evaluate/lora/r2/float"}
    program = bundle.program(LORA)
    assert program.tensors == ("layer.lora_a", "layer.lora_b")
    assert bundle.tensors["layer.lora_a"].scale == 2.0
    assert [field.name for field in bundle.fields] == ["d.x", "d.y"]


def test_the_start_blob_holds_the_initial_tensors(bundle: Bundle) -> None:
    program = bundle.program(LORA)
    stored, _ = unpack(bundle.start_blob(program))
    for name, value in bundle.initial(program).items():
        np.testing.assert_array_equal(stored[name], value)


def test_equal_bundles_are_equal_bytes(tmp_path: Path) -> None:
    first, second = tiny_bundle(tmp_path / "a.bundle"), tiny_bundle(tmp_path / "b.bundle")
    assert first.read_bytes() == second.read_bytes()


def test_closing_removes_the_unpacked_files(tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle(tmp_path / "tiny.bundle"))
    assert bundle.directory.is_dir()
    bundle.close()
    assert not bundle.directory.exists()


def test_an_unpacked_bundle_is_used_again_and_repaired_when_a_byte_changed(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / "tiny.bundle")
    graph = Bundle.open(path, unpack_to=tmp_path / "kept").file("head_step.onnx")
    content = graph.read_bytes()
    graph.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert Bundle.open(path, unpack_to=tmp_path / "kept").file("head_step.onnx").read_bytes() == content


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_bundle_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    path = tiny_bundle(tmp_path / "tiny.bundle")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(BundleError, match=r"tiny\.bundle: .*(cut short|damaged)"):
        Bundle.open(path)


def test_a_changed_byte_anywhere_is_refused_or_changes_no_content(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / "tiny.bundle")
    content = path.read_bytes()
    with Bundle.open(path) as bundle:
        expected = bundle.digest
    refused = 0
    for position in range(0, len(content), 97):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :])
        try:
            with Bundle.open(path) as bundle:
                assert bundle.digest == expected  # a time stamp or an attribute of the archive: not content
        except BundleError:
            refused += 1
    assert refused > 0.8 * len(range(0, len(content), 97))


def test_a_bundle_of_a_newer_format_is_refused_with_both_numbers(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / "tiny.bundle", format=2)
    with pytest.raises(BundleError, match="has bundle format 2, this Edgewise reads format 1: upgrade"):
        Bundle.open(path)


def test_an_unknown_program_is_refused_with_the_ids_that_exist(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=f"no program 'tiny/full'; it has .*{HEAD}"):
        bundle.program("tiny/full")


@pytest.mark.parametrize("name", ["../evil.onnx", "/etc/passwd", "a/b.onnx"])
def test_a_member_with_a_path_is_refused(tmp_path: Path, name: str) -> None:
    path = tiny_bundle(tmp_path / "tiny.bundle")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(BundleError, match="which no bundle has"):
        Bundle.open(path)


def test_a_member_that_the_manifest_does_not_name_is_refused(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / "tiny.bundle")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("extra.onnx", b"x")
    with pytest.raises(BundleError, match=r"extra\.onnx is not named by manifest\.json"):
        Bundle.open(path)


def test_a_signed_bundle_opens_with_its_key_only(tmp_path: Path) -> None:
    release, other = (
        SigningKey.generate(tmp_path / "release.key"),
        SigningKey.generate(tmp_path / "other.key"),
    )
    path = tiny_bundle(tmp_path / "tiny.bundle", release_key=release)
    Bundle.open(path, release_key=release.verify_key).close()
    with pytest.raises(BundleError, match="signature is not one of the pinned release key"):
        Bundle.open(path, release_key=other.verify_key)


def test_an_unsigned_bundle_is_refused_where_a_key_is_pinned(tmp_path: Path) -> None:
    release = SigningKey.generate(tmp_path / "release.key")
    with pytest.raises(BundleError, match="is not signed"):
        Bundle.open(tiny_bundle(tmp_path / "tiny.bundle"), release_key=release.verify_key)


def test_what_is_signed_is_the_manifest_under_its_own_prefix(tmp_path: Path) -> None:
    release = SigningKey.generate(tmp_path / "release.key")
    path = tiny_bundle(tmp_path / "tiny.bundle", release_key=release)
    with zipfile.ZipFile(path) as archive:
        import base64

        signature, manifest = base64.b64decode(archive.read("manifest.sig")), archive.read("manifest.json")
    assert release.verify_key.verify(signature, SIGNED_PREFIX + manifest)
    assert json.loads(manifest)["format"] == 1


def test_class_names_must_be_as_many_as_there_are_classes(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / "tiny.bundle", classes=["left", "right"])
    with pytest.raises(BundleError, match=r"classes in manifest\.json .* expected 3 names, as d\.y has classes"):
        Bundle.open(path)
