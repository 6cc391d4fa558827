"""Parts of every builder: a folder that records its build, work that survives an interruption, and a process pool."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from oner_fast import bounded_json
from oner_fast.atomic import replacing
from oner_fast.data.sources import folder_lock, owned_files
from oner_fast.data.sources.progress import progress, say
from oner_fast.data.sources.writer import FORMAT, write_json
from oner_fast.data.tar_folders import tars_in
from oner_fast.data.tar_index import build_index, stored_index
from oner_fast.failures import keep_origin

Job = TypeVar("Job")
Result = TypeVar("Result")


class Build:
    """A dataset folder under construction.

    `options` holds everything that the bytes depend on. The folder keeps it, so that a second run continues its own
    build only. Only files that a build writes are ever removed, by their names in the folder (see `owned_files`).

    Raises:
        ValueError: the folder holds another build and `overwrite` is false, another process builds in it, it is a file,
            or its `.build` is a link.
    """

    def __init__(self, output: str | Path, name: str, options: dict[str, Any], overwrite: bool = False) -> None:
        self.output = Path(output)
        self.name = name
        self.options = {"source": name, **options}
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"{self.output} is a file; --output needs a folder")
        self.work = owned_files.working_folder(self.output)
        folder_lock.hold(self.output)
        found = self._found()
        if found is not None and (found != self.options or (overwrite and not self._is_sound())):
            if not overwrite:
                raise ValueError(
                    f"{self.output} holds another build ({_differences(found, self.options)}); "
                    "choose another --output, or replace it with --overwrite"
                )
            self._clear()
        self.output.mkdir(parents=True, exist_ok=True)
        folder_lock.hold(self.output)
        self.finished = self._is_finished()
        if self.finished:
            folder_lock.release(self.output)

    def begin(self) -> None:
        """Mark the folder as under construction, and remove the incomplete files of an interrupted run."""
        self.work.mkdir(exist_ok=True)
        if not (self.work / "options.json").exists():
            write_json(self.work / "options.json", self.options)
        owned_files.remove_build(self.output, unfinished=True)
        owned_files.remove_work(self.output, unfinished=True)
        for path, size in self._recorded():
            if path.exists() and path.stat().st_size != size:
                owned_files.remove(path)

    def finish(self, record: dict[str, Any]) -> dict[str, Any]:
        """Index each shard that `record` lists, write `dataset.json` last, and remove the working files."""
        every = [shard for split in record["splits"].values() for shard in split["shards"]]
        shards = [owned_files.shard_name(shard["file"], "the build") for shard in every]
        with progress("indexing shards", len(shards)) as advance:
            for file in shards:
                index = build_index(self.output / file)
                if index.damage:
                    raise OSError(f"{self.output / file} reads back damaged ({index.damage[0]}); run it again")
                index.save()
                advance()
        owned_files.remove_stale_shards(self.output, set(shards))
        content = {"name": self.name, "format": FORMAT, **record, "build": self.options}
        write_json(self.output / "dataset.json", content)
        owned_files.remove_work(self.output)
        self.finished = True
        folder_lock.release(self.output)
        return content

    def abandon(self) -> None:
        """Remove everything that the build has written; other files stay."""
        self._clear()
        folder_lock.release(self.output)
        if not any(self.output.iterdir()):
            self.output.rmdir()

    def dataset(self) -> dict[str, Any]:
        """Content of the folder's `dataset.json`. Raises ValueError where it is damaged."""
        listing = self.output / "dataset.json"
        if not listing.is_file():
            raise ValueError(f"{listing} is not a file; remove it, or choose another --output")
        return bounded_json.load_object(listing.read_bytes(), str(listing))

    def write_left_out(self, lines: Sequence[str]) -> None:
        """Write what was left out, a line each, to `left-out.txt`; without a line there is no such file."""
        path = self.output / owned_files.LEFT_OUT
        if not lines:
            owned_files.remove(path)
            return
        with replacing(path) as file:
            file.write("".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))

    def _found(self) -> dict[str, Any] | None:
        try:
            options = self.work / "options.json"
            if options.exists():
                return bounded_json.load_object(options.read_bytes(), str(options))
            if (self.output / "dataset.json").exists():
                found = self.dataset().get("build")
                return found if isinstance(found, dict) else {"source": "an unknown builder"}
        except ValueError as error:
            return {"source": f"an unreadable record: {error}"}
        if self.output.is_dir() and any(self.output.glob("*.tar")):
            return {"source": "tars without a dataset.json"}
        return None

    def _recorded(self) -> list[tuple[Path, int]]:
        """Return the path and the size in bytes of each shard that `dataset.json` lists.

        Raises ValueError where the listing is damaged, or names a shard that no build writes.
        """
        listing = self.output / "dataset.json"
        if not listing.exists():
            return []
        try:
            every = [shard for split in self.dataset()["splits"].values() for shard in split["shards"]]
            found = [(shard["file"], int(shard["bytes"])) for shard in every]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{listing} lists no shards of a build ({error!r}); choose another --output, or give --overwrite"
            ) from error
        return [(self.output / owned_files.shard_name(name, str(listing)), size) for name, size in found]

    def _is_sound(self) -> bool:
        """Tell whether `dataset.json` lists shards that a build can have written."""
        try:
            self._recorded()
        except ValueError:
            return False
        return True

    def _is_finished(self) -> bool:
        if not (self.output / "dataset.json").exists():
            return False
        recorded = self._recorded()
        whole = all(path.exists() and path.stat().st_size == size for path, size in recorded)
        if whole:
            owned_files.remove_work(self.output)
        return whole and all(path.with_name(path.name + ".index.npz").exists() for path, _ in recorded)

    def _clear(self) -> None:
        owned_files.remove_work(self.output)
        owned_files.remove_build(self.output)


