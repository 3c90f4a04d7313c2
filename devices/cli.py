"""`edgewise devices keygen|add|list`: keys, and the registry of devices.

Exit codes: 0 done; 3 a wrong id, file or key.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from devices.registry import Entry, Registry
from edge_sdk.keys import SigningKey


def register(parser: argparse.ArgumentParser) -> None:
    """Add `keygen`, `add` and `list`."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    keygen = commands.add_parser("keygen", help="make the control key and the release key of a site")
    keygen.add_argument("folder", type=Path)
    keygen.set_defaults(run=_keygen)
    add = commands.add_parser("add", help="make a device's key and its device.toml, and enter it in the registry")
    add.add_argument("id")
    add.add_argument("--registry", type=Path, required=True, help="the registry file; made when it is missing")
    add.add_argument("--out", type=Path, required=True, help="folder for what the device needs")
    add.add_argument("--site", required=True)
    add.add_argument("--job", required=True)
    add.add_argument("--broker", required=True, help="for instance mqtt://127.0.0.1:18830")
    add.add_argument("--bundle", required=True, help="the bundle, as the device will find it")
    add.add_argument("--control-key", type=Path, required=True, help="the gateway's public control key")
    add.add_argument("--owner", default="", help="whose device it is (default: its id)")
    add.add_argument("--profile", default="")
    add.set_defaults(run=_add)
    show = commands.add_parser("list", help="the devices of a registry")
    show.add_argument("--registry", type=Path, required=True)
    show.set_defaults(run=_list)
    for command in (keygen, add, show):
        command.add_argument("--json", action="store_true", help="print JSON")


def make_keys(folder: Path) -> dict[str, Path]:
    """Make `control` and `release` key pairs in `folder`: `<name>.key` (private, 0600) and `<name>.pub`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for name in ("control", "release"):
        private, public = folder / f"{name}.key", folder / f"{name}.pub"
        SigningKey.generate(private).verify_key.save(public)
        paths |= {f"{name}_key": private, f"{name}_public": public}
    return paths


def _keygen(args: argparse.Namespace) -> int:
    paths = {name: str(path) for name, path in make_keys(args.folder).items()}
    print(json.dumps(paths) if args.json else "\n".join(f"{name}: {path}" for name, path in paths.items()))
    return 0


def _add(args: argparse.Namespace) -> int:
    registry = Registry.load(args.registry) if args.registry.exists() else Registry()
    registry.add(Entry(args.id, "", args.profile, args.owner or args.id))  # refuses a wrong id before a key is made
    args.out.mkdir(parents=True, exist_ok=True)
    key = SigningKey.generate(args.out / f"{args.id}.key").verify_key
    registry.entries[args.id] = Entry(args.id, key.text, args.profile, args.owner or args.id)
    values = {
        "id": args.id,
        "site": args.site,
        "job": args.job,
        "broker": args.broker,
        "bundle": args.bundle,
        "store": "store",
        "device_key": f"{args.id}.key",
        "control_key": "control.pub",
    }
    (args.out / "control.pub").write_bytes(args.control_key.read_bytes())
    # A JSON string is a TOML basic string.
    (args.out / "device.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
    registry.save(args.registry)
    print(
        json.dumps(values) if args.json else f"{args.out / 'device.toml'}: device {args.id} of {args.site}/{args.job}"
    )
    return 0


def _list(args: argparse.Namespace) -> int:
    registry = Registry.load(args.registry)
    entries = [registry.entries[name] for name in registry.ids]
    if args.json:
        print(json.dumps([asdict(entry) for entry in entries]))
    else:
        for entry in entries:
            print(f"{entry.id}  owner {entry.owner}  key {entry.key[:12]}...{'  revoked' if entry.revoked else ''}")
    return 0
