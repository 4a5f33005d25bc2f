"""The page of the service, in a real browser. What it mostly talks to is `fake_service`, which does as a test says."""

import hashlib
import io
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from fake_service import STATIC, Refusal, Service, volume_files
from PIL import Image
from service import Service as RealService

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -r requirements-dev.txt")
from playwright.sync_api import Browser, Page, expect  # noqa: E402

CHROMIUM = shutil.which("chromium")
# Quiet towards the network; WebGL 2 without a GPU.
QUIET = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
ARGUMENTS = [*QUIET, "--disable-sync", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
DESKTOP, PHONE = {"width": 1000, "height": 640}, {"width": 360, "height": 740}
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        expect.set_options(timeout=120_000)
        volume_files(7)  # The first phantom reads the template, which takes seconds.
        yield browser
        browser.close()


@pytest.fixture
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    """At the root, or at the path that a test gives as this fixture's parameter."""
    service = Service(getattr(request, "param", ""))
    yield service
    service.stop()


@pytest.fixture
def visit(browser: Browser, service: Service) -> Iterator[Callable[..., Page]]:
    """Open a service's page: `visit(expected="", url=service.url, **context)`.

    At the end no request has gone elsewhere, and the console has said nothing bad but what is `expected`: the browser
    logs each answer of 400 and above.
    """
    visits = []

    def open_page(expected: str = "", url: str = service.url, **context: object) -> Page:
        page = browser.new_context(viewport=context.pop("viewport", DESKTOP), **context).new_page()
        page.set_default_timeout(20_000)
        requests: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        visits.append((expected, url, page, requests, complaints))
        page.goto(url)
        return page

    yield open_page
    for expected, url, page, requests, complaints in visits:
        page.context.close()
        hosts = {urlsplit(url).netloc for url in requests if urlsplit(url).scheme not in ("blob", "data")}
        assert hosts == {urlsplit(url).netloc}
        assert [asked for asked in requests if asked.startswith("http") and not asked.startswith(url)] == []
        assert [text for text in complaints if not (expected and re.search(expected, text))] == []


def generate(page: Page, seed: int | str, shown: bool = True) -> None:
    page.get_by_label("Seed", exact=True).fill(str(seed))
    page.get_by_role("button", name="Generate").click()
    if shown:
        expect(page.locator("#pane-a .title")).to_contain_text(f"Seed {seed}")


def card(page: Page, seed: int) -> playwright.Locator:
    return page.locator(".job").filter(has=page.get_by_role("heading", name=f"Seed {seed}", exact=True))


def pixels(page: Page, pane: str) -> np.ndarray:
    """What is seen of a canvas: (rows, columns, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(page.locator(f"#{pane} canvas").screenshot())).convert("RGB"))


def differ(one: np.ndarray, other: np.ndarray) -> float:
    """Share of the pixels' values that are not the same; screenshots may differ by a row."""
    rows, columns = np.minimum(one.shape[:2], other.shape[:2])
    return float((one[:rows, :columns] != other[:rows, :columns]).mean())


def drawn(page: Page, pane: str = "pane-a") -> np.ndarray:
    """The canvas as soon as there is a volume in it: in each quarter many different greys beside the background."""
    deadline = time.monotonic() + 120
    while True:
        seen = pixels(page, pane)
        rows, columns = (n // 2 for n in seen.shape[:2])
        quarters = [seen[r : r + rows, c : c + columns] for r in (0, rows) for c in (0, columns)]
        greys = [np.unique(part[np.ptp(part, axis=-1) == 0][:, 0]).size for part in quarters]
        if min(greys) > 60:
            return seen
        assert time.monotonic() < deadline, f"different greys in the four quarters of {pane}: {greys}"


def test_what_is_vendored_is_what_was_made() -> None:
    recorded = dict(line.split()[::-1] for line in (STATIC / "vendor" / "SHA256SUMS").read_text().splitlines())
    found = {name: hashlib.sha256((STATIC / "vendor" / name).read_bytes()).hexdigest() for name in recorded}
    assert found == recorded
    assert set(recorded) == {"niivue.min.js", "LICENSES.txt"}


def test_lock_file_names_no_registry() -> None:
    assert '"resolved"' not in (STATIC / "package-lock.json").read_text()
    assert '"node_modules/@niivue/niivue"' in (STATIC / "package-lock.json").read_text()


def test_data_never_becomes_markup() -> None:
    for script in STATIC.glob("*.js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", script.read_text())


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js: apt-get install nodejs")
@pytest.mark.parametrize("script", sorted(path.name for path in STATIC.glob("*.js")))
def test_scripts_parse(script: str) -> None:
    command = ["node", "--check", "--input-type=module"]
    done = subprocess.run(command, input=(STATIC / script).read_bytes(), capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


@needs_browser
def test_generate_watch_look_compare_and_download(visit, service, tmp_path: Path) -> None:
    page = visit()
    assert "script-src 'self'" in page.request.get(service.url).headers["content-security-policy"]
    shares = page.evaluate_handle(
        """() => { const seen = []; new MutationObserver(() => {
             const bar = document.querySelector(".job progress"); if (bar && !bar.hidden) seen.push(bar.value);
           }).observe(document.body, {subtree: true, childList: true, attributes: true, characterData: true});
           return seen; }"""
    )
    generate(page, 7)
    assert len({share for share in shares.json_value() if 0 < share < 1}) >= 2
    assert any(path.endswith("/events") for _, path, _ in service.state.seen)
    expect(page.locator("#status")).to_contain_text("Seed 7: Done, kept until")
    first = drawn(page)
    expect(page.get_by_text("Generated image, not a patient").first).to_be_in_viewport()

    generate(page, 8)
    expect(card(page, 7).locator("img[src^=blob]")).to_have_count(1)
    assert differ(drawn(page), first) > 0.05
    card(page, 7).get_by_role("button", name="Compare").click()
    expect(page.locator("#pane-b .title")).to_contain_text("Seed 7")
    left, right = drawn(page), drawn(page, "pane-b")
    assert differ(left, right) > 0.05

    page.get_by_label("Right to left").fill("0.3")  # One crosshair for both.
    moved = drawn(page), drawn(page, "pane-b")
    assert differ(moved[0], left) > 0.01
    assert differ(moved[1], right) > 0.01
    page.locator("#pane-b canvas").click(position={"x": 80, "y": 120})
    assert page.get_by_label("Right to left").input_value() != "0.3"
    before = drawn(page)
    page.get_by_label("View", exact=True).select_option("Axial")
    assert differ(pixels(page, "pane-a"), before) > 0.05
    page.get_by_role("button", name="End comparison").click()
    expect(page.locator("#pane-b")).to_be_hidden()

    (job_id,) = {job for job, name in service.state.files if name == "synimg_7_0.nii.gz"}
    for button, name in (("NIfTI", "synimg_7_0.nii.gz"), ("Sidecar", "synimg_7_0.json")):
        with page.expect_download() as got:
            card(page, 7).get_by_role("button", name=button).click()
        assert got.value.suggested_filename == name
        got.value.save_as(tmp_path / name)
        assert (tmp_path / name).read_bytes() == service.state.files[job_id, name]
    page.on("dialog", lambda dialog: dialog.accept())
    card(page, 7).get_by_role("button", name="Delete").click()
    expect(card(page, 7)).to_have_count(0)
    expect(page.get_by_role("heading", name="Your jobs")).to_be_focused()
    assert job_id not in service.state.jobs


@needs_browser
def test_log_in_fails_then_works_and_ends(visit, service) -> None:
    service.state.keys = {"right": "operator", "look": "viewer"}
    page = visit(expected="status of 40[13]")
    key = page.get_by_label("API key or access token")
    for wrong, said in (("wrong", "The key is not accepted"), ("two words", "no spaces")):
        key.fill(wrong)
        key.press("Enter")
        expect(page.locator("#key-error")).to_contain_text(said)
        expect(key).to_be_focused()
    key.fill("right")
    page.get_by_role("button", name="Log in").click()
    expect(page.locator("#caller-name")).to_have_text("Anna (operator)")
    page.reload()
    expect(page.locator("#caller-name")).to_have_text("Anna (operator)")
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]

    service.state.keys["right"] = "viewer"  # The role is taken away while the page is open.
    generate(page, 1, shown=False)
    expect(page.locator("#form-error")).to_contain_text("Your role, operator, does not allow this")
    del service.state.keys["right"]  # And the key is revoked.
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#key-error")).to_contain_text("revoked")
    assert page.evaluate("sessionStorage.length") == 0

    key.fill("look")
    key.press("Enter")
    expect(page.get_by_text("Your role, viewer, may look")).to_be_visible()
    expect(page.get_by_role("button", name="Generate")).to_be_hidden()
    page.get_by_role("button", name="Log out").click()
    expect(key).to_be_focused()
    assert page.evaluate("sessionStorage.length") == 0


@needs_browser
def test_mistakes_are_told_at_the_field(visit, service) -> None:
    service.state.conditions = {"sex": ["female", "male"]}
    page = visit(expected="status of 4(22|29)")
    page.get_by_label("Steps").fill("0")
    generate(page, "seven", shown=False)
    expect(page.locator("#seed-error")).to_contain_text("A whole number from 0 to 9223372036854775807")
    expect(page.locator("#steps-error")).to_contain_text("from 1 to 1000")
    expect(page.get_by_label("Seed", exact=True)).to_be_focused()
    assert not [method for method, _, _ in service.state.seen if method == "POST"]

    page.get_by_label("Steps").fill("20")
    errors = [{"field": "body.steps", "message": "19 at most."}, {"field": "conditions.sex", "message": "is needed."}]
    service.state.refusal = Refusal(422, "Two fields.", errors)
    generate(page, 7, shown=False)
    expect(page.locator("#steps-error")).to_have_text("19 at most.")
    expect(page.get_by_label("Steps")).to_be_focused()
    expect(page.get_by_label("Steps")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("sex")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#seed-error")).to_be_hidden()

    service.state.refusal = Refusal(422, "One field.", [{"field": "body.dtype", "message": "unknown."}])
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#form-error")).to_have_text("body.dtype: unknown.")
    service.state.refusal = Refusal(429, "You have 20 jobs.", Retry_After="12")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#form-error")).to_have_text("You have 20 jobs. Try again in 12 seconds.")
    expect(page.locator("#steps-error")).to_be_hidden()


@needs_browser
def test_request_is_what_the_form_says(visit, service) -> None:
    service.state.models = ("demo", "fine")
    service.state.conditions = {"sex": ["female", "male"]}
    service.state.hold = True
    page = visit()
    page.get_by_role("button", name="Random seed").click()
    assert int(page.get_by_label("Seed", exact=True).input_value()) > 0
    page.get_by_label("Model").select_option("fine")
    page.get_by_label("Number").fill("3")
    page.get_by_label("sex").select_option("male")
    page.get_by_label("File format").select_option("nii")
    largest = 2**63 - 1  # More than a number of JavaScript holds.
    generate(page, largest, shown=False)
    expect(card(page, largest)).to_contain_text("3 volumes · fine v1 · 10 steps · sex: male")
    expect(page.locator("#status")).to_contain_text("Waiting, place 1")
    (job,) = service.state.jobs.values()
    asked = {"num": 3, "seed": largest, "model": "fine", "format": "nii", "conditions": {"sex": "male"}, "steps": 10}
    assert {name: job["request"][name] for name in asked} == asked
    card(page, largest).get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("None yet.")).to_be_visible()
    assert service.state.jobs == {}


@needs_browser
def test_failed_job_says_why_and_polling_does_without_events(visit, service) -> None:
    service.state.streams, service.state.failure = False, "The device ran out of memory <b>"
    page = visit(expected="status of 503")
    generate(page, 7, shown=False)
    expect(page.locator("#status")).to_have_text("Seed 7: Failed: The device ran out of memory <b>")
    expect(card(page, 7).locator(".state")).to_contain_text("Failed: The device ran out of memory <b>")
    expect(card(page, 7).get_by_role("button", name="NIfTI")).to_have_count(0)


@needs_browser
def test_server_goes_and_comes_back(visit, service) -> None:
    page = visit(expected="ERR_|status of 5")
    service.state.hold = True
    generate(page, 7, shown=False)
    expect(card(page, 7).locator(".state")).to_contain_text("Waiting")
    service.stop()
    gone = page.get_by_role("alert").filter(has_text="The server does not answer. Trying again in")
    expect(gone).to_be_visible()
    expect(gone).to_contain_text("in 2 s")  # Less often each time.
    generate(page, 9, shown=False)  # Waits for the server as well, and is sent once.
    service.state.hold = False
    service.start()
    expect(page.locator("#pane-a .title")).to_contain_text("Seed 9")
    expect(gone).to_be_hidden()
    expect(card(page, 7).locator(".state")).to_contain_text("Done")
    assert len(service.state.jobs) == 2


@needs_browser
def test_older_jobs_come_in_pages(visit, service) -> None:
    service.state.hold = True
    for seed in range(12):
        service.add_job(seed)
    page = visit()
    expect(page.locator(".job")).to_have_count(10)
    page.get_by_role("button", name="Show older jobs").click()
    expect(page.locator(".job")).to_have_count(12)
    expect(page.get_by_role("button", name="Show older jobs")).to_be_hidden()
    assert page.locator(".job h3").all_inner_texts() == [f"Seed {seed}" for seed in reversed(range(12))]


@needs_browser
@pytest.mark.parametrize("service", ["/brains"], indirect=True)
def test_keyboard_alone_behind_a_sub_path(visit, service) -> None:
    page = visit()
    expect(page.get_by_label("Seed", exact=True)).to_be_visible()
    focused = "document.activeElement.id || document.activeElement.textContent.trim()"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "Skip to the content"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "seed"
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("5")
    page.keyboard.press("Enter")
    expect(page.locator("#pane-a .title")).to_contain_text("Seed 5")
    drawn(page)
    # From the first thing to the last and out again: no trap, and everything has a name.
    page.locator(".skip").focus()
    met = []
    while (now := page.evaluate(focused)) not in met and page.evaluate("document.activeElement !== document.body"):
        met.append(now)
        page.keyboard.press("Tab")
    fields = ["seed", "random-seed", "num", "steps", "format", "submit", "view", "x", "y", "z", "turn"]
    assert [name for name in met if name in fields] == fields
    assert met[-2:] == ["Sidecar of seed 5", "Delete the job of Seed 5"]
    unnamed = """[...document.querySelectorAll("button, input, select, canvas, progress")]
      .filter((one) => one.checkVisibility() && !one.labels?.length && !one.ariaLabel && !one.textContent.trim())
      .map((one) => one.outerHTML)"""
    assert page.evaluate(unnamed) == []


@needs_browser
def test_real_service(visit, tmp_path: Path) -> None:
    real = RealService(tmp_path)
    key = real.make_key("operator", "Anna")
    try:
        real.start()
        page = visit(expected="status of 401", url=f"{real.url}/")
        page.get_by_label("API key or access token").fill(key)
        page.get_by_role("button", name="Log in").click()
        expect(page.locator("#caller-name")).to_have_text("Anna (operator)")
        page.get_by_label("Steps").fill("5000")
        generate(page, 3, shown=False)
        expect(page.locator("#steps-error")).not_to_be_empty()
        page.get_by_label("Steps").fill("2")
        generate(page, 3)
        expect(page.locator("#viewer-error")).to_be_empty()
        expect(card(page, 3).locator("img[src^=blob]")).to_have_count(1)
        with page.expect_download() as got:
            card(page, 3).get_by_role("button", name="NIfTI").click()
        with real.client(key) as client:
            (job,) = client.get("/v1/jobs").json()["jobs"]
            made = client.get(f"/v1/jobs/{job['id']}/files/synimg_3_0.nii.gz").content
        assert Path(got.value.path()).read_bytes() == made
        page.get_by_role("button", name="Log out").click()
    finally:
        real.stop()


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_light_and_dark(visit, service, scheme: str) -> None:
    service.state.conditions = {"sex": ["female", "male"]}
    page = visit(viewport=PHONE, color_scheme=scheme, has_touch=True)
    generate(page, 7)
    drawn(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert (
        page.evaluate(
            "[...document.querySelectorAll('body *')].filter((one) => one.checkVisibility() && "
            "!one.closest('.unseen, .skip') && one.getBoundingClientRect().right > innerWidth + 1)"
            ".map((one) => one.tagName + one.id)"
        )
        == []
    )
    assert contrasts(page) == []


def contrasts(page: Page) -> list[str]:
    """Texts whose contrast with what is behind them is below 4.5 (WCAG 2.2, 1.4.3)."""
    return page.evaluate("""() => {
      const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
      const light = (colour) => {
        const [r, g, b] = parts(colour).slice(0, 3).map((v) => v / 255)
          .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const behind = (one) => {
        for (; one; one = one.parentElement) {
          const colour = getComputedStyle(one).backgroundColor;
          if ((parts(colour)[3] ?? 1) > 0.5) return colour;
        }
        return "rgb(255, 255, 255)";
      };
      const own = (one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
      const texts = [...document.querySelectorAll("body *")].filter((one) => one.checkVisibility() && own(one));
      return texts.filter((one) => {
        const [low, high] = [light(getComputedStyle(one).color), light(behind(one))].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05) < 4.5;
      }).map((one) => `${one.tagName} ${one.textContent.trim()}`);
    }""")
