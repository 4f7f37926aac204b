import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tacit.edge.recipe import BUILT_IN, Recipe, RecipeInvalid, RecipeRefused, load_recipe, recipe_schema


@pytest.fixture
def write(tmp_path: Path):
    def to_file(content: str | bytes, name: str = "recipe.toml") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to_file


def refusal(path: Path | str, *overrides: str) -> tuple[str, str]:
    """Where, without the folder, and the message of the one error that a recipe gives."""
    with pytest.raises(RecipeInvalid) as caught:
        load_recipe(path, overrides)
    assert len(str(caught.value).splitlines()) == 1
    return Path(caught.value.where).name if caught.value.where.startswith("/") else caught.value.where, str(
        caught.value
    )


# What a recipe resolves to.


def test_the_template_shows_the_defaults_it_claims(write):
    assert load_recipe(write("")) == load_recipe("digits")
    assert load_recipe(write("")).digest() == load_recipe("digits").digest()


def test_every_key_of_the_schema_is_in_the_template_or_has_no_default():
    template = (BUILT_IN / "digits.toml").read_text(encoding="utf-8")
    for table, content in Recipe().model_dump().items():
        assert f"[{table}]" in template or table == "compression"
        nested = {name: value for name, value in content.items() if isinstance(value, dict)}
        assert all(f"[{table}.{name}]" in template for name in nested)
        keys = [*content.items(), *(item for value in nested.values() for item in value.items())]
        missing = [key for key, value in keys if value is not None and f"{key} = " not in template]
        assert [key for key in missing if key not in ("variants", *nested)] == []


def test_a_key_that_the_template_comments_out_has_the_value_that_it_shows():
    assert load_recipe("digits").federated.quorum == 5
    assert "# quorum = 5 " in (BUILT_IN / "digits.toml").read_text(encoding="utf-8")


def test_what_a_recipe_leaves_out_is_resolved(write):
    resolved = load_recipe(write("[federated]\nowners = 7\n"))
    assert (resolved.privacy.epsilon, resolved.privacy.max_grad_norm) == (8.0, 1.0)
    assert (resolved.federated.engine, resolved.federated.quorum) == ("sequential", 4)
    without = load_recipe(write('[privacy]\nunit = "none"\n'))
    assert (without.privacy.epsilon, without.privacy.max_grad_norm) == (None, None)
    assert load_recipe(write("[privacy]\nnoise_multiplier = 2.0\n")).privacy.epsilon is None


def test_an_empty_list_of_variants_is_not_replaced_by_the_default_one(write):
    assert load_recipe(write("[compression]\nvariants = []\n")).compression.variants == []
    assert len(load_recipe(write("[compression]\n")).compression.variants) == 6


