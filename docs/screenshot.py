"""Makes docs/page.png: the page of a running endpoint for the airline tweets, while it is asked.

    shoal serve recipes/airline.yaml
    python docs/screenshot.py http://127.0.0.1:8000 tweets.txt

The file holds texts, one a line, which are classified meanwhile, so that there are figures to show.
"""

import io
import itertools
import shutil
import sys
import threading
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import sync_playwright

TEXT = "@united my flight was cancelled and nobody at the desk could tell me why. The crew was lovely though!"


def take(url: str, texts: list[str], path: Path) -> None:
    """Opens the page, classifies a text, asks why, and takes the picture once the figures are there."""
    done = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            for text in itertools.cycle(texts):
                client.post("/v1/classify", json={"texts": [text]})
                if done.wait(0.04):
                    return

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        with sync_playwright() as playwright:
            arguments = ["--no-sandbox", "--force-color-profile=srgb"]
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
            size = {"width": 1120, "height": 720}
            page = browser.new_page(viewport=size, device_scale_factor=1.25)  # type: ignore[arg-type]
            page.goto(url)
            page.get_by_label("Text", exact=True).fill(TEXT)
            page.get_by_role("button", name="Classify").click()
            page.get_by_role("button", name="Why negative?").click()
            page.locator(".why").wait_for(timeout=120_000)
            page.locator("#drift").wait_for(timeout=120_000)
            page.mouse.move(0, 0)
            page.wait_for_timeout(15_000)  # Until rates are of five readings.
            picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
            picture.quantize(128).save(path, optimize=True)
            browser.close()
    finally:
        done.set()
        asking.join()


if __name__ == "__main__":
    take(sys.argv[1], Path(sys.argv[2]).read_text(encoding="utf-8").splitlines(), Path(__file__).parent / "page.png")
