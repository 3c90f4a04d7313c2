"""`edgewise export build SPEC -o model.bundle`, `quantize SPEC -o model.onnx`, `check MODEL --train GLOB`; and what was
trained, out of a bundle again: `merge` into the float weights, `peft` as an adapter, `rebase` into a new bundle.

Exit codes: 0 written, or it can train; 3 the specification or the model is wrong, or it cannot train; 5 the proof of a
step graph failed; 6 a gate of the quantized model failed (docs/quantization.md). Nothing is written but with 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from edge_sdk.keys import SigningKey


def register(parser: argparse.ArgumentParser) -> None:
    """Add `build`, `quantize`, `check`, `merge`, `peft` and `rebase`."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    build = commands.add_parser("build", help="make a bundle from a model, a loss and an example batch")
    build.add_argument(
        "spec", type=Path, metavar="SPEC", help="the export specification (TOML; export/spec.py explains its keys)"
    )
    build.add_argument("-o", "--output", type=Path, required=True, help="the bundle to write")
    build.add_argument("--key", type=Path, help="the private release key that signs it")
    build.add_argument("--json", action="store_true", help="print the report as JSON")
    build.set_defaults(run=_build)
    quantize = commands.add_parser("quantize", help="make an integer ONNX file of a model, if it passes the gates")
    quantize.add_argument("spec", type=Path, metavar="SPEC", help="the export specification; its [deploy] says how")
    quantize.add_argument("-o", "--output", type=Path, required=True, help="the ONNX file to write")
    quantize.add_argument("--bits", type=int, help="of weights, 2 to 8")
    quantize.add_argument("--allow", action="append", default=[], metavar="GATE", help="a gate that may fail")
    quantize.add_argument("--json", action="store_true", help="print the report as JSON")
    quantize.set_defaults(run=_quantize)
    check = commands.add_parser(
        "check", help="say whether an ONNX model can train, at what cost, or what is in the way"
    )
    check.add_argument("model", type=Path, metavar="MODEL", help="an ONNX file")
    check.add_argument("--train", required=True, metavar="GLOB,...", help="patterns of the tensors that shall train")
    check.add_argument("--loss", help="cross_entropy or mse; by default what suits the output")
    check.add_argument("--json", action="store_true", help="print the answer as JSON")
    check.set_defaults(run=_check)
    merge = commands.add_parser("merge", help="add trained adapters to the float weights they were trained over")
    merge.add_argument("-o", "--output", type=Path, required=True, help="the safetensors file to write")
    merge.set_defaults(run=_merge)
    peft = commands.add_parser("peft", help="write trained adapters in the format of the PEFT library")
    peft.add_argument("-o", "--output", type=Path, required=True, help="the folder to write")
    peft.add_argument("--base-model", default="", metavar="NAME", help="what the adapter's settings call its base")
    peft.set_defaults(run=_peft)
    rebase = commands.add_parser("rebase", help="build a bundle anew over weights that hold what was trained")
    rebase.add_argument("spec", type=Path, metavar="SPEC", help="the specification that the bundle was built from")
    rebase.add_argument("-o", "--output", type=Path, required=True, help="the new bundle to write")
    rebase.add_argument(
        "-w",
        "--weights",
        type=Path,
        required=True,
        help="the new float weights to write, for the specification's `weights`",
    )
    rebase.add_argument("--key", type=Path, help="the private release key that signs it")
    rebase.set_defaults(run=_rebase)
    for command in (merge, peft, rebase):
        command.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle that was trained")
        command.add_argument(
            "--model", type=Path, required=True, help="the gateway's model.safetensors, or any of its shape"
        )
    for command in (merge, peft):
        command.add_argument(
            "--master", type=Path, required=True, help="the float weights of the torch module (safetensors)"
        )


