# SPDX-License-Identifier: Apache-2.0
"""The door for a shell: the `parity` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import EXIT_FAILED, EXIT_HOLDS, EXIT_NOT_HERE, DescriptionError, ParityError

if TYPE_CHECKING:
    from harness.ports import Port


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Exit codes: 0 all hold, 1 a check failed, 2 a description is wrong, 3 something is not here."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except ParityError as error:
        print(f"parity: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("parity: interrupted", file=sys.stderr)
        return 130
    return code


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="parity", description="Tells whether the port of a model still computes what the original computes."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_check(commands)
    listing = commands.add_parser("list", help="families, ports, checks and backends, and whether each is here")
    listing.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    listing.set_defaults(run=_list)
    repro = commands.add_parser("repro", help="replay a failure from its bundle")
    repro.add_argument("bundle", type=Path, metavar="BUNDLE")
    repro.add_argument("--original", metavar="SPEC", help="use this original instead, file.py:Class")
    repro.add_argument("--port", metavar="NAME", help="use this port instead, one that this directory describes")
    repro.add_argument("--model", metavar="SPEC", help="use this model class instead, file.py:Class")
    repro.add_argument("--config", metavar="SPEC", help="use this configuration class instead, file.py:Class")
    repro.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    repro.set_defaults(run=_repro)
    selftest = commands.add_parser("selftest", help="plant bugs in a described port and see whether the gate notices")
    selftest.add_argument("--family", metavar="NAME", help="only ports of this family")
    selftest.add_argument("--mutants", action="append", default=[], metavar="GLOB", help="only these (repeatable)")
    selftest.add_argument("--jobs", type=int, default=2, metavar="N", help="processes side by side (default 2)")
    selftest.add_argument("--everything", action="store_true", help="run every check, to know every killer")
    selftest.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    selftest.set_defaults(run=_selftest)
    from harness.golden import add_golden_parser, run_golden
    from harness.hub.command import add_hub_parser
    from harness.init import add_init_parser

    add_golden_parser(commands)
    commands.choices["golden"].set_defaults(run=run_golden)
    add_hub_parser(commands)
    add_init_parser(commands)
    return top


def _add_check(commands: Any) -> None:
    check = commands.add_parser("check", help="check the ports that this directory describes")
    check.add_argument("--port", action="append", default=[], metavar="NAME", help="only this port (repeatable)")
    check.add_argument("--family", metavar="NAME", help="check a port that is not described: its family")
    check.add_argument("--model", metavar="SPEC", help="with --family: file.py:Class or package.module:Class")
    check.add_argument("--config", metavar="SPEC", help="with --family: its configuration class, else the model's own")
    check.add_argument("--load", default="state_dict", metavar="HOW", help="with --family: as in [tool.parity]")
    check.add_argument("--original", metavar="SPEC", help="gate against this original instead of the family's")
    check.add_argument("--labels", choices=("hf", "preshifted"), default="hf", help="with --family (default hf)")
    check.add_argument("--backend", action="append", default=[], metavar="NAME", help="only this one (repeatable)")
    check.add_argument("--dtype", action="append", default=[], metavar="NAME", help="only this one (repeatable)")
    check.add_argument("--checks", action="append", default=[], metavar="GLOB", help="only these (repeatable)")
    check.add_argument("--profile", default="gate", metavar="NAME", help="gate (default), thorough or nightly")
    check.add_argument("--seed", type=int, metavar="N", help="draw other cases than the profile's own")
    check.add_argument("--report", type=Path, metavar="DIR", help="write reports and bundles of failures there")
    check.add_argument("--min-checks", type=int, default=0, metavar="N", help="fail when fewer ran for a port")
    check.add_argument("--time-limit", type=float, default=30.0, metavar="SECONDS", help="of one check (default 30)")
    check.add_argument("--require", action="append", default=[], metavar="BACKEND", help="exit 3 when it is not here")
    check.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    check.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    import dataclasses

    from harness.ports import select_ports
    from harness.report import make_console, print_table, progress, write_reports
    from harness.report.json_report import render
    from harness.runner import Options, exit_code, header_of, plan, require_backends, run_ports, too_few

    directory = Path.cwd()
    options = Options(
        backends=arguments.backend,
        dtypes=arguments.dtype,
        checks=arguments.checks,
        profile=arguments.profile,
        seed=arguments.seed,
        report=arguments.report.resolve() if arguments.report else None,
        min_checks=arguments.min_checks,
        require=arguments.require,
        time_limit=arguments.time_limit,
    )
    require_backends(options)
    if arguments.model or arguments.family:
        ports = [_port_from(arguments, directory)]
    else:
        ports = select_ports(_described(directory), arguments.port, directory=directory)
        if arguments.original:
            ports = [dataclasses.replace(port, original=arguments.original) for port in ports]
    total = len(plan(ports, options))
    with progress(total, make_console(stderr=True)) as advance:
        results = run_ports(ports, options, on_result=lambda result: advance(result.check))
    complaints = too_few(ports, results, options)
    header = header_of(options)
    if options.report is not None:
        write_reports(options.report, results, header=header)
    if arguments.json:
        print(render(results, header=header))
    else:
        print_table(results, header=header)
    for line in complaints:
        print(f"parity: {line}", file=sys.stderr)
    return exit_code(results, complaints)


def _described(directory: Path) -> Sequence[Port]:
    """The ports that a directory describes; families that its conftest.py registers are known from then on."""
    from harness.families import read_conftest
    from harness.ports import read_ports

    ports = read_ports(directory)
    read_conftest(directory, {port.family for port in ports})
    return ports


def _port_from(arguments: argparse.Namespace, directory: Path) -> Port:
    from harness.isolation import gate
    from harness.ports import Port

    if not (arguments.model and arguments.family):
        raise DescriptionError(
            "--family and --model describe a port together; give both, or --port for a described one"
        )
    config = arguments.config
    if config is None:
        with gate() as opened:
            config = opened.configuration_class(arguments.model, directory)
        if config is None:
            raise DescriptionError(f"{arguments.model} names no config_class; give --config file.py:Class")
    return Port(
        name=arguments.model.rpartition(":")[2],
        family=arguments.family,
        model=arguments.model,
        config=config,
        load=arguments.load,
        original=arguments.original,
        labels=arguments.labels,
        root=directory,
    )


def _list(arguments: argparse.Namespace) -> int:
    from harness.backends import BACKENDS, unavailable
    from harness.checks import CATALOGUE
    from harness.families import family_names

    ports = _described(Path.cwd())
    document: dict[str, Any] = {
        "families": family_names(),
        "ports": [{"name": p.name, "family": p.family, "model": p.model, "load": p.load} for p in ports],
        "backends": {name: unavailable(name) or "here" for name in BACKENDS},
        "checks": [
            {"id": check.id, "needs": list(check.needs), "dtypes": list(check.dtypes), "devices": check.devices}
            for check in CATALOGUE
        ],
    }
    if arguments.json:
        print(json.dumps(document, indent=2))
        return EXIT_HOLDS
    print("families  " + ", ".join(document["families"]))
    for port in document["ports"]:
        print(f"port      {port['name']}: {port['model']} ({port['family']}, {port['load']})")
    for name, state in document["backends"].items():
        print(f"backend   {name}: {state}")
    for entry in document["checks"]:
        print(f"check     {entry['id']}" + (f" (needs {', '.join(entry['needs'])})" if entry["needs"] else ""))
    return EXIT_HOLDS


def _repro(arguments: argparse.Namespace) -> int:
    import dataclasses

    from harness.bundles import read, versions
    from harness.families import read_conftest
    from harness.isolation import gate
    from harness.ports import select_ports
    from harness.report.json_report import plain
    from harness.results import as_json

    bundle, here = arguments.bundle.resolve(), Path.cwd()
    port, case, recorded = read(bundle)
    if arguments.port:
        (port,) = select_ports(_described(here), [arguments.port], directory=here)
    elif not port.root.is_dir():
        print(f"parity: {port.root} is not here; the files of '{port.name}' are looked for in {here}", file=sys.stderr)
        port = dataclasses.replace(port, root=here)
    read_conftest(port.root, [port.family])
    changed = {name: getattr(arguments, name) for name in ("original", "model", "config") if getattr(arguments, name)}
    with gate() as opened:
        result = opened.replay(dataclasses.replace(port, **changed), case, recorded, bundle)
    if arguments.json:
        print(json.dumps(plain(as_json(result)), indent=2))
    else:
        print(f"recorded  {recorded['status']}: {recorded['reason']}")
        print(f"now       {result.status}{': ' + result.reason if result.reason else ''}")
        for name, value in result.metrics.items():
            print(f"          {name} {value:.3g}, recorded {recorded['metrics'].get(name, 'not')}")
        for name, version in versions().items():
            if recorded["versions"].get(name) != version:
                print(f"          {name} {version}, recorded {recorded['versions'].get(name, 'without')}")
    return EXIT_FAILED if result.status in ("failed", "error") else EXIT_HOLDS


def _selftest(arguments: argparse.Namespace) -> int:
    import dataclasses
    import fnmatch

    from harness.families import family_names, nearest
    from harness.mutants import groups, mutants_of, score, selftest, table
    from harness.ports import family_of, select_ports
    from harness.runner import nowhere

    directory = Path.cwd()
    ports = _described(directory)
    if arguments.family and arguments.family not in family_names():
        raise DescriptionError(f"there is no family '{arguments.family}'{nearest(arguments.family, family_names())}")
    verdicts = []
    left_out: list[str] = []
    for port in select_ports(ports, [], directory=directory):
        if arguments.family not in (None, port.family) or family_of(port).mutants is None:
            continue
        if reason := nowhere(family_of(port)):
            left_out.append(f"left out: the planted bugs of port '{port.name}': {reason}")
            continue
        mutants = mutants_of(family_of(port))
        chosen = [
            m for m in mutants if not arguments.mutants or any(fnmatch.fnmatch(m.id, g) for g in arguments.mutants)
        ]
        for verdict in selftest(port, chosen, jobs=arguments.jobs, everything=arguments.everything):
            verdicts.append(verdict)
            if not arguments.json:
                print(table([verdict]), flush=True)
    for line in left_out:
        print(line, file=sys.stderr)
    if not verdicts and left_out:
        return EXIT_NOT_HERE
    if not verdicts:
        raise DescriptionError("no described port has mutants to plant, or no mutant's id matches")
    if arguments.json:
        print(json.dumps([dataclasses.asdict(verdict) for verdict in verdicts], indent=2))
    else:
        print(f"\nplanted bugs by the group of the check that noticed first\n{groups(verdicts)}\n\n{score(verdicts)}")
    return EXIT_HOLDS if all(verdict.good for verdict in verdicts) else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