OVERRIDES = {
    "federated.owners": st.integers(4, 1_000_000),
    "federated.alpha": st.floats(1e-9, 1e9),
    "federated.seed": st.integers(0, 2**63 - 1),
    "federated.quorum": st.integers(1, 4),
    "federated.schedule": st.sampled_from(['"cosine"', '"constant"']),
    "privacy.delta": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "privacy.epsilon": st.floats(1e-6, 1e6),
    "privacy.sample_rate": st.floats(0, 1, exclude_min=True),
    "model.channels": st.lists(st.integers(1, 4096), min_size=1, max_size=8),
    "compression.variants": st.just("[]"),
    "devices.names": st.sampled_from(["[]", '["local"]']),
    "report.twin": st.sampled_from(["true", "false"]),
    "task.name": st.text(st.characters(exclude_categories=["Cs", "Cc"])).map(
        lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    ),
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_resolved_recipe_survives_being_written_and_read(write, data):
    chosen = data.draw(st.lists(st.sampled_from(sorted(OVERRIDES)), unique=True))
    recipe = load_recipe("digits", [f"{key}={data.draw(OVERRIDES[key])}" for key in chosen])
    again = load_recipe(write(recipe.to_toml()))
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert again.to_toml() == recipe.to_toml()


def test_variants_and_their_passes_survive_being_written_and_read(write):
    recipe = load_recipe("digits")
    again = load_recipe(write(recipe.to_toml()))
    assert [v.model_dump() for v in again.compression.variants] == [v.model_dump() for v in recipe.compression.variants]
    assert again.compression.variants[2].passes[0] == {"name": "prune", "ratio": 0.5}


def test_the_digest_ignores_comments_order_and_how_a_number_is_written(write):
    one = load_recipe(write("[privacy]\nepsilon = 3\ndelta = 1e-6\n[federated]\nrounds = 50\n"))
    other = load_recipe(write("# why\n[federated]\nrounds = 5_0 # few\n[privacy]\ndelta = 0.000001\nepsilon = 3.00\n"))
    assert one.digest() == other.digest()


def test_the_digest_changes_with_every_value(write):
    texts = ["", "[federated]\nseed = 2\n", "[privacy]\nepsilon = 8.000001\n", "[report]\ntwin = false\n"]
    assert len({load_recipe(write(text)).digest() for text in texts}) == len(texts)


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("digits").federated.rounds = 3


# Files.


@pytest.mark.parametrize("name", ["with space.toml", "größe 数.toml", "-x.toml", "no-ending"])
def test_any_file_name_is_read(write, name):
    assert load_recipe(write("[federated]\nrounds = 3\n", name)).federated.rounds == 3


def test_a_folder_stands_for_its_recipe(write, tmp_path):
    write("[federated]\nrounds = 3\n")
    assert load_recipe(tmp_path).federated.rounds == 3


@pytest.mark.parametrize("name", ["missing.toml", "folder", "../templates/digits", "", "digits.toml"])
def test_a_recipe_that_is_not_there_is_refused_with_what_would_make_one(tmp_path, monkeypatch, name):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "tacit init" in refusal(name)[1]


def test_a_byte_order_mark_and_windows_line_ends_are_fine(write):
    plain = load_recipe(write("[privacy]\nepsilon = 3.0\n"))
    assert load_recipe(write(b"\xef\xbb\xbf[privacy]\r\nepsilon = 3.0\r\n")) == plain
    assert refusal(write(b"\xef\xbb\xbf[privacy]\r\n\r\nepsilon = 0\r\n"))[0] == "recipe.toml:3:1"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_another_encoding_is_refused_by_name(write, encoding):
    where, message = refusal(write("[task]\nname = 'ä'\n".encode(encoding)))
    assert where == "recipe.toml"
    assert "save the file as UTF-8" in message


@pytest.mark.parametrize("content", [b"\0", b"[task]\nname = 'dig\0its'\n", b"# \0\n"])
def test_a_nul_byte_is_refused(write, content):
    assert "NUL" in refusal(write(content))[1]


# Errors say where.


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("[privacy]\nepsilon = = 3\n", "recipe.toml:2:11"),
        ("[privacy\n", "recipe.toml:1:9"),
        ('a = "\n', "recipe.toml:1:6"),
        ("[federated]\nrounds = 5\nrounds = 6\n", "recipe.toml:3:11"),
    ],
)
def test_a_syntax_error_has_file_line_and_column(write, text, where):
    found, message = refusal(write(text))
    assert found == where
    assert "expected TOML, got a syntax error" in message


@pytest.mark.parametrize(
    ("text", "where", "suggestion"),
    [
        ("[privcy]\nepsilon = 3\n", "recipe.toml:1:1", "did you mean 'privacy'?"),
        ("[privacy]\n\n  epsilonn = 3\n", "recipe.toml:3:3", "did you mean 'epsilon'?"),
        ("[federated]\nround = 3\n", "recipe.toml:2:1", "did you mean 'rounds'?"),
        ("privacy.epsilonn = 3\n", "recipe.toml:1:1", "did you mean 'epsilon'?"),
        ('"federated" . "roundz" = 3\n', "recipe.toml:1:1", "did you mean 'rounds'?"),
        ("zzzz = 3\n", "recipe.toml:1:1", "known: task, model, federated"),
        ("[report]\nzzzz = 3\n", "recipe.toml:2:1", "known: twin"),
    ],
)
def test_an_unknown_key_is_refused_with_its_line_and_a_suggestion(write, text, where, suggestion):
    found, message = refusal(write(text))
    assert found == where
    assert suggestion in message


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('[federated]\nrounds = "100"\n', 'federated.rounds = "100": expected a valid integer'),
        ("[federated]\nrounds = 1.0\n", "federated.rounds = 1.0: expected a valid integer"),
        ("[federated]\nrounds = true\n", "federated.rounds = true: expected a valid integer"),
        ('[privacy]\nepsilon = "8"\n', 'privacy.epsilon = "8": expected a valid number'),
        ("[privacy]\nepsilon = 1979-05-27\n", "privacy.epsilon = 1979-05-27: expected a valid number"),
        ("[task]\nname = 3\n", "task.name = 3: expected a valid string"),
        ("[model]\nchannels = [16, 'a']\n", 'model.channels[1] = "a": expected a valid integer'),
        ("[privacy]\nunit = 'owner'\n", "privacy.unit = \"owner\": expected 'record', 'client', 'local' or 'none'"),
        ("[devices]\nnames = ['lcal']\n", 'devices.names[0] = "lcal": expected a device (local,'),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_line(write, text, shown):
    where, message = refusal(write(text))
    assert where == "recipe.toml:2:1"
    assert shown in message


