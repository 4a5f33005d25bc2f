"""Save weights, data splits and the audit log, and bring them back: docs/DISASTER_RECOVERY.md says when."""

import argparse
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge

from ldm3d import __version__
from ldm3d.errors import ConfigError, DataError
from mlops import run_metrics
from mlops.api.audit_chain import Findings
from mlops.backup.manifest import AuditEnd, Content, SavedFile, Source
from mlops.backup.restore import choose, restore
from mlops.backup.snapshot import OpenFile, audit_logs, secrets_in, snapshot
from mlops.backup.vault import Vault, new_name
from mlops.commands import Parser, run_command
from mlops.remote import warn

METRICS_JOB = "ldm3d_backup"
"""What a pushgateway keeps them under."""
EXAMPLES = """examples:
  python -m mlops.backup create --from checkpoints/demo service_data --to abfs://backups/ldm3d --keep 7 --keep-days 30
  python -m mlops.backup list --from abfs://backups/ldm3d
  python -m mlops.backup restore --from abfs://backups/ldm3d --source demo --to checkpoints/restored

exit status: 0 done, 1 a backup or an audit log is damaged, 2 something that you can mend
"""


def main() -> int:
    args = parse()
    vault = Vault(args.to if args.command == "create" else args.vault)
    if args.command == "create":
        return create(vault, args)
    if args.command == "list":
        return _list(vault)
    if args.command == "prune":
        return _prune(vault, args.keep, args.keep_days)
    name = args.backup or vault.newest()
    content = vault.content(name)
    if args.command == "verify":
        problems = vault.problems(name, content)
        print("\n".join([*problems, f"{name}: {f'{len(problems)} files are damaged' if problems else 'whole'}"]))
        return 1 if problems else 0
    source = choose(content.sources, args.source)
    restore(vault, name, source, args.to, args.overwrite)
    warn(f"{args.to}: {len(source.files)} files of {name}, which were in {source.origin}")
    for end in source.audit_logs:
        damaged = f", damaged in {end.problems} places, as it was when it was saved" if end.problems else ""
        warn(f"audit log {end.folder}: {end.entries} entries{damaged}")
    return 0


def parse() -> argparse.Namespace:
    parser = Parser(
        prog="python -m mlops.backup",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("create", help="save folders and files; prints the backup's name")
    made.add_argument(
        "--from", dest="sources", nargs="+", type=Path, required=True, metavar="PATH", help="what is kept"
    )
    made.add_argument("--to", required=True, metavar="URL", help="a folder, s3://, gs:// or abfs://")
    made.add_argument("--with-keys", action="store_true", help="also keys.json, *.key and *.pem")
    made.add_argument("--textfile", type=Path, metavar="FILE", help="metrics of this backup for Prometheus")
    made.add_argument("--push", metavar="URL", help="send them to a pushgateway")
    back = commands.add_parser("restore", help="bring a source back into an empty folder")
    shown = commands.add_parser("list", help="which backups there are")
    checked = commands.add_parser("verify", help="read a backup, and compare it with its digests")
    old = commands.add_parser("prune", help="remove old backups, and what a killed process left")
    for command in (back, shown, checked, old):
        command.add_argument("--from", dest="vault", required=True, metavar="URL", help="where the backups are")
    for command in (back, checked):
        command.add_argument("--backup", metavar="NAME", help="the newest by default")
    back.add_argument("--source", metavar="NAME", help="which of the folders that were saved, by its name")
    back.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="an empty folder")
    back.add_argument("--overwrite", action="store_true", help="the folder need not be empty; replace what is in it")
    for command, needed in ((made, False), (old, True)):
        command.add_argument(
            "--keep", type=int, required=needed, metavar="N", help="the newest N of the same sources stay, however old"
        )
        command.add_argument("--keep-days", type=float, default=0, metavar="D", help="so do those of the last D days")
    args = parser.parse_args()
    keep = getattr(args, "keep", None)
    if (keep is not None and keep < 1) or getattr(args, "keep_days", 0) < 0:
        parser.error("--keep must be 1 or more, --keep-days 0 or more")
    if args.command == "create" and args.keep_days and keep is None:
        parser.error("--keep-days needs --keep")
    return args


