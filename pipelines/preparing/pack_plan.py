"""Which files the packed rows of a corpus go to, once its tokens are counted."""

import math
from typing import Any

from pipelines.parts import run_parts
from pipelines.preparing.chunking import chunk_rows_for
from pipelines.preparing.pack_pass import Copies, PackedFile, WeighPass, packed_files
from pipelines.preparing.tokenise_pass import OutputFile
from pipelines.stage import Task

PACKED_SPLITS = ("train", "validation")


def plan_files(
    task: Task, documents: list[OutputFile], tokenised: list[dict[str, Any]], copies: Copies | None
) -> tuple[list[PackedFile], int, int]:
    """The files to write, the rows of a chunk, and how many documents are in no row for their source's weight."""
    left_out = 0
    pack = task.settings.pack
    parts: dict[str, list[tuple[int, int, list[int]]]] = {split: [] for split in PACKED_SPLITS}
    for number, (part, result) in enumerate(zip(documents, tokenised, strict=True)):
        parts[part.split].append((number, result["documents"], [sum(result["tokens"])]))
    if copies:
        numbers = [number for number, _, _ in parts["train"]]
        known = [count for _, count, _ in parts["train"]]
        weigh = WeighPass(copies, str(task.work))
        results = run_parts("weigh", list(zip(numbers, known, strict=True)), weigh, task.work / "weigh", task.progress)
        left_out = sum(known) - sum(result["documents"][0] for result in results)
        parts["train"] = [
            (number, count, result["tokens"]) for number, count, result in zip(numbers, known, results, strict=True)
        ]
    rows = math.ceil(sum(sum(tokens) for _, _, tokens in parts["train"]) / pack.length)
    chunk_rows = pack.chunk_rows or chunk_rows_for(rows)
    files = packed_files("train", parts["train"], pack.length, chunk_rows, 0, copies)
    return (
        [*files, *packed_files("validation", parts["validation"], pack.length, chunk_rows, rows)],
        chunk_rows,
        left_out,
    )
