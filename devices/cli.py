"""`edgewise devices ...`: keys, the registry, and a site's certificates.

`keygen`, `add` and `list --registry` suffice for devices on one machine without TLS. `init-ca`, `enroll`, `revoke`, `renew`
and `list --ca` keep a site whose every connection is mutual TLS; `request` is for a device that makes its own keys.
`probe` runs on a device and measures the programs of a bundle there.

Exit codes: 0 done; 3 a wrong id, file or key; 4 the broker does not answer; 5 the broker refuses, and what was begun is undone.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devices.device_folder import DeviceFolder, Settings
from devices.registry import Entry, Registry, RegistryError, check_id
from edge_sdk.keys import SigningKey

if TYPE_CHECKING:
    from devices.enroll import Result


def register(parser: argparse.ArgumentParser) -> None:
    """Add the commands."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    keygen = commands.add_parser("keygen", help="make the control key and the release key of a site")
    keygen.add_argument("folder", type=Path)
    keygen.set_defaults(run=_keygen)
    add = commands.add_parser("add", help="make a device's key and its device.toml, and enter it in the registry")
    add.add_argument("id")
    add.add_argument("--registry", type=Path, required=True, help="the registry file; made when it is missing")
    add.add_argument("--site", required=True)
    add.add_argument("--broker", required=True, help="for instance mqtt://127.0.0.1:18830")
    add.add_argument("--out", type=Path, required=True, help="folder for what the device needs")
    add.set_defaults(run=_add)
    show = commands.add_parser("list", help="the devices of a registry, or of a site with their certificates")
    source = show.add_mutually_exclusive_group(required=True)
    source.add_argument("--registry", type=Path)
    source.add_argument("--ca", type=Path, help="the folder that init-ca made")
    show.set_defaults(run=_list)
    init = commands.add_parser("init-ca", help="make a site's certificate authority and its gateway's identities")
    init.add_argument("ca", type=Path, metavar="FOLDER")
    init.add_argument("--site", required=True)
    init.add_argument("--prefix", default="", help="topic levels above Edgewise's own, as in the job file")
    init.add_argument("--broker", required=True, help="as devices reach it, for instance mqtts://gateway.local:8883")
    init.add_argument("--host", action="append", default=[], help="a further name or address of the gateway")
    init.set_defaults(run=_init_ca)
    ask = commands.add_parser("request", help="on a device: make its keys and a certificate request")
    ask.add_argument("id")
    ask.add_argument("--out", type=Path, required=True)
    ask.set_defaults(run=_request)
    enroll = commands.add_parser("enroll", help="admit a device: certificate, role at the broker, registry")
    enroll.add_argument("id")
    enroll.add_argument("--ca", type=Path, required=True, help="the folder that init-ca made")
    enroll.add_argument("--out", type=Path, help="folder for what the device needs (default: devices/ID in it)")
    enroll.add_argument("--csr", type=Path, help="the device's own request; give --public-key as well")
    enroll.add_argument("--public-key", type=Path, help="the public key that belongs to the device's offers")
    enroll.set_defaults(run=_enroll)
    for command in (add, enroll):
        command.add_argument("--job", required=True)
        command.add_argument(
            "--bundle", required=True, help="the bundle: copied if it is a file here, else as the device will find it"
        )
        command.add_argument("--control-key", type=Path, required=True, help="the gateway's public control key")
        command.add_argument("--owner", default="", help="whose device it is (default: its id)")
        command.add_argument("--profile", default="")
    measure = commands.add_parser(
        "probe", help="on a device: measure every program of a bundle, and what the device is"
    )
    measure.add_argument("bundle", type=Path, metavar="BUNDLE")
    measure.add_argument("--runs", type=int, default=20, help="of each program, after 5 that warm up")
    measure.add_argument(
        "--write", type=Path, metavar="PROFILE.toml", help="write what was measured as a device profile"
    )
    measure.add_argument("--name", default="measured", help="of the profile that is written")
    measure.add_argument("--json", action="store_true", help="print JSON")
    measure.set_defaults(run=_probe)
    revoke = commands.add_parser("revoke", help="shut a device out for good")
    revoke.add_argument("id")
    revoke.add_argument("--ca", type=Path, required=True)
    revoke.add_argument(
        "--discard-round", action="store_true", help="what it gave to the round that is open does not count either"
    )
    revoke.set_defaults(run=_revoke)
    renew = commands.add_parser("renew", help="a new certificate for a device, or for server, aggregator or enroller")
    renew.add_argument("id")
    renew.add_argument("--ca", type=Path, required=True)
    renew.add_argument("--out", type=Path, help="the device's folder (default: devices/ID in the CA's)")
    renew.add_argument("--now", action="store_true", help="also before two thirds of its life are over")
    renew.add_argument("--new-key", action="store_true", help="with a new private key")
    renew.add_argument("--replace", action="store_true", help="the former certificates are revoked")
    renew.add_argument("--csr", type=Path, help="the device's own request, for a key that is not here")
    renew.set_defaults(run=_renew)
    for command in (keygen, add, show, init, ask, enroll, revoke, renew):
        command.add_argument("--json", action="store_true", help="print JSON")


