"""`ssmttm web`."""

import argparse

_EPILOG = """examples:
  ssmttm web                                  the embedded model at http://127.0.0.1:8000/
  ssmttm web runs/lm exported/student         two models to choose from
  ssmttm web --host 0.0.0.0 --port 9000       for the network, with a random token, which is printed

  curl http://127.0.0.1:8000/v1/generate --json '{"prompt": "a slow waltz", "duration": 5}' -o waltz.wav

The page needs no network. /docs describes the HTTP API, docs/web.md the WebSocket."""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `web` to the `ssmttm` command."""
    web = commands.add_parser(
        "web",
        help="a web page that plays music while it is generated, and an HTTP API",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = web.add_argument
    add("models", nargs="*", metavar="MODEL", help="a run, an exported folder, the name of an embedded model or a hub "
        "id; several to choose from (default: tiny_lm)")  # fmt: skip
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: every one (default: %(default)s)")
    add("--port", type=int, default=8000, metavar="N", help="0: any free one (default: %(default)s)")
    add("--token", metavar="TOKEN", help="what clients must know (default: none at 127.0.0.1, else a random one)")
    add("--max-duration", type=float, default=600.0, metavar="S", help="longest clip and recording (default: 600)")
    add("--max-active", type=int, default=4, metavar="N", help="generations that take turns; others wait (default: 4)")
    add("--max-waiting", type=int, default=32, metavar="N", help="generations in the queue (default: 32)")
    web.set_defaults(run=run_web)


def run_web(arguments: argparse.Namespace) -> None:
    """Serve until Ctrl-C."""
    from ssmttm.errors import UserError, check_sizes
    from ssmttm.web.limits import Limits
    from ssmttm.web.serve import serve

    check_sizes(**{"--max-active": arguments.max_active})
    if not 0 < arguments.max_duration <= 86400:
        raise UserError(f"--max-duration must be in (0, 86400] seconds, got {arguments.max_duration:g}")
    if arguments.max_waiting < 0:
        raise UserError(f"--max-waiting must be at least 0, got {arguments.max_waiting}")
    limits = Limits(
        duration=arguments.max_duration, active=arguments.max_active, waiting=arguments.max_waiting,
    )  # fmt: skip
    serve(arguments.models, arguments.host, arguments.port, arguments.token, limits)