@pytest.mark.parametrize("key", ["privacy", "compression", "federated", "task"])
def test_a_value_where_a_table_belongs_is_refused_with_its_line(write, key):
    assert refusal(write(f"{key} = 3\n"))[0] == "recipe.toml:1:1"
    assert refusal("digits", f"{key}=3")[0] == f"--set {key}=3"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "0", "0.0", "-1", "-0.0", "1e400"])
@pytest.mark.parametrize("key", ["epsilon", "noise_multiplier", "delta", "max_grad_norm", "sample_rate"])
def test_a_number_that_can_guarantee_nothing_is_refused_with_its_line(write, key, value):
    where, message = refusal(write(f"[privacy]\n{key} = {value}\n"))
    assert where == "recipe.toml:2:1"
    assert message.startswith(f"privacy.{key} = ")


@pytest.mark.parametrize(
    "text",
    [
        "[federated]\nowners = 0\n",
        "[federated]\nrounds = 1_000_001\n",
        "[federated]\nserver_momentum = 1.0\n",
        "[federated]\nseed = -1\n",
        "[federated]\nseed = 9223372036854775808\n",
        "[privacy]\ndelta = 1.0\n",
        "[privacy]\nsample_rate = 1.0000001\n",
        "[model]\nchannels = []\n",
        "[model]\nchannels = [0]\n",
    ],
)
def test_a_value_out_of_range_is_refused_with_its_line(write, text):
    assert refusal(write(text))[0] == "recipe.toml:2:1"


VARIANTS = "[[compression.variants]]\nname = 'a'\nformat = 'onnx'\n\n[[compression.variants]]\nname = 'b'\n"


@pytest.mark.parametrize(
    ("rest", "where"),
    [
        ("format = 'onx'\n", "recipe.toml:7:1"),
        ("format = 'onnx'\nbogus = 3\n", "recipe.toml:8:1"),
        ("format = 'onnx'\n passes = [{ name = ['prune'] }]\n", "recipe.toml:8:2"),
        ("", "recipe.toml:5:1"),
        ("format = 'onnx'\n[[compression.variants]]\nname = 'b c'\n", "recipe.toml:9:1"),
    ],
)
def test_an_error_in_one_variant_points_to_that_variants_line(write, rest, where):
    assert refusal(write(VARIANTS + rest))[0] == where


def test_a_missing_key_is_named(write):
    assert "expected the key 'compression.variants[1].format', got none" in refusal(write(VARIANTS))[1]


@pytest.mark.parametrize("name", ["..", ".hidden", "a/b", "a\\\\b", "", "x" * 65, "CON\\n"])
def test_a_variant_whose_name_is_no_plain_file_name_is_refused(write, name):
    refusal(write(f'[[compression.variants]]\nname = "{name}"\nformat = "onnx"\n'))


# Keys that exclude each other.


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[privacy]\nepsilon = 8.0\nnoise_multiplier = 1.0\n", ["privacy.epsilon", "privacy.noise_multiplier"]),
        ("[privacy]\nunit = 'none'\nepsilon = 8.0\n", ["privacy.epsilon", "privacy.unit='none'"]),
        ("[privacy]\nunit = 'none'\nnoise_multiplier = 1.0\n", ["privacy.noise_multiplier", "privacy.unit='none'"]),
        ("[model]\nnorm = 'batch'\n", ["BatchNorm", "normalisation 1", "normalisation 2", "'cnn'", "model.norm"]),
        ("[federated]\nowners = 3\nquorum = 4\n", ["federated.quorum", "federated.owners=3"]),
        (VARIANTS.replace("'b'", "'a'") + "format = 'tflite'\n", ["'a' twice"]),
    ],
)
def test_keys_that_exclude_each_other_are_refused_by_name(write, text, named):
    with pytest.raises(RecipeRefused) as caught:
        load_recipe(write(text))
    assert [part for part in named if part not in str(caught.value)] == []
    assert "; " in str(caught.value), "says what to do"