def index_tars(tars: Sequence[Path]) -> None:
    """Build the index of each tar, or of each tar in a folder, beside it, and print the damage found.

    Raises ValueError where there is no tar to index, or one does not exist.
    """
    folders = {path: tars_in(path) for path in tars if path.is_dir()}
    for path, found in folders.items():
        for sentence in found.left_out():
            say(f"{path}: left out: {sentence}")
    tars = [tar for path in tars for tar in (folders[path].tars if path in folders else [path])]
    if not tars:
        raise ValueError("no tar to index; name one or more .tar files, or a folder that holds some")
    absent = [str(tar) for tar in tars if not tar.exists()]
    if absent:
        raise ValueError(f"no such file: {', '.join(absent)}")
    for tar in tars:
        index = build_index(tar, earlier=stored_index(tar)[0])
        index.save()
        say(f"{tar}: {len(index):,} samples")
        for line in index.skipped:
            say(f"  left out by rule: {line}")
        for line in index.damage:
            say(f"  damaged: {line}")


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of `packages`, which decide the bytes of a build."""
    return {package: version(package) for package in packages}


def each(work: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """Yield `work(job)` for each job, in order, from `workers` processes (1: this process).

    Leaving the loop ends the processes after their present jobs.

    Raises:
        BrokenProcessPool: a process was killed.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    if workers == 1 or len(jobs) <= 1:
        yield from map(work, jobs)
        return
    # fork is the fastest start, but it is safe only without other threads
    method = "fork" if threading.active_count() == 1 and hasattr(os, "fork") else "spawn"
    context = multiprocessing.get_context(method)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _ignore_interrupts)
    try:
        yield from pool.map(partial(_kept, work), jobs)
    finally:
        pool.shutdown(cancel_futures=True)


def default_workers() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def report(content: dict[str, Any], output: Path, verdict: str = "is complete") -> None:
    """Print the contents of a dataset, and the `verdict` on it."""
    for name, split in content["splits"].items():
        size = sum(shard["bytes"] for shard in split["shards"]) / 1e6
        say(f"  {name}: {split['samples']:,} images, {split['captions']:,} captions, {size:.1f} MB")
    for reason, count in content.get("dropped", {}).items():
        if isinstance(count, int) and count:
            say(f"  left out, {reason}: {count:,}")
    say(f"{content['name']} {verdict} in {output}")


def _kept(work: Callable[[Job], Result], job: Job) -> Result:
    """Do a job in a worker process, whose exceptions lose their traceback on the way back."""
    try:
        return work(job)
    except Exception as error:
        keep_origin(error)
        raise


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    found, wanted = _flat(found), _flat(wanted)
    keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if "source" in keys:
        return f"of {found.get('source')}, not of {wanted['source']}"
    return "; ".join(f"{key} {found.get(key)} there, {wanted.get(key)} asked for" for key in keys)


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "packages"} | dict(options.get("packages", {}))
