"""One shard's work: look at what is there, make the rest."""

import time

import torch

from ldm3d.console import log, progress
from ldm3d.files import sha256
from ldm3d.nifti import stem_of
from ldm3d.samples import file_name, write_sample
from ldm3d.sampling import Sampler, VolumeId
from ldm3d.signals import Stopped, StopRequest
from mlops.batch.records import Begun, FileRecord, Head, Machine, Record, VolumeRecord, read_record
from mlops.batch.store import Store

SECONDS_BETWEEN_RECORDS = 30.0
"""What was made since the last record is made again after a kill. Writing it after each batch costs more than that."""


def this_machine(sampler: Sampler) -> Machine:
    return Machine(
        device=sampler.device.type,
        threads=torch.get_num_threads(),
        precision=str(sampler.precision.dtype) if sampler.precision.enabled else "torch.float32",
        torch_version=torch.__version__,
    )


def make_shard(store: Store, sampler: Sampler, begun: Begun, head: Head, batch_size: int, stop: StopRequest) -> None:
    """Make the volumes of a shard that are not there, whole, already.

    Args:
        store: where.
        sampler: with the batch's weights.
        begun: settings of the batch.
        head: which shard, and on what machine.
        batch_size: volumes at once.
        stop: asked before each batch.

    Raises:
        Stopped: it was asked to; what is made is noted.
        OutputError: a file cannot be written.
    """
    settings = begun.settings
    share = settings.share(head.shard)
    record = Record(head, whole_volumes(store, begun, head.shard, stop))
    record.save(store)  # also shows, before any sampling, whether the place can be written to
    saved = time.monotonic()
    name = f"shard {head.shard} of {settings.shards}"
    log(f"{name}: {len(record.volumes)} of {len(share)} volumes are there")
    # A batch always has the same volumes, however often the shard is started: on a GPU that shows in the last digits.
    batches = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    batches = [batch for batch in batches if not record.volumes.keys() >= {*batch}]
    ticks = iter(progress(range(len(batches) * settings.steps + 1), name, unit="step"))

    def on_step(step: int) -> None:
        next(ticks, None)

    on_step(0)
    for batch in batches:
        if stop.signum:
            break
        values = sampler.sample(settings.seed, batch, settings.scheduler, settings.steps, on_step)
        for number, volume in zip(batch, values, strict=True):
            if number not in record.volumes:
                record.volumes[number] = _write(store, sampler, begun, number, volume)
        if time.monotonic() - saved > SECONDS_BETWEEN_RECORDS:
            record.save(store)
            saved = time.monotonic()
    record.save(store)
    on_step(0)
    log(f"{name}: {len(record.volumes)} of {len(share)} volumes are made")
    if not record.complete:
        raise Stopped(stop.signum)


def whole_volumes(store: Store, begun: Begun, shard: int, stop: StopRequest) -> dict[int, VolumeRecord]:
    """Volumes that a shard has noted, and whose files are what was noted; by number.

    Raises:
        Stopped: it was asked to.
    """
    before = read_record(store, begun.settings, shard)
    if before is None or not before.volumes:
        return {}
    sizes = store.sizes()
    whole = {}
    for number, volume in progress(before.volumes.items(), "checking", len(before.volumes), "volume"):
        if stop.signum:
            raise Stopped(stop.signum)
        # The size first: it costs nothing, and shows most of what can have happened.
        spoilt = [f.name for f in volume.files if sizes.get(f.name) != f.bytes or store.sha256(f.name) != f.sha256]
        if spoilt:
            log(f"warning: {', '.join(spoilt)}: not what this shard has written; made again")
        elif number in begun.settings.share(shard):
            whole[number] = volume
    return whole


def _write(store: Store, sampler: Sampler, begun: Begun, number: int, values: torch.Tensor) -> VolumeRecord:
    settings, which = begun.settings, VolumeId(begun.settings.seed, number)
    name = file_name(which)
    with store.staged() as folder:
        path = folder / name
        write_sample(path, sampler, which, values, settings.scheduler, settings.steps, settings.dtype, time=begun.time)
        files = [
            FileRecord(name=file.name, bytes=file.stat().st_size, sha256=sha256(file))
            for file in (path.with_name(f"{stem_of(path)}.json"), path)
        ]
    return VolumeRecord(number=number, sidecar=files[0], volume=files[1])