def test_batch_normalisation_is_allowed_where_nothing_is_promised(write):
    assert load_recipe(write("[model]\nnorm = 'batch'\n[privacy]\nunit = 'none'\n")).model.norm == "batch"


# --set.


def test_overrides_go_on_top_of_the_file_the_last_one_wins(write):
    path = write("[federated]\nrounds = 3\nalpha = 2.0\n")
    recipe = load_recipe(path, ["federated.rounds=4", " federated.rounds = 5", "task.name=digits", "privacy.epsilon=2"])
    assert (recipe.federated.rounds, recipe.federated.alpha, recipe.task.name) == (5, 2.0, "digits")
    assert recipe.privacy.epsilon == 2.0


def test_fewer_owners_than_the_default_quorum_need_no_second_override():
    assert load_recipe("digits", ["federated.owners=3"]).federated.quorum == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("federated.rounds", "expected table.key=value"),
        ("=3", "expected table.key=value"),
        ("federated.rounds=x", "expected a valid integer"),
        ("federated.rounds=", "expected a valid integer"),
        ("federated.roundz=3", "did you mean 'rounds'?"),
        ("a.b.c=3", "expected a known key, got 'a'"),
        ("federated.rounds.x=3", "expected a valid integer"),
        ("task.name.x=3", "expected a valid string"),
        ("privacy.epsilon=nan", "expected a finite number"),
        ("compression.variants=[{name='a', format='bad'}]", "expected 'onnx', 'tflite', 'ort', 'micro' or 'pte'"),
        ("federated..rounds=3", "expected a known key, got 'federated.'"),
    ],
)
def test_a_bad_override_is_what_the_error_points_to(write, override, message):
    where, found = refusal(write(""), override)
    assert where == f"--set {override}"
    assert message in found


def test_an_override_into_a_value_is_refused(write):
    where, message = refusal(write("[federated]\nrounds = 3\n"), "federated.rounds.x=3")
    assert "expected a table, got the value 'rounds'" in message
    assert where == "--set federated.rounds.x=3"


def test_an_override_cannot_bring_a_second_key_along():
    assert "expected one value" in refusal("digits", "federated.rounds=3\nseed=2")[1]


def test_an_error_in_the_file_is_not_blamed_on_an_override(write):
    assert refusal(write("[federated]\nrounds = 0\n"), "federated.seed=3")[0] == "recipe.toml:2:1"


# The schema.


def _objects(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [schema, *schema["$defs"].values()]


def test_the_schema_describes_every_table_and_forbids_other_keys():
    schema = recipe_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert [found["title"] for found in _objects(schema) if not found.get("description")] == []
    assert [found["title"] for found in _objects(schema) if found["additionalProperties"] is not False] == []


def test_every_reference_in_the_schema_resolves_and_every_key_has_a_type():
    schema = recipe_schema()

    def check(node: object) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                assert node["$ref"].removeprefix("#/$defs/") in schema["$defs"]
            for key, value in node.get("properties", {}).items():
                assert {"type", "$ref", "anyOf", "enum", "const"} & set(value), key
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
            check(child)

    check(schema)


def test_the_template_holds_only_keys_of_the_schema():
    content = tomllib.loads((BUILT_IN / "digits.toml").read_text(encoding="utf-8"))
    schema = recipe_schema()
    for table, keys in content.items():
        definition = schema["properties"][table]["$ref"].removeprefix("#/$defs/")
        assert set(keys) <= set(schema["$defs"][definition]["properties"])


@pytest.mark.parametrize(
    ("override", "gone"),
    [
        ("privacy.noise_multiplier=1.5", "epsilon"),
        ("privacy.unit=none", "epsilon"),
        ("privacy.unit=none", "noise_multiplier"),
    ],
)
def test_an_override_replaces_the_keys_that_exclude_it(override: str, gone: str) -> None:
    assert getattr(load_recipe("digits", [override]).privacy, gone) is None


def test_two_overrides_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(RecipeRefused):
        load_recipe("digits", ["privacy.noise_multiplier=1.5", "privacy.epsilon=2.0"])


def test_the_built_in_recipe_of_many_clients_resolves():
    recipe = load_recipe("writers")
    assert (recipe.task.name, recipe.federated.owners, recipe.privacy.unit) == ("writers", 2000, "client")
    assert 100 <= recipe.federated.owners * (recipe.privacy.sample_rate or 0) <= 200
