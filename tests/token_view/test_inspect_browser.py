"""The page in headless Chromium: a token is pointed at, clicked and reached by keys, and its panel is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndistil.models import load_model, load_tokenizer
from aligndistil.recipe import Model, load_recipe
from aligndistil.token_view import Request, inspect, write_page
from support.recipes import three_stages
from support.run_folders import finish

selenium = pytest.importorskip("selenium", reason="needs selenium: pip install selenium")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs Chromium: apt-get install chromium chromium-driver"
)
OFFLINE = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1400,1000"
)
HOSTILE = "<script>alert(1)</script> and </script>"
TINY = Model(path="builtin:tiny")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of models that can spell anything: the embedded one, and two that differ from it a little."""
    folder = tmp_path_factory.mktemp("browser")
    models = {}
    for number, name in enumerate(("dpo", "reverse", "policy")):
        torch.manual_seed(number)
        model, tokenizer = load_model("builtin:tiny", TINY, trained=False), load_tokenizer("builtin:tiny", TINY)
        for weight in model.parameters():
            weight.data += 0.02 * torch.randn_like(weight)
        models[name] = str(folder / f"model-{name}")
        model.save_pretrained(models[name])
        tokenizer.save_pretrained(models[name])
    rows = [{"prompt": HOSTILE, "chosen": f"Good.\n\nIt {HOSTILE} soars", "rejected": "Bad \U0001f600"}] * 2
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = three_stages("builtin:tiny", str(folder / "pairs.jsonl"), output_dir=str(folder / "run"))
    (folder / "toy.yaml").write_text(json.dumps(recipe))
    run = finish(load_recipe(folder / "toy.yaml"), models)
    request = Request(prompts=[HOSTILE], rows=[1], max_new_tokens=12)
    return inspect(run, request, folder / "page.html")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for option in (*OFFLINE.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: Any, page: Path) -> Any:
    chromium.get("about:blank")
    chromium.get(page.as_uri())
    return chromium


@pytest.fixture(scope="module")
def data(page: Path) -> Any:
    return json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])