def _build(args: argparse.Namespace) -> int:
    from export.spec import build_spec, load_spec

    key = SigningKey.load(args.key) if args.key else None
    spec = load_spec(args.spec)
    report = build_spec(
        spec, args.output, release_key=key, on_progress=lambda text: print(text, file=sys.stderr, flush=True)
    )
    if args.json:
        print(json.dumps(report.to_json()))
        return 0
    print(f"{report.path}: {report.bytes} bytes, digest {report.digest[:12]}, {'signed' if key else 'not signed'}")
    for program in report.programs:
        print(
            f"  {program.id}: {program.parameters} parameters train in {len(program.trained)} tensors; step graph of "
            f"{program.nodes} nodes, {program.step_bytes} bytes; gradients within {program.proof.max_relative_error:.1e} "
            f"of {program.proof.oracle} at batches {', '.join(map(str, program.proof.batches))}; built in {program.seconds:.2f} s"
        )
    return 0


def _quantize(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from export.spec import load_spec, quantize_spec, with_deploy

    given = {"bits": args.bits} if args.bits is not None else {}
    spec = load_spec(args.spec)
    allowed = [*(spec.deploy or {}).get("allow", ()), *args.allow]
    spec = replace(spec, deploy=with_deploy(spec, {**given, "allow": allowed}))
    report = quantize_spec(spec, args.output, on_progress=lambda text: print(text, file=sys.stderr, flush=True))
    if args.json:
        print(json.dumps(report.to_json()))
        return 0
    size = report.integer_bytes if report.ships == "integer" else report.float_bytes
    print(f"{args.output}: {report.ships} ships, {size} bytes ({report.float_bytes} in float); {report.reason}")
    print(f"  score {report.integer_score:.4f}, in float {report.float_score:.4f}; by {', '.join(report.method)}")
    print(
        f"  {report.integer_kernels} integer kernels, {len(report.float_kernels)} float ones; CPU time "
        f"{report.integer_cpu_us:.0f} us against {report.float_cpu_us:.0f} us on {report.machine}"
    )
    for violation in report.violations:
        print(f"  {violation.gate}: {violation.finding}; {violation.advice}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from export.check import check_model

    found = check_model(args.model, [part for part in args.train.split(",") if part], args.loss)
    if args.json:
        print(json.dumps(found.to_json()))
        return 3 if found.problem else 0
    print(f"{sum(found.trained.values())} parameters train in {len(found.trained)} tensors: {', '.join(found.trained)}")
    listed = (f"{name} x{count}{' (no rule)' if name in found.missing else ''}" for name, count in found.path.items())
    print(f"on the path to the loss: {', '.join(listed)}")
    print(
        f"the frozen part ends at {', '.join(found.frontier)}: {found.feature_bytes} bytes per sample, "
        f"{found.frozen_flops} of {found.forward_flops} forward operations"
    )
    if found.problem:
        print(found.problem)
        return 3
    print(f"backward: {found.backward_flops} operations per sample")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from edge_sdk.bundle import Bundle
    from export.adapters import merged, program_of, read_tensors, write_tensors

    tensors, master = read_tensors(args.model), read_tensors(args.master)
    with Bundle.open(args.bundle) as bundle:
        program = program_of(bundle, tensors)
        found = merged(bundle, program, tensors, master)
    write_tensors(found, args.output)
    changed = sum(not (found[name] == master[name]).all() for name in master)
    print(f"{args.output}: {changed} of {len(found)} tensors changed by {program.id}")
    return 0


def _peft(args: argparse.Namespace) -> int:
    from edge_sdk.bundle import Bundle
    from export.adapters import program_of, read_tensors, write_peft

    tensors, master = read_tensors(args.model), read_tensors(args.master)
    with Bundle.open(args.bundle) as bundle:
        program = program_of(bundle, tensors)
        write_peft(bundle, program, tensors, master, args.output, args.base_model)
    print(f"{args.output}: adapter_config.json and adapter_model.safetensors of {program.id}")
    return 0


def _rebase(args: argparse.Namespace) -> int:
    from export.adapters import read_tensors
    from export.rebase import rebase
    from export.spec import load_spec

    key = SigningKey.load(args.key) if args.key else None
    found = rebase(
        load_spec(args.spec),
        args.bundle,
        read_tensors(args.model),
        args.output,
        args.weights,
        release_key=key,
        on_progress=lambda text: print(text, file=sys.stderr, flush=True),
    )
    report = found.report
    print(
        f"{args.output}: {report.bytes} bytes, digest {report.digest[:12]}, {'signed' if key else 'not signed'}; "
        f"its outputs are {found.difference:.1e} from those of {args.bundle} with its model"
    )
    return 0
