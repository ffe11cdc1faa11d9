"""The command line.

Every command is imported when it is called, so that `--help` is quick. What is wrong with what the user asked for is
one line on standard error; exit status 2 for a wrong question (options, configuration), 1 where the world says no.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Final, NoReturn

import click

from vhostcache import cli_words as words
from vhostcache.cli_options import size as size_of
from vhostcache.cli_words import PROGRAM
from vhostcache.errors import EXIT_RUNTIME, EXIT_USAGE, Error, one_line, why

# Commands that live in other modules, and how the list of commands describes them.
_ELSEWHERE: Final = {
    "export": ("vhostcache.cli_serve", "export_command", "Serve one image as a disk."),
    "serve": ("vhostcache.cli_serve", "serve_command", "Serve many disks from one YAML file."),
    "status": ("vhostcache.cli_status", "status_command", "Ask a running daemon how it is."),
    "bench": ("vhostcache.loadgen", "bench_command", "Put load on a vhost-user-blk server and measure it."),
    "info": ("vhostcache.cli_cache", "info_command", "Show what is in a cache file."),
    "check": ("vhostcache.cli_cache", "check_command", "Hold all of a cache file against its checksums."),
    "drain": ("vhostcache.cli_cache", "drain_command", "Write what only a cache file has back to its image."),
    "dump": ("vhostcache.cli_cache", "dump_command", "Print the records of a cache file as JSON lines."),
    "set": ("vhostcache.cli_tune", "set_command", "Change settings of a disk while it is in use."),
    "retry": ("vhostcache.cli_tune", "retry_command", "Try at once what a disk's backend has refused."),
}


class _Commands(click.Group):
    """The list of commands; those of other modules are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        order = [
            "create",
            "export",
            "serve",
            "status",
            "resize",
            "set",
            "retry",
            "info",
            "check",
            "drain",
            "dump",
            "bench",
            "schema",
            "version",
        ]
        return [name for name in order if name in self.commands or name in _ELSEWHERE]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        module, name, _ = _ELSEWHERE[cmd_name]
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            about = _ELSEWHERE[name][2] if name in _ELSEWHERE else self.commands[name].get_short_help_str(70)
            rows.append((name, about))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """A write-back cache daemon for the disks of QEMU guests.

    It serves virtio-blk disks over vhost-user, and turns a guest's many small writes into few large ones to the image
    behind. With a cache file on local storage a guest's flush is answered when everything before it is in its log,
    without one when it is in the image.

    \b
      vhostcache create disk.img --size 4GiB
      vhostcache export disk.img --socket /run/vda.sock
          prints the QEMU arguments that attach the disk, and serves it until Ctrl-C
      vhostcache status /run/vda.sock.control
      vhostcache serve disks.yaml
          many disks from one file; `vhostcache schema` describes it

    Exit status: 0 done, 1 the world says no (one line says how), 2 a wrong option or configuration.
    """


@cli.command(short_help="Make a new, empty raw image.")
@click.argument("image", type=click.Path())
@click.option(
    "--size", type=size_of("IMAGE"), required=True, metavar="SIZE", help="Such as 4GiB or 512M; a multiple of 512."
)
def create(image: str, size: str) -> None:
    """Make IMAGE, a new raw disk image full of zeroes.

    It is sparse: it takes room on the disk as data is written into it. A file that already exists is never touched.

    \b
      vhostcache create disk.img --size 4GiB
    """
    import os

    from vhostcache.config import format_size, parse_size
    from vhostcache.errors import ImageError

    size_bytes = parse_size(size)

    subject = f"image '{image}'"
    try:
        descriptor = os.open(image, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError as error:
        raise ImageError(subject, "already exists", "a new name", "nothing has been changed") from error
    except FileNotFoundError as error:
        raise ImageError(
            subject, f"the folder '{os.path.dirname(image) or '.'}' does not exist", hint="make it first"
        ) from error
    except OSError as error:
        raise ImageError(subject, why(error)) from error
    try:
        os.ftruncate(descriptor, size_bytes)
        os.fsync(descriptor)
    except OSError as error:
        os.unlink(image)
        raise ImageError(
            subject, f"cannot be {size_bytes} bytes large: {why(error)}", hint="it has been removed again"
        ) from error
    finally:
        os.close(descriptor)
    click.echo(f"{image}: {format_size(size_bytes)}")


@cli.command(short_help="Make a disk larger while it is in use.")
@click.argument("name")
@click.argument("size", type=size_of("IMAGE"))
@click.option(
    "--control",
    type=click.Path(),
    metavar="PATH",
    help="Control socket of the daemon that serves the disk.  [default: NAME is one, or the disk's own socket]",
)
def resize(name: str, size: str, control: str | None) -> None:
    """Give the disk NAME that SIZE: its image is extended, and a running guest is told. Disks are never made smaller.

    A block device and an NBD export have to be grown first, by whatever means they have; SIZE is what they have then.

    \b
      vhostcache resize --control /run/vhostcache/control.sock vda 20GiB
      vhostcache resize /run/vda.sock 20GiB
    """
    from vhostcache.config import parse_size
    from vhostcache.control import find_volume, resize_and_wait

    control, name = find_volume(name, control)
    size_bytes = resize_and_wait(control, name, parse_size(size))
    click.echo(f"{name}: {words.size(size_bytes)} ({size_bytes} bytes)")


@cli.command(short_help="Print the JSON schema of the YAML file.")
def schema() -> None:
    """Print the JSON schema of `serve`'s configuration: every key, its meaning and its default."""
    from vhostcache.config import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@cli.command(short_help="Print the version.")
def version() -> None:
    """Print the version."""
    click.echo(f"{PROGRAM} {words.version()}")


def main(arguments: list[str] | None = None) -> NoReturn:
    """The program. Whatever goes wrong, it is one line and an exit status."""
    try:
        result = cli.main(args=arguments, prog_name=PROGRAM, standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except Error as error:
        _fail(str(error), error.exit_status)
    except click.UsageError as error:
        name = error.ctx.command_path if error.ctx is not None else PROGRAM
        _fail(f"{error.format_message()} (see {name} --help)", EXIT_USAGE)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(EXIT_RUNTIME)


def _fail(message: str, status: int) -> NoReturn:
    click.echo(f"{PROGRAM}: {one_line(message)}", err=True)
    sys.exit(status)