def one(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def texts(browser: Any, selector: str) -> list[str]:
    return [found.get_property("textContent") for found in browser.find_elements("css selector", selector)]


def panel(browser: Any) -> str:
    return str(one(browser, "#panel .where").text)


def terms(browser: Any) -> dict[str, str]:
    return dict(zip(texts(browser, "#panel dt"), texts(browser, "#panel dd"), strict=True))


def token(browser: Any, index: int) -> Any:
    return one(browser, f"#token-{index}")


def press(browser: Any, *keys: str) -> None:
    browser.switch_to.active_element.send_keys(*keys)


def test_a_clicked_token_shows_its_values_and_every_models_likeliest_tokens(browser: Any, data: Any) -> None:
    response = data["responses"][0]
    token(browser, 3).click()
    assert panel(browser) == f"token 4 of {len(response['tokens'])}, id {response['tokens'][3][2]}, prompt 1"
    shown = terms(browser)
    assert float(shown["αt"]) == pytest.approx(response["terms"]["alpha"][3], rel=0.01)
    assert float(shown["reward"].replace("−", "-")) == pytest.approx(response["terms"]["reward"][3], rel=0.05, abs=6e-5)
    assert texts(browser, "#panel thead small") == ["dpo", "reverse", "what it learns", "this stage"]
    rows = browser.find_elements("css selector", "#panel tbody tr")
    assert len(rows) == len(response["candidates"][3])
    came = texts(browser, "#panel tr.came td")
    exact = [100 * response["probabilities"][one["key"]][3][0] for one in data["distributions"]]
    assert [float(text.replace("<", "")) for text in came] == pytest.approx(exact, rel=0.06, abs=0.01)
    ranks = [str(response["ranks"][one["key"]][3] + 1) for one in data["distributions"]]
    assert texts(browser, "#panel tfoot td") == ranks


def test_the_pointer_shows_a_token_until_it_leaves(browser: Any) -> None:
    from selenium.webdriver import ActionChains

    token(browser, 1).click()
    ActionChains(browser).move_to_element(token(browser, 4)).perform()
    assert panel(browser).startswith("token 5 of")
    ActionChains(browser).move_to_element(one(browser, "h1")).perform()
    assert panel(browser).startswith("token 2 of")


def test_keys_move_between_tokens_and_lines(browser: Any, data: Any) -> None:
    from selenium.webdriver import Keys

    count = len(data["responses"][0]["tokens"])
    token(browser, 0).click()
    one(browser, "h1").click()
    token(browser, 0).send_keys(Keys.ARROW_RIGHT)
    press(browser, Keys.ARROW_RIGHT)
    assert panel(browser).startswith("token 3 of")
    press(browser, Keys.ARROW_LEFT)
    assert panel(browser).startswith("token 2 of")
    press(browser, Keys.END)
    assert panel(browser).startswith(f"token {count} of")
    press(browser, Keys.HOME, Keys.ARROW_LEFT)
    assert panel(browser).startswith("token 1 of")
    browser.find_elements("css selector", "#responses button")[1].click()
    token(browser, 0).send_keys(Keys.ARROW_DOWN)
    tops = [token(browser, index).location["y"] for index in range(len(data["responses"][1]["tokens"]))]
    now = int(panel(browser).split()[1]) - 1
    assert tops[now] > tops[0]
    press(browser, Keys.ARROW_UP)
    assert tops[int(panel(browser).split()[1]) - 1] == tops[0]


def test_tab_reaches_the_tokens_at_the_chosen_one(browser: Any) -> None:
    token(browser, 2).click()
    assert browser.execute_script("return document.activeElement.id") == "token-2"
    reachable = browser.find_elements("css selector", "#tokens [tabindex='0']")
    assert [found.get_attribute("id") for found in reachable] == ["token-2"]


def test_every_term_colours_the_tokens(browser: Any, data: Any) -> None:
    def colours() -> list[str]:
        return [
            found.value_of_css_property("background-color") for found in browser.find_elements("css selector", ".token")
        ]

    seen = {}
    for option in browser.find_elements("css selector", "#colours label"):
        option.click()
        seen[option.text] = colours()
        assert one(browser, "#about").text
    assert len(seen) == len(data["terms"])
    assert len({tuple(found) for found in seen.values()}) > 4
    response = data["responses"][0]
    for value, shade in zip(response["terms"]["reward"], seen["reward"], strict=True):
        *rgb, opacity = (
            [float(part) for part in shade.split("(")[1].rstrip(")").split(",")] if "rgba" in shade else [0] * 4
        )
        if opacity > 0.1:
            assert (rgb[0] > rgb[2]) == (value < 0)


def test_text_of_prompts_and_models_is_text(browser: Any, data: Any) -> None:
    from selenium.common.exceptions import NoAlertPresentException

    with pytest.raises(NoAlertPresentException):
        browser.switch_to.alert.accept()
    assert HOSTILE.replace(" ", "") in one(browser, "#prompt").text.replace("·", "").replace(" ", "").replace("\n", "")
    browser.find_elements("css selector", "#responses button")[1].click()
    shown = one(browser, "#tokens").text
    assert "<script>alert(1)</script>" in shown
    assert shown.count("↵") == 2
    assert len(browser.find_elements("css selector", "script")) == 2
    assert one(browser, "#tokens .special").text == data["responses"][1]["tokens"][-1][0]


def test_names_and_tokens_that_are_markup_are_text(browser: Any, data: Any, tmp_path: Path) -> None:
    from selenium.common.exceptions import NoAlertPresentException

    markup = "<img onerror=alert(1)></script><script>alert(2)</script><!--"
    changed = json.loads(json.dumps(data))
    first = changed["responses"][0]
    first["tokens"][2][0] = first["prompt"][0][0] = first["label"] = changed["stage"] = markup
    changed["distributions"][0]["path"] = changed["terms"][0]["label"] = changed["settings"][0][0] = markup
    changed["vocabulary"][str(first["tokens"][2][2])][0] = markup
    browser.get(write_page(tmp_path / "markup.html", changed).as_uri())
    token(browser, 2).click()
    with pytest.raises(NoAlertPresentException):
        browser.switch_to.alert.accept()
    assert len(browser.find_elements("css selector", "img")) == 0
    assert one(browser, "#panel h2").text == markup.replace(" ", "·")
    places = ("#prompt", "#run", "#facts", "#responses", "#colours", "#panel thead", "#panel dl")
    assert all("<script>alert(2)</script>" in texts(browser, place)[0] for place in places)
    assert markup.replace(" ", "·") in texts(browser, "#panel tr.came th")


def test_parts_of_characters_are_marked(browser: Any) -> None:
    browser.find_elements("css selector", "#responses button")[2].click()
    assert len(browser.find_elements("css selector", "#tokens .bytes")) > 1


def test_the_histogram_counts_all_tokens_and_the_loss_adds_up(browser: Any, data: Any) -> None:
    everything = sum(len(response["tokens"]) for response in data["responses"])
    assert f"αt of {everything} tokens" in texts(browser, "#histogram-title")[0]
    titles = [found.get_attribute("title") for found in browser.find_elements("css selector", "#histogram > div")]
    shares = [title.split(": ")[1].replace("<", "").split(" % of the ") for title in titles]
    assert sum(float(share[0]) for share in shares) == pytest.approx(100, abs=1)
    assert sum(float(share[1].split(", ")[1]) for share in shares) == pytest.approx(100, abs=1)
    positions = one(browser, "#positions").get_attribute("aria-label").replace(" %", "").split(", ")
    assert sum(float(share.replace("<", "")) for share in positions) == pytest.approx(100, abs=1)
    one(browser, "#scopes label").click()
    assert f"of {len(data['responses'][0]['tokens'])} tokens" in texts(browser, "#histogram-title")[0]


def test_the_heaviest_token_leads_to_its_response(browser: Any, data: Any) -> None:
    parts = [
        (part, number, index)
        for number, response in enumerate(data["responses"])
        for index, part in enumerate(response["loss"])
    ]
    _, number, index = max(parts)
    one(browser, "#loss button").click()
    assert panel(browser).startswith(f"token {index + 1} of")
    assert panel(browser).endswith(data["responses"][number]["label"])


def test_nothing_is_asked_of_the_network_and_nothing_goes_wrong(browser: Any) -> None:
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_page_follows_the_readers_colour_scheme(browser: Any) -> None:
    shades = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        shades.append(one(browser, "body").value_of_css_property("background-color"))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    light, dark = (sum(map(float, shade.split("(")[1].rstrip(")").split(",")[:3])) for shade in shades)
    assert light > 600 > 100 > dark