def make_keys(folder: Path) -> dict[str, Path]:
    """Make `control` and `release` key pairs in `folder`: `<name>.key` (private, 0600) and `<name>.pub`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RegistryError(f"{folder}: the folder cannot be made ({error.strerror})") from error
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


def _settings(args: argparse.Namespace, site: str, broker: str, prefix: str = "") -> Settings:
    settings = Settings(site, args.job, broker, args.bundle, args.control_key, prefix)
    settings.check()
    return settings


def _add(args: argparse.Namespace) -> int:
    check_id(args.id)  # all of it before a key is made
    settings = _settings(args, args.site, args.broker)
    if not args.registry.parent.is_dir():
        raise RegistryError(f"{args.registry}: its folder does not exist")
    registry = Registry.load(args.registry) if args.registry.exists() else Registry()
    registry.add(Entry(args.id, "", args.profile, args.owner or args.id))
    files = DeviceFolder(args.out, args.id)
    files.make()
    key = files.signing_key()
    registry.entries[args.id] = Entry(args.id, key.text, args.profile, args.owner or args.id)
    values = files.write(settings)
    registry.save(args.registry)
    text = f"{args.out / 'device.toml'}: device {args.id} of {args.site}/{args.job}"
    print(json.dumps(values) if args.json else text)
    return 0


def _list(args: argparse.Namespace) -> int:
    registry = Registry.load(args.registry or args.ca / "devices.json")
    rows = [asdict(registry.entries[name]) for name in registry.ids]
    if args.ca is not None:
        rows = _with_certificates(args.ca, rows)
    if args.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        text = f"{row['id']}  owner {row['owner']}  key {row['key'][:12]}..." if "owner" in row else str(row["id"])
        if "certificate_ends" in row:
            text += f"  certificate ends {row['certificate_ends'] or '-'}{'  renewal is due' if row['due'] else ''}"
        print(text + ("  revoked" if row.get("revoked") else ""))
    return 0


def _with_certificates(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the end of each certificate, after those of the gateway's own identities."""
    import datetime as dt

    from devices.authority import OWN, Authority

    authority, now = Authority(folder), dt.datetime.now(dt.UTC)
    told = []
    for row in [*({"id": name} for name in OWN), *rows]:
        issued = authority.issued(str(row["id"]))
        ends = issued[-1].ends.isoformat(timespec="minutes") if issued else ""
        told.append({**row, "certificate_ends": ends, "due": bool(issued) and issued[-1].due <= now})
    return told


def _init_ca(args: argparse.Namespace) -> int:
    from devices.authority import Authority, Site

    site = Site.at(args.site, args.broker, prefix=args.prefix, hosts=args.host)
    folder = Authority.create(args.ca, site).folder
    values = {"gateway": str(folder.gateway), "registry": str(folder.registry), "authority": str(folder.authority)}
    text = "\n".join(
        [
            f"security.folder of the job file: {folder.gateway}",
            f"devices.registry of the job file: {folder.registry}",
            f"keep {folder.authority / 'ca.key'} safe: whoever has it can admit anybody",
        ]
    )
    print(json.dumps(values) if args.json else text)
    return 0


def _request(args: argparse.Namespace) -> int:
    from devices.enroll import request

    made = request(args.id, args.out)
    values = {"csr": str(made.csr), "public_key": str(made.public_key)}
    print(json.dumps(values) if args.json else f"{made.csr} and {made.public_key}: for `edgewise devices enroll`")
    return 0


def _enroll(args: argparse.Namespace) -> int:
    from devices.authority import Authority
    from devices.enroll import EnrolError, Request, enroll

    if (args.csr is None) is not (args.public_key is None):
        raise EnrolError("--csr and --public-key belong together: `edgewise devices request` makes both")
    made = None if args.csr is None else Request(args.csr, args.public_key)
    authority = Authority(args.ca)
    site, folder = authority.site, args.out or args.ca / "devices" / args.id
    settings = _settings(args, site.site, site.broker, site.prefix)
    result = enroll(authority, args.id, folder, settings, owner=args.owner, profile=args.profile, made=made)
    return _tell(args, result, f"{folder}: what {args.id} needs")


def _revoke(args: argparse.Namespace) -> int:
    from devices.authority import Authority
    from devices.enroll import revoke

    result = revoke(Authority(args.ca), args.id, discard_round=args.discard_round)
    return _tell(args, result, f"{args.id} is shut out")


def _renew(args: argparse.Namespace) -> int:
    from devices.authority import OWN, Authority
    from devices.enroll import renew

    folder = args.out or (None if args.id in OWN else args.ca / "devices" / args.id)
    issued = renew(
        Authority(args.ca),
        args.id,
        folder,
        early=args.now,
        new_key=args.new_key,
        replaces=args.replace,
        csr=args.csr,
    )
    if args.json:
        print(json.dumps({"id": args.id, "ends": None if issued is None else issued.ends.isoformat()}))
    else:
        print(f"{args.id}: not due yet (--now)" if issued is None else f"{args.id}: ends {issued.ends.isoformat()}")
    return 0


def _tell(args: argparse.Namespace, result: Result, text: str) -> int:
    if args.json:
        print(json.dumps({**asdict(result.operation), "confirmed": result.confirmed}))
    else:
        print(text if result.confirmed else f"{text}; no broker runs yet: it will know of it when the gateway starts")
    return 0


def _probe(args: argparse.Namespace) -> int:
    from devices.bench import as_profile, probe
    from edge_sdk.bundle import Bundle

    with Bundle.open(args.bundle) as bundle:
        found = probe(bundle, runs=args.runs)
    if args.write is not None:
        args.write.write_text(as_profile(found, args.name))
    if args.json:
        print(json.dumps(found.to_json()))
        return 0
    print(f"{found.machine}, {found.arch}, {found.cores} cores, {found.ram_mb} MB; onnxruntime {found.onnxruntime}")
    print(f"a process with the runtime and no model takes {found.runtime_overhead_mb:.1f} MB")
    for times in found.programs:
        predicts = "" if times.predict_ms is None else f", a prediction {times.predict_ms:.3f} ms"
        print(f"  {times.program}: a step of {times.batch} samples takes {times.step_ms:.3f} ms of CPU time{predicts}")
    return 0
