"""Work in parts on Ray Data: each part once, whatever dies in between."""

import json
import logging
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
import ray.data
from upath import UPath

from cluster.store import ClusterError, telling_storage_errors, write_whole
from models.settings import InputError
from pipelines.progress import Progress

Result = dict[str, Any]
Part = TypeVar("Part")


def run_parts(
    name: str,
    parts: Sequence[Part],
    work: Callable[[int, Part], Result],
    folder: UPath,
    progress: Progress,
    gpus: int = 0,
) -> list[Result]:
    """The results of `work(number, part)` for every part, in order, each computed in a Ray Data task with `gpus`.

    A part's result is written to `folder` when the part is done; a rerun computes only the missing ones. `work`
    must therefore write its own output whole before it returns, and the same output each time.

    Raises:
        InputError: raised by `work`, as it was raised there.
        ClusterError: the folder cannot be written.
    """
    with telling_storage_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        finished = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        # What other processes write is not in the listing that fsspec keeps of an object store's folder.
        folder.fs.invalidate_cache()
    results: dict[int, Result] = {}
    missing = []
    for number in range(len(parts)):
        if _marker(number) in finished:
            results[number] = json.loads((folder / _marker(number)).read_text(encoding="utf-8"))
        else:
            missing.append(number)

    def work_on(row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["number"])
        try:
            with telling_storage_errors(str(folder)):
                result = json.dumps(work(number, pickle.loads(row["part"])))
                write_whole(folder / _marker(number), result)
        except (InputError, ClusterError) as error:
            # Told through the data: raised here, Ray would retry it and wrap it in several others.
            return {"number": number, "result": "", "mistake": type(error).__name__, "sentence": str(error)}
        return {"number": number, "result": result, "mistake": "", "sentence": ""}

    with progress.step(name, total=len(parts)) as step:
        step.update(len(results))
        if missing:
            for row in _each([(number, parts[number]) for number in missing], work_on, gpus):
                if row["mistake"]:
                    kind = InputError if row["mistake"] == "InputError" else ClusterError
                    raise kind(row["sentence"])
                results[row["number"]] = json.loads(row["result"])
                step.update(len(results))
    return [results[number] for number in range(len(parts))]


def _each(parts: list[tuple[int, Any]], work_on: Callable[[dict[str, Any]], dict[str, Any]], gpus: int) -> Any:
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # no "progress bars disabled"
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # With one operator there is nobody to reserve for; on two cores half of the time one would stand idle.
    context.op_resource_reservation_enabled = False
    # Each task is sent its own part alone: all of them would make a job's traffic grow with its square.
    items = [{"number": number, "part": pickle.dumps(part)} for number, part in parts]
    rows = ray.data.from_items(items, override_num_blocks=len(items))
    return rows.map(work_on, num_cpus=1, num_gpus=gpus or None).iter_rows()


def _marker(number: int) -> str:
    return f"{number:06d}.json"