def create(vault: Vault, args: argparse.Namespace) -> int:
    """Save, read back, declare whole, remove what is too old.

    An audit log that is damaged, or has lost what the newest backup knew of it, is saved as it is; then no backup is
    removed, as older ones may hold what is missing.
    """
    began, now = time.monotonic(), datetime.now(UTC)
    names = [source.resolve().name for source in args.sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--from: two sources are called {twice}, and nobody could tell them apart")
    known = _known_ends(vault, names)
    backup, sources, suspicions = new_name(now), [], []
    with ExitStack() as stack:
        opened = [stack.enter_context(snapshot(source, args.with_keys)) for source in args.sources]
        for name, place, files in zip(names, args.sources, opened, strict=True):
            logs = audit_logs(files)
            suspicions += _suspicions(name, logs, known)
            saved = tuple(_save(vault, backup, file) for file in files)
            ends = tuple(_end(folder, after, found) for folder, (after, found) in logs.items())
            sources.append(Source(name=name, origin=str(place.absolute()), files=saved, audit_logs=ends))
            if not args.with_keys and (left := secrets_in(place)):
                warn(f"notice: {place}: left out {', '.join(left)}; --with-keys would save them")
    content = Content(made=now.isoformat(timespec="seconds"), version=__version__, sources=tuple(sources))
    vault.finish(backup, content)
    print(backup, flush=True)
    seconds = time.monotonic() - began
    warn(f"{_described(backup, content)} in {seconds:.1f} s")
    for suspicion in suspicions:
        warn(f"warning: {suspicion}")
    metrics = _metrics(content, seconds, intact=not suspicions)
    if args.textfile:
        run_metrics.write(args.textfile, metrics)
    if args.push:
        run_metrics.push(args.push, METRICS_JOB, metrics)
    if suspicions:
        warn("no backup was removed: an older one may hold what is missing")
    elif args.keep is not None:
        _prune(vault, args.keep, args.keep_days)
    return 1 if suspicions else 0


def _save(vault: Vault, backup: str, file: OpenFile) -> SavedFile:
    digest = file.sha256()
    vault.put(backup, file, digest)
    return SavedFile(path=file.path, size=file.size, sha256=digest, private=file.status.st_mode & 0o077 == 0)


def _known_ends(vault: Vault, sources: list[str]) -> dict[tuple[str, str], str]:
    """Where each audit log ended in the newest backup of its source that can be read: hash by source and folder.

    That need not be the newest of all: others may save other sources there, and it may be damaged.
    """
    found: dict[str, Source] = {}
    for name in reversed(vault.names()):
        if all(source in found for source in sources):
            break
        try:
            for source in vault.content(name).sources:
                found.setdefault(source.name, source)
        except (ConfigError, DataError) as error:  # no reason to have no new backup
            warn(f"warning: {error}")
    ends = [(name, end) for name, source in found.items() for end in source.audit_logs]
    return {(name, end.folder): end.last_hash for name, end in ends if end.entries}


def _suspicions(name: str, logs: dict[str, tuple[str, Findings]], known: dict[tuple[str, str], str]) -> list[str]:
    """What speaks against the audit logs of a source, in words."""
    found = [
        f"{name}: the audit log {folder} is damaged: {log.problems[0]}"
        for folder, (_, log) in logs.items()
        if log.problems
    ]
    for (source, folder), last in known.items():
        after, log = logs.get(folder, ("", Findings()))
        if source == name and last not in {after, *log.hashes}:
            found.append(f"{name}: the audit log {folder} no longer has the entry that the newest backup ends with")
    return found


def _end(folder: str, after: str, found: Findings) -> AuditEnd:
    return AuditEnd(
        folder=folder, after=after, entries=found.entries, last_hash=found.last.hash, problems=len(found.problems)
    )


def _list(vault: Vault) -> int:
    damaged = False
    for name in vault.names():
        try:
            print(_described(name, vault.content(name)))
        except DataError as error:
            damaged = True
            print(f"{name}  damaged: {error}")
    return 1 if damaged else 0


def _prune(vault: Vault, keep: int, keep_days: float) -> int:
    for name in vault.prune(keep, keep_days, datetime.now(UTC)):
        warn(f"removed {name}")
    return 0


def _described(name: str, content: Content) -> str:
    files = sum(len(source.files) for source in content.sources)
    return f"{name}  {content.size / 2**20:.1f} MiB  {files} files  {', '.join(s.name for s in content.sources)}"


def _metrics(content: Content, seconds: float, intact: bool) -> CollectorRegistry:
    registry = CollectorRegistry()
    values = {
        "ldm3d_backup_last_success_timestamp_seconds": ("When the newest backup was finished (Unix time)", time.time()),
        "ldm3d_backup_size_bytes": ("Size of the files in the newest backup", content.size),
        "ldm3d_backup_duration_seconds": ("How long the newest backup took", seconds),
        "ldm3d_backup_audit_intact": ("1, or 0 where the audit log is damaged or lost entries", float(intact)),
    }
    for name, (meaning, value) in values.items():
        Gauge(name, meaning, registry=registry).set(value)
    return registry


if __name__ == "__main__":
    run_command(main)
