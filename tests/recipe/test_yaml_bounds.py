"""YAML that a recipe is not: too deep, too large, or growing as it is read."""

import pytest

from aligndistil.errors import UserError
from aligndistil.recipe import load_recipe

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: " + "[" * 800 + "]" * 800, "nested too deeply"),
        ("a: {" * 60 + "}" * 60, "nested too deeply|not YAML|mapping"),
        (BOMB, "more than 50,000 values, as aliases"),
        (f"train: {{max_steps: {'9' * 5000}}}", "too large for a number"),
        (f"output_dir: {'x' * 300}\n", "a name in this path has 300 bytes, and files may have 255"),
        (f"stages: {{{'x' * 300}: {{}}}}\n", "at most 200 characters"),
        ("data: {train: {path: 'https://me:secret@host/x.jsonl'}}\n", "holds a password or a token"),
        (f"name: hf_{'b' * 34}\n", "holds a password or a token"),
        ('name: "a\\0b"\n', "NUL"),
    ],
)
def test_it_is_refused_in_a_sentence_at_once(tmp_path, text, said):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        load_recipe(path)
    assert "secret" not in str(caught.value)
    assert max(map(len, str(caught.value).splitlines())) < 1000
