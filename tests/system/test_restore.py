"""A gateway whose machine is lost goes on from its backup (docs/operations.md)."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

from edge_sdk import EdgeDevice
from tests.system.site import Site, until


def test_a_restored_gateway_trains_every_round_after_its_backup_once_more(tmp_path: Path) -> None:
    """The devices have answered the rounds that the backup does not know of; no deadline passes in this test."""
    site = Site(tmp_path, ["a", "b"], tls=True, job={"rounds": 4, "round.deadline_seconds": 60})
    backup = tmp_path.parent / f"{tmp_path.name}-backup"
    with ExitStack() as stack:
        devices = [stack.enter_context(EdgeDevice.open(site.config(name))) for name in site.ids]
        for device in devices:
            device.start()
        with site.service() as running:
            until(lambda: site.status().round >= 2)
            running.service.stop()
            assert running.wait().state == "stopped"
        saved = site.status()
        shutil.copytree(tmp_path / "state", backup / "state")
        shutil.copytree(tmp_path / "security", backup / "security")
        with site.service() as running:  # and on for a while, of which the backup knows nothing
            until(lambda: site.status().round > saved.round)
            running.service.stop()
            running.wait()
        for name in ("state", "security"):
            shutil.rmtree(tmp_path / name)
            shutil.copytree(backup / name, tmp_path / name)
        assert site.status().round == saved.round
        with site.service() as running:
            status = running.wait(35)
        until(lambda: all(device.status().model == status.model for device in devices))
        assert [device.status().outbox_entries for device in devices] == [0, 0]
    assert status.state == "done"
    assert status.duplicated == 0
    # The phase that was open in the backup may have been answered since: its tasks are declined, and its round does not count.
    outcomes = {record.round: record.outcome for record in status.history if record.round != saved.round}
    assert list(outcomes.values()) == ["measured", *["accepted"] * (len(outcomes) - 1)]
    assert max(outcomes) == 4 + status.uncounted
