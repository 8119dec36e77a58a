import pytest

from aligndistil.errors import UserError
from aligndistil.recipe.yaml_positions import parse_yaml, read_text


def value(text):
    return parse_yaml(f"a: {text}", "x.yaml").plain()["a"]


def refusal(text):
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "x.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-6", 1e-6),
        ("-2.5E+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000", 1000),
        ("010", 10),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ('"no"', "no"),
        ("'1'", "1"),
        ("nobody", "nobody"),
        (".inf", ".inf"),
        ("0x10", "0x10"),
        ("yEs", "yEs"),
        ("'<<'", "<<"),
        ("[1, a, {b: 2}]", [1, "a", {"b": 2}]),
    ],
)
def test_scalars_are_read_as_a_person_means_them(text, expected):
    read = value(text)
    assert read == expected
    assert type(read) is type(expected)


@pytest.mark.parametrize(("word", "meant"), [("yes", "true"), ("No", "false"), ("ON", "true"), ("off", "false")])
def test_old_booleans_are_refused(word, meant):
    assert refusal(f"a:\n  b: {word}") == (
        f"x.yaml:2:6: `{word}` is a boolean to some YAML readers and a word to others; "
        f'write `{meant}`, or "{word}" in quotes'
    )


def test_an_old_boolean_is_refused_as_a_key_too():
    assert refusal("on: 1").startswith("x.yaml:1:1: `on` is a boolean")


def test_a_key_given_twice_is_refused_with_both_places():
    assert refusal("train:\n  seed: 1\n  epochs: 2\n  seed: 3\n") == (
        "x.yaml:4:3: train.seed: this key was already given at x.yaml:2:3; remove one of them"
    )


def test_every_key_item_and_value_knows_its_place():
    tree = parse_yaml("a:\n  - b: 1\n  - {c:   2}\n", "x.yaml")
    c = tree.find(("a", 1, "c"))
    assert (str(c.at), str(c.value_at), c.path) == ("x.yaml:3:6", "x.yaml:3:11", ("a", 1, "c"))
    assert str(tree.find(("a", 1)).at) == "x.yaml:3:5"


def test_one_mapping_is_a_list_of_one():
    tree = parse_yaml("a: {b: 1}", "x.yaml")
    assert tree.find(("a", 0, "b")) is tree.find(("a", "b"))


def test_the_deepest_node_of_a_path_is_found():
    tree = parse_yaml("a: {b: 1}", "x.yaml")
    found, rest = tree.deepest(("a", "c", "d"))
    assert (found.path, rest) == (("a",), ("c", "d"))


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("a: [1, 2\nb: 3", "x.yaml:2:2: this is not valid YAML: "),
        ("a:\n\t- 1", "x.yaml:2:1: this is not valid YAML: "),
        ("a: *b", "x.yaml:1:4: this is not valid YAML: found undefined alias"),
        ("a: 1\n---\nb: 2", "x.yaml:2:1: this is not valid YAML: "),
        ("a: \x00", "x.yaml:1:4: this is not valid YAML: "),
        ("a: !!python/name:os.system x", "x.yaml:1:4: this is not valid YAML: tags (here 'tag:yaml.org"),
        ("a: &b [*b]", "x.yaml:1:4: a.0: this anchor contains itself"),
        ("<<: {a: 1}", "x.yaml:1:1: merge keys (`<<`) are not supported"),
        ("1: a", "x.yaml:1:1: the key `1` is not a string; write it in quotes"),
        ("[a]: b", "x.yaml:1:1: a key must be a word"),
        ('a: "x\\ud800"', r"x.yaml:1:4: 'x\ud800' holds half a character"),
        ("a: " + "[" * 3000, "x.yaml: lists and mappings are nested too deeply"),
        ("a: 1e999", "x.yaml:1:4: 1e999 is too large for a number"),
        ("a: " + "1" * 5000, "x.yaml:1:4: 11111"),
        ("a: &x 1\nb: &x 2", "x.yaml:2:4: this is not valid YAML: the anchor 'x' was already given"),
        ("a: 1\nb\n", "x.yaml:3:1: this is not valid YAML: could not find expected ':'"),
    ],
)
def test_what_is_no_recipe_yaml_is_refused_in_a_sentence(text, start):
    assert refusal(text).startswith(start)


def test_an_anchor_may_be_used_twice():
    assert parse_yaml("a: &x {b: 1}\nc: *x", "x.yaml").plain() == {"a": {"b": 1}, "c": {"b": 1}}


def test_a_missing_file_and_a_file_that_is_no_text_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_text(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="no such file"):
        read_text(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"name: \xff")
    with pytest.raises(UserError, match="byte 6 is not UTF-8"):
        read_text(tmp_path / "x.yaml")
