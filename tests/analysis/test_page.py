"""The page in a real browser: the query, the layers and the heads change what is drawn; and what a page leaves out."""

import os
import shutil

import numpy as np
import pytest
import timm
import torch
from looking import Page, unpacked
from small_models import alive, small

from foveate._errors import RequestError
from foveate.analysis import attention_rollout, layer_views, write_page

X = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
PICTURE = torch.randint(0, 256, (32, 48, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread):
    """Use one thread: the models are tiny."""


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium. With CI=true a missing one fails."""
    binary, driver = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
    if binary is None or driver is None:
        missing = "no Chromium with chromedriver: apt-get install chromium chromium-driver"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1200,900")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def views():
    """Neighborhoods, agents, pooled keys, class tokens, channels, gates: the kinds of layers that a page draws."""
    return {name: layer_views(alive(small(name)), X) for name in ("nat_mini", "agent_deit_tiny", "fv_davit_tiny")}


@pytest.fixture
def opened(browser, tmp_path):
    """A function that writes a page of views, opens it, and waits for its first picture."""
    from selenium.webdriver.support.ui import WebDriverWait

    def go(views, **options):
        write_page(PICTURE, views, tmp_path / "page.html", **options)
        browser.get((tmp_path / "page.html").as_uri())
        WebDriverWait(browser, 20).until(lambda b: b.execute_script("return document.getElementById('name').innerText"))
        return browser

    return go


def shown(browser) -> dict:
    return browser.execute_script("return shown()")


def pixels(browser) -> str:
    return browser.execute_script("return document.getElementById('view').toDataURL()")


def point(browser, x: float, y: float, click: bool = False) -> None:
    """Move the pointer to a pixel of the image."""
    from selenium.webdriver import ActionChains

    canvas = browser.find_element("id", "view")
    scale = browser.execute_script("return document.getElementById('view').clientWidth") / PICTURE.shape[1]
    size = canvas.size
    offset = round(x * scale - size["width"] / 2) + 1, round(y * scale - size["height"] / 2) + 1
    actions = ActionChains(browser).move_to_element_with_offset(canvas, *offset)
    (actions.click() if click else actions).perform()


def choose(browser, element: str, value: int, event: str) -> None:
    script = "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
    browser.execute_script(script + "e.dispatchEvent(new Event(arguments[2]))", element, value, event)


def assert_shows(browser, view, head: int | None, query: int) -> None:
    """What the page draws is the row of the query, to 1e-5."""
    found, weights = shown(browser), view.weights([query])
    expected = weights[:, 0].mean(0) if head is None else weights[head, 0]
    assert found["query"] == query
    np.testing.assert_allclose(found["weights"], expected, rtol=0, atol=1e-5)


def test_the_query_follows_the_pointer_and_a_click_pins_it(opened, views):
    view = views["nat_mini"][0]  # 8 x 12 tokens of 4 px
    browser = opened(views["nat_mini"])
    point(browser, 5, 6)
    first = pixels(browser)
    assert_shows(browser, view, None, view.query_at(5, 6))
    point(browser, 41, 21)
    assert pixels(browser) != first
    assert_shows(browser, view, None, view.query_at(41, 21))
    point(browser, 22, 10, click=True)
    pinned = pixels(browser)
    point(browser, 2, 30)
    assert pixels(browser) == pinned and "pinned" in browser.find_element("id", "query").text
    assert_shows(browser, view, None, view.query_at(22, 10))
    point(browser, 2, 30, click=True)
    point(browser, 3, 3)
    assert_shows(browser, view, None, view.query_at(3, 3))


def test_the_slider_changes_the_layer_and_the_choice_the_head(opened, views):
    from selenium.webdriver.common.keys import Keys

    browser = opened(views["nat_mini"], query=(20, 10))
    first, name = pixels(browser), browser.find_element("id", "name").text
    browser.find_element("id", "layer").send_keys(Keys.ARROW_RIGHT)
    view = views["nat_mini"][1]
    assert browser.find_element("id", "name").text == view.title != name
    assert pixels(browser) != first
    assert_shows(browser, view, None, view.query_at(20, 10))
    mean = pixels(browser)
    for head in (0, 1):
        choose(browser, "head", head, "change")
        assert pixels(browser) != mean
        assert_shows(browser, view, head, view.query_at(20, 10))
    assert [option.text for option in browser.find_elements("css selector", "#head option")] == [
        "mean", "head 0", "head 1",
    ]  # fmt: skip


def test_keys_move_the_query_by_a_token(opened, views):
    from selenium.webdriver.common.keys import Keys

    view = views["nat_mini"][0]
    browser = opened(views["nat_mini"], query=(18, 10))
    browser.find_element("id", "view").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert_shows(browser, view, None, view.query_at(22, 14))


def test_an_image_wider_than_the_page_is_shown_smaller_and_the_query_follows(opened, views):
    view = views["nat_mini"][0]
    browser = opened(views["nat_mini"])
    browser.execute_script("document.querySelector('main > div').style.width = '90px'")
    sides = "const c = document.getElementById('view'); return [c.clientWidth, c.clientHeight]"
    width, height = browser.execute_script(sides)
    assert width <= 90 and abs(height / width - 32 / 48) < 0.05
    for x, y in ((41, 21), (6, 30)):
        point(browser, x, y)
        assert_shows(browser, view, None, view.query_at(x, y))


def test_class_tokens_and_agents_can_be_queries(opened, views):
    from selenium.webdriver.common.keys import Keys

    of_model = views["agent_deit_tiny"]
    browser = opened(of_model, query=(20, 10))
    assert_shows(browser, of_model[0], None, of_model[0].query_at(20, 10))
    choose(browser, "token", 0, "change")  # the class token
    assert_shows(browser, of_model[0], None, 0)
    assert float(browser.find_element("id", "before").text) == pytest.approx(
        float(of_model[0].weights([0])[:, 0, 0].mean()), abs=2e-4
    )
    browser.find_element("id", "view").send_keys(Keys.ARROW_RIGHT)  # from the class token back to the image
    assert_shows(browser, of_model[0], None, of_model[0].query_at(28, 10))
    point(browser, 20, 10, click=True)
    choose(browser, "layer", 1, "input")
    assert of_model[1].branch == "gather"
    assert_shows(browser, of_model[1], None, of_model[1].query_at(20, 10))


def test_every_layer_of_every_kind_is_drawn_without_an_error(opened, views):
    more = [layer_views(alive(small(name)), X) for name in ("ela_resnet18_b", "eca_resnet18", "ulsam_mobilenetv2")]
    every = [view for of_model in (*views.values(), *more) for view in of_model]
    browser = opened(every)
    browser.get_log("browser")
    pictures = set()
    for number, view in enumerate(every):
        choose(browser, "layer", number, "input")
        assert browser.find_element("id", "name").text == view.title
        pictures.add(pixels(browser))
    assert browser.get_log("browser") == [] and len(pictures) > 0.9 * len(every)


def test_the_page_begins_with_the_wanted_query_and_head(opened, views):
    view = views["nat_mini"][1]
    browser = opened([view], query=(40, 30), head=1)
    assert_shows(browser, view, 1, view.query_at(40, 30))
    point(browser, 2, 2)
    assert_shows(browser, view, 1, view.query_at(40, 30))  # pinned


# Without a browser


def test_a_page_loads_nothing(views, tmp_path):
    write_page(PICTURE, views["nat_mini"], tmp_path / "page.html", title="</script><b>")
    text = (tmp_path / "page.html").read_text()
    assert "http" not in text and "src=" not in text and "@import" not in text and "</script><b>" not in text
    assert text.count("<script>") == 1 == text.count("</script>")


def test_only_keys_that_a_query_sees_are_stored(views, tmp_path):
    write_page(PICTURE, views["nat_mini"], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    view = page.views[0]
    starts = unpacked(view["starts"], "<u4")
    assert len(starts) == 97 and (np.diff(starts) == 9).all()  # of 96 keys
    assert len(unpacked(view["weights"][0], "<u2")) == 96 * 9 == len(unpacked(view["seen"], "<u2"))


def test_a_page_of_many_weights_leaves_out_queries_and_says_so(tmp_path):
    views = layer_views(alive(small("gqa_vit_tiny")), torch.randn(1, 3, 64, 96))  # 8 x 12 tokens, all see all
    picture = torch.zeros(64, 96, 3, dtype=torch.uint8)
    left_out = write_page(picture, views, tmp_path / "page.html", budget_bytes=60_000)
    page = Page(tmp_path / "page.html")
    assert len(left_out) == len(views) and "row and column of the queries is stored" in page.views[0]["note"]
    for number, view in enumerate(views):
        numbers, weights = page.weights(number)
        assert 0 in numbers and 1 < len(numbers) < 97  # the class token, and some of the map
        np.testing.assert_allclose(weights, view.weights(numbers), rtol=0, atol=1e-5)
    assert (tmp_path / "page.html").stat().st_size < 60_000 + 40_000  # the script and the image


def test_one_query_of_every_layer_is_stored_in_any_case(views, tmp_path):
    write_page(PICTURE, views["nat_mini"], tmp_path / "page.html", budget_bytes=1)
    page = Page(tmp_path / "page.html")
    assert all(len(page.weights(number)[0]) == 1 for number in range(len(page.views)))


def test_a_page_of_nothing_is_refused(views, tmp_path):
    with pytest.raises(RequestError, match="got no view"):
        write_page(PICTURE, [], tmp_path / "page.html")
    with pytest.raises(RequestError, match="wanted a head from 0 to 1, got 2"):
        write_page(PICTURE, views["nat_mini"], tmp_path / "page.html", head=2)
    with pytest.raises(RequestError, match=r"inside the image, 0 <= x < 48 and 0 <= y < 32, got 48,0"):
        write_page(PICTURE, views["nat_mini"], tmp_path / "page.html", query=(48, 0))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_page_of_a_whole_model_stays_small(tmp_path):
    model, x = timm.create_model("nat_mini").eval(), torch.randn(1, 3, 224, 224)
    views = layer_views(model, x)
    left_out = write_page(torch.zeros(224, 224, 3, dtype=torch.uint8), views, tmp_path / "page.html")
    assert left_out == [] and (tmp_path / "page.html").stat().st_size < 15e6


def test_rollout_is_a_layer_of_the_page(opened):
    views = layer_views(alive(small("gqa_vit_tiny")), X)
    rolled = attention_rollout(views)
    browser = opened([*views, rolled], query=(20, 10))
    choose(browser, "layer", len(views), "input")
    assert_shows(browser, rolled, None, rolled.query_at(20, 10))
