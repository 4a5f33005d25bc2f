"""What stands beside a batch's volumes: how it was begun, what each shard has made, and one manifest of the whole.

manifest/begun.json              settings of the batch; whoever comes first writes it, nobody replaces it
manifest/shard-<I>-of-<K>.jsonl  the volumes that shard I has made, with the digests of their files
manifest.json                    all of them, when all shards have ended
"""

import json
from datetime import UTC, datetime
from typing import Literal

from pydantic import ValidationError

from ldm3d.console import log
from ldm3d.definitions import Strict
from ldm3d.errors import ConfigError, OutputError
from mlops.batch.store import Store

BEGUN, MANIFEST = "manifest/begun.json", "manifest.json"


class Settings(Strict):
    """What all shards of a batch have in common, and what volumes depend on."""

    num: int
    seed: int
    shards: int
    scheduler: str
    steps: int
    dtype: Literal["float32", "int16"]
    weights_sha256: dict[str, str]
    code_version: str

    def share(self, shard: int) -> range:
        """Numbers of the volumes that a shard makes: every K-th.

        So shards differ by one volume at most, and a batch that is stopped early has made about the first ones.
        """
        return range(shard, self.num, self.shards)


class Machine(Strict):
    """What shows in the last digits of a volume, and may differ between shards."""

    device: str
    threads: int
    precision: str
    torch_version: str


class Begun(Strict):
    """How a batch was begun. Its time is that of all sidecars: a volume that is made twice has the same files."""

    format_version: Literal[1] = 1
    time: datetime
    settings: Settings
    machine: Machine


class FileRecord(Strict):
    """A file as it was written."""

    name: str
    bytes: int
    sha256: str


class VolumeRecord(Strict):
    """A volume whose files are in the store."""

    number: int
    sidecar: FileRecord
    volume: FileRecord

    @property
    def files(self) -> tuple[FileRecord, FileRecord]:
        return self.sidecar, self.volume


class Head(Strict):
    """First line of a shard's record."""

    shard: int
    settings: Settings
    machine: Machine


class Record:
    """What a shard has made, by number of the volume.

    Args:
        head: of which shard.
        volumes: made so far.
    """

    def __init__(self, head: Head, volumes: dict[int, VolumeRecord]):
        self.head, self.volumes = head, volumes

    @property
    def complete(self) -> bool:
        return self.volumes.keys() == {*self.head.settings.share(self.head.shard)}

    def save(self, store: Store) -> None:
        lines = [self.head, *(self.volumes[number] for number in sorted(self.volumes))]
        text = "".join(f"{line.model_dump_json()}\n" for line in lines)
        store.write(_record_name(self.head.shard, self.head.settings), text.encode())


def begin(store: Store, settings: Settings, machine: Machine) -> Begun:
    """Note what is to be made, or agree with what was begun there before.

    Raises:
        ConfigError: a batch of other settings is there.
        OutputError: the place cannot be read or written.
    """
    if store.read(BEGUN) is None:
        mine = Begun(time=datetime.now(UTC).replace(microsecond=0), settings=settings, machine=machine)
        store.create(BEGUN, f"{mine.model_dump_json(indent=2)}\n".encode())
    begun = read_begun(store)  # of shards that start together, another may have been the first
    if begun.settings != settings:
        raise ConfigError(
            f"{store.name}: holds a batch with {_differing(begun.settings, settings)}; this command has "
            f"{_differing(settings, begun.settings)}: give the same settings, or another --output"
        )
    if begun.machine != machine:
        log(
            f"notice: the batch was begun with {_differing(begun.machine, machine)}, this shard has "
            f"{_differing(machine, begun.machine)}: volumes can differ in the last digits"
        )
    return begun


def read_begun(store: Store) -> Begun:
    """How the batch in a place was begun.

    Raises:
        ConfigError: there is none.
        OutputError: nobody can know it any more.
    """
    content = store.read(BEGUN)
    if content is None:
        raise ConfigError(f"{store.name}: there is no batch; begin one with --weights and --num")
    try:
        return Begun.model_validate_json(content)
    except ValidationError as error:
        raise OutputError(f"{store.name}/{BEGUN}: is damaged; remove it and start the shards again") from error


def read_record(store: Store, settings: Settings, shard: int) -> Record | None:
    """What a shard has noted; None where that is nothing, damaged, or of other settings."""
    lines = (store.read(_record_name(shard, settings)) or b"").splitlines()
    try:
        head = Head.model_validate_json(lines[0])
        volumes = [VolumeRecord.model_validate_json(line) for line in lines[1:]]
    except (IndexError, ValidationError):
        return None
    if (head.shard, head.settings) != (shard, settings):
        return None
    return Record(head, {volume.number: volume for volume in volumes})


def finish(store: Store, begun: Begun) -> list[int]:
    """Write the manifest of the whole, if every shard has ended.

    A shard saves its record before it reads the others': of those that end at the same time, the one that saved last
    sees all. What is written follows from the records alone, so it does not matter how many write it.

    Returns:
        Shards that have not ended; if there are none, the manifest is written.

    Raises:
        OutputError: a file that was made is no longer there, or has another size.
    """
    found = {shard: read_record(store, begun.settings, shard) for shard in range(begun.settings.shards)}
    records = [record for record in found.values() if record is not None and record.complete]
    if len(records) < begun.settings.shards:
        return [shard for shard, record in found.items() if record is None or not record.complete]
    sizes = store.sizes()
    for record in records:
        _require_files(store, record, sizes)
    store.write(MANIFEST, (json.dumps(_manifest(begun, records), indent=1) + "\n").encode())
    return []


def _require_files(store: Store, record: Record, sizes: dict[str, int]) -> None:
    for file in (file for volume in record.volumes.values() for file in volume.files):
        if sizes.get(file.name) != file.bytes:
            state = f"has {sizes[file.name]} bytes, not {file.bytes}" if file.name in sizes else "is not there any more"
            raise OutputError(f"{store.name}/{file.name}: {state}; start shard {record.head.shard} again")


def _manifest(begun: Begun, records: list[Record]) -> dict[str, object]:
    volumes = sorted((volume for record in records for volume in record.volumes.values()), key=lambda v: v.number)
    files = [
        {"name": file.name, "number": volume.number, "seed": begun.settings.seed, **file.model_dump(exclude={"name"})}
        for volume in volumes
        for file in reversed(volume.files)
    ]
    machines = [{"shard": record.head.shard, **record.head.machine.model_dump()} for record in records]
    shared = begun.model_dump(mode="json", exclude={"machine"})
    return shared | {"machines": machines, "num_files": len(files), "files": files}


def _record_name(shard: int, settings: Settings) -> str:
    return f"manifest/shard-{shard}-of-{settings.shards}.jsonl"


def _differing(one: Strict, other: Strict) -> str:
    """The fields of `one` that differ from those of `other`, in words."""
    ours, theirs = _facts(one), _facts(other)
    return ", ".join(f"{name} {value}" for name, value in ours.items() if value != theirs.get(name))


def _facts(fields: Strict) -> dict[str, object]:
    """Names and values; of weights each file's name and the beginning of its digest."""
    facts = fields.model_dump()
    digests = facts.pop("weights_sha256", {})
    return facts | {name: digest[:12] for name, digest in digests.items()}
