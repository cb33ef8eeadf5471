"""Recipes are read as meant, and every mistake in one is told by its path in one sentence."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.settings import InputError
from recipes.loading import load_recipe
from recipes.recipe import Recipe

BASE: dict[str, Any] = {
    "name": "tickets",
    "data": {"source": "tickets.csv", "labels": [{"column": "topic"}], "where": {"text": "a"}},
    "finetune": {"encoder": "some/encoder"},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tickets.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def mistake(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as raised:
        load_recipe(path, overrides)
    return str(raised.value).replace(f"{path}: ", "")


@pytest.mark.parametrize(
    ("override", "reached", "value"),
    [
        ("finetune.learning_rate=5e-5", lambda r: r.finetune.learning_rate, 5e-5),
        ("finetune.dropout=null", lambda r: r.finetune.dropout, None),
        ("finetune.dropout=0", lambda r: r.finetune.dropout, 0.0),
        ("finetune.encoder=/a=b", lambda r: r.finetune.encoder, "/a=b"),
        ("evaluate.gate={accuracy: 0.9}", lambda r: r.evaluate.gate, {"accuracy": 0.9}),
        ("finetune.trackers=[mlflow, wandb]", lambda r: r.finetune.trackers, ("mlflow", "wandb")),
        ("data.labels=[topic, mood]", lambda r: [each.column for each in r.data.labels], ["topic", "mood"]),
        ("data.labels=mood", lambda r: [each.column for each in r.data.labels], ["mood"]),
        ("data.labels.0.column=mood", lambda r: r.data.labels[0].column, "mood"),
        ("data.where[user.name]=x", lambda r: r.data.where, {"text": "a", "user.name": "x"}),
        ("data.where={user: x}", lambda r: r.data.where, {"user": "x"}),
        ("data.source={train: a.csv, test: [b.csv, c.csv]}", lambda r: r.data.source["test"], ("b.csv", "c.csv")),
        ("store=s3://bucket/a", lambda r: r.store, "s3://bucket/a"),
        ("store=/data/${name}", lambda r: r.store, "/data/tickets"),
    ],
)
def test_an_override_is_read_as_the_recipe_would_be(recipe: Path, override: str, reached: Any, value: Any) -> None:
    assert reached(load_recipe(recipe, [override])) == value


def test_the_last_of_two_overrides_holds(recipe: Path) -> None:
    assert load_recipe(recipe, ["finetune.epochs=3", "finetune.epochs=4"]).finetune.epochs == 4


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("finetune.learning_rte=1", "finetune.learning_rte is no setting; did you mean finetune.learning_rate?"),
        ("epochs=3", "epochs is no setting; did you mean pretrain.epochs or finetune.epochs?"),
        ("finetune.encoder=3", "finetune.encoder must be text or a mapping of architecture, size,"),
        ("finetune.encoder={layers: deep}", 'finetune.encoder.layers must be a whole number or null, not "deep".'),
        ("finetune.encoder={hiden_size: 4}", "did you mean finetune.encoder.hidden_size?"),
        ("finetune.encoder.layers=3", 'finetune.encoder is "some/encoder" and has no parts'),
        ("finetune.learning_rate=-1", "finetune.learning_rate must be greater than 0, not -1."),
        ("finetune.learning_rate=fast", 'finetune.learning_rate must be a number, not "fast".'),
        ("finetune.epochs=2.5", "finetune.epochs must be a whole number, not 2.5."),
        ("finetune.epochs=yes", "finetune.epochs must be a whole number, not true."),
        ("finetune.epochs=", "finetune.epochs must be a whole number, not null."),
        ("finetune.class_weights=some", "finetune.class_weights must be one of none, balanced or a mapping"),
        ("finetune.class_weights={a: much}", 'finetune.class_weights.a must be a number, not "much".'),
        ("finetune.trackers=[excel]", 'finetune.trackers.0 must be one of tensorboard, mlflow, wandb, not "excel".'),
        ("data.source=3", "data.source must be text or a list (each text) or a mapping"),
        ("data.source=[a.csv, 3]", "data.source.1 must be text, not 3."),
        ("data.source={train: 3}", "data.source.train must be text or a list (each text), not 3."),
        (
            "data.labels=[{colum: a, column: b}]",
            "data.labels.0.colum is no setting; did you mean data.labels.0.column?",
        ),
        ("data.labels=[]", "data.labels: name at least one column"),
        ("data.where={1: a}", "data.where.1: the key must be text; put quotes around it."),
        ("data.where[user.name]=3", "data.where[user.name] must be text, not 3."),
        ("prepare.tokenizer={vocabulary: 3}", "prepare.tokenizer.vocabulary must be greater than or equal to 300"),
        ("prepare=quick", "prepare must be a mapping of repair,"),
        ("name=Two Words", 'name must match ^[a-z0-9][a-z0-9_-]*$, not "Two Words".'),
        ("prepare.tokenizer={vocabulary: 500}", "prepare.tokenizer: a pretrained encoder brings its own"),
        ("prepare.validation_share=0", "prepare.validation_share: must be above 0"),
        ("data.source={foo: a.csv}", "data.source: 'foo' is no split; there are train"),
        ("data.labels=[a, a]", "data.labels: 'a' is named twice"),
        ("data.labels=[{column: a, separator: ''}]", "data.labels.0.separator"),
        ("data.where={text: '(a'}", "data.where: '(a' (for text) is no regular expression"),
        ("finetune.encoder={architecture: bart3}", "finetune.encoder.architecture: 'bart3' is no architecture"),
        ("finetune.encoder={size: huge}", "finetune.encoder.size must be one of tiny, mini, small, medium, base"),
        ("finetune.encoder={hidden_size: 100, heads: 3}", "finetune.encoder.heads: must divide hidden_size"),
        ("serve.min_replicas=5", "serve: min_replicas is 5, more than max_replicas, 4"),
        ("finetune.workers=9", "9 workers need as many lanes, but finetune.lanes is 4"),
        ("finetune.workers=many", "finetune.workers: must be a number, or a mapping of min and max"),
        ("finetune.fsdp=true", "finetune: fsdp sums gradients in floating point, not exactly: set exact to false"),
        ("evaluate.slices=[region]", "region is not kept by data.columns"),
        ("evaluate.gate={acuracy: 0.8}", "did you mean accuracy?"),
        ("finetune.metric=other.macro_f1", "finetune.metric: 'other.macro_f1' is no metric here"),
        ("finetune.epochs=${nope}", "finetune.epochs: Interpolation key 'nope' not found"),
        ("finetune.epochs=[1", "the override 'finetune.epochs=[1' cannot be applied"),
        ("finetune.epochs", "is no override: write KEY=VALUE, for example finetune.epochs=3."),
        ("=3", "is no override: write KEY=VALUE"),
    ],
)
def test_a_wrong_override_is_told_in_one_sentence(recipe: Path, override: str, told: str) -> None:
    sentence = mistake(recipe, override)
    assert told in sentence
    assert "\n" not in sentence


PRETRAINING = [
    "pack={sources: a.txt, tokenizer: {vocabulary: 500}}",
    "pretrain={encoder: {size: tiny}}",
    "finetune.encoder=pretrain",
]


def test_a_recipe_may_pretrain_its_encoder(recipe: Path) -> None:
    loaded = load_recipe(recipe, PRETRAINING)
    assert loaded.pack is not None
    assert loaded.pack.sources[0].source == "a.txt"
    assert loaded.pretrain is not None
    assert loaded.pretrain.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["pretrain=null"], "finetune.encoder: the recipe has no pretrain section to take the encoder from"),
        (["pack=null"], "pack: pretrain needs this section too, which says the texts to learn from"),
        (["pretrain=null", "finetune.encoder=some/encoder"], "pretrain: pack needs this section too"),
        (["pack.tokenizer=null"], "pack.tokenizer: an encoder from scratch needs one"),
        (["pretrain.encoder=some/encoder"], "pack.tokenizer: an encoder that goes on learning brings its own"),
        (["prepare.tokenizer={vocabulary: 500}"], "prepare.tokenizer: the pretraining brings its own; leave this out"),
        (["prepare.max_length=256"], "prepare.max_length: is 256, but the encoder is pretrained on rows of 128 tokens"),
        (["pretrain.workers=9"], "pretrain.workers: 9 workers need as many lanes, but pretrain.lanes is 4"),
        (["pretrain.objective=nsp"], 'pretrain.objective must be one of mlm, clm, span, not "nsp".'),
        (["pretrain.rate=1"], "pretrain.rate must be less than 1, not 1."),
        (["pretrain.encoder={heads: 3}"], "pretrain.encoder.heads: must divide hidden_size, which is 256, and 3"),
        (["pack.sources=[]"], "pack: sources: name at least one"),
        (["pack.sources=3"], "pack.sources must be"),
        (["pack.sources=[{source: a.txt, weight: 0}]"], "pack.sources.0.weight must be greater than 0, not 0."),
        (["pack.sources=[{source: a.txt, wieght: 1}]"], "did you mean pack.sources.0.weight?"),
        (["pack.sources=[{source: a.txt, weight: 1}, b.txt]"], "pack: sources.1.weight is missing"),
        (["pack.length=4"], "pack.length must be greater than or equal to 8, not 4."),
        (["finetune.encoder=some/encoder"], "finetune.encoder: the recipe pretrains an encoder, but this is another"),
        (["pretrain.objective=clm"], "pretrain: objective: bert models do not learn clm; take mlm"),
        (
            ["finetune.encoder=some/encoder", "evaluate.without_pretraining=true"],
            "evaluate.without_pretraining: there is no pretraining; set finetune.encoder to pretrain",
        ),
    ],
)
def test_what_does_not_fit_the_pretraining_is_told(recipe: Path, overrides: list[str], told: str) -> None:
    sentence = mistake(recipe, *PRETRAINING, *overrides)
    assert told in sentence
    assert "\n" not in sentence


def test_each_mistake_has_its_line(recipe: Path) -> None:
    assert len(mistake(recipe, "finetune.epochs=x", "evaluate.split=train", "stroe=a").splitlines()) == 3


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: [", "is not YAML: line 2, column 1:"),
        (b"name: x\n\tb: 3", "is not YAML: line 2, column 1: found a tab character"),
        (b"name: a\nname: b", "line 2, column 1: found duplicate key name"),
        (b"\xff\xfe\x00", "is not YAML: it is not UTF-8 text"),
        (b"\x00", "cannot be read as YAML"),
        (b"!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (b"&a [*a]", "is not YAML"),
        (b"- name", "is no recipe: it must be a mapping with name, data and finetune"),
        (b"name: x", "data is missing"),
        (b"name: 3\ndata: x\nfinetune: y", "name must be text, not 3"),
    ],
)
def test_a_file_that_is_no_recipe_is_told(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    assert told in mistake(path)


def test_a_missing_file_is_told_with_what_there_is() -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml is no file\. Ready recipes: .*airline\.yaml"):
        load_recipe("nowhere.yaml")


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_ready_recipes_are_valid(path: Path) -> None:
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize("model", [Recipe])
def test_every_setting_is_described(model: type[Recipe]) -> None:
    def bare(properties: dict[str, Any], where: str) -> list[str]:
        return [f"{where}.{name}" for name, each in properties.items() if "description" not in each]

    schema = model.model_json_schema()
    stages = set(schema["properties"]) - {"name", "store"}
    top = {name: each for name, each in schema["properties"].items() if name not in stages}
    assert bare(top, "recipe") == []
    assert [each for name, part in schema["$defs"].items() for each in bare(part["properties"], name)] == []


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
KEYS = st.sampled_from(["name", "data", "finetune", "encoder", "labels", "source", "column", "where", "gate", "x.y"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.integers(0, 2) | st.text(max_size=4), inner),
    max_leaves=12,
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path: Path, overrides: tuple[str, ...] = ()) -> None:
    """Any outcome will do but an error that is not ours."""
    with contextlib.suppress(InputError):
        load_recipe(path, overrides)


@FUZZ
@given(content=st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_no_file_ends_in_another_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "fuzz.yaml"
    path.write_bytes(content)
    read(path)


@FUZZ
@given(value=VALUES, part=st.sampled_from(["data", "prepare", "finetune", "evaluate", "serve", "name"]), field=KEYS)
def test_no_value_ends_in_another_error(tmp_path: Path, value: object, part: str, field: str) -> None:
    path = tmp_path / "fuzz.yaml"
    for changed in ({part: value}, {part: {**BASE.get(part, {}), field: value}} if part != "name" else {}):
        path.write_text(yaml.safe_dump(BASE | changed))
        read(path)


@FUZZ
@given(
    key=st.lists(KEYS | st.sampled_from(["0", "epochs", "dropout", "[a.b]"]) | st.text(max_size=5)).map(".".join),
    value=st.text(max_size=10) | st.sampled_from(["{a: 1}", "[1, 2]", "5e-5", "null", "${name}", "${", "{", "a=b"]),
)
def test_no_override_ends_in_another_error(recipe: Path, key: str, value: str) -> None:
    read(recipe, (f"{key}={value}",))


@pytest.mark.parametrize("source", ["hub://owner/name@v1.0", "hub://owner/data-v1.5", "saved-1.1", "folder"])
def test_data_that_may_bring_a_validation_split_needs_no_share_for_it(recipe: Path, source: str) -> None:
    loaded = load_recipe(recipe, [f"data.source={source}", "prepare.validation_share=0"])
    assert loaded.prepare.validation_share == 0
