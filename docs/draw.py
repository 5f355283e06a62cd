"""Draws the diagrams of the docs: each `images/*.mmd` becomes the SVG beside it, which is committed.

    npm install --prefix .tools/npm mermaid@11.17.2 && python docs/draw.py

Mermaid draws in a browser. The site shows the SVGs, so that it needs neither Mermaid nor a network.
"""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

FOLDER = Path(__file__).parent
MERMAID = FOLDER.parent / ".tools" / "npm" / "node_modules" / "mermaid" / "dist" / "mermaid.min.js"
SETTINGS = {
    "startOnLoad": False,
    "theme": "base",
    # Labels as text of the SVG: images may hold no HTML.
    "htmlLabels": False,
    "flowchart": {
        "htmlLabels": False,
        "curve": "basis",
        "nodeSpacing": 34,
        "rankSpacing": 36,
        "wrappingWidth": 280,
        "subGraphTitleMargin": {"top": 6, "bottom": 18},
    },
    "fontFamily": "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif",
    "themeVariables": {
        "background": "#ffffff",
        "primaryColor": "#eef3f9",
        "primaryBorderColor": "#7d97b4",
        "primaryTextColor": "#161c24",
        "lineColor": "#56616e",
        "clusterBkg": "#f8fafc",
        "clusterBorder": "#c9d3de",
        "edgeLabelBackground": "#ffffff",
        "fontSize": "15px",
    },
}
DRAW = """async ([source, settings]) => {
  mermaid.initialize(settings);
  return (await mermaid.render("diagram", source)).svg;
}"""
# Readable on dark pages, too.
WHITE = '<rect x="-100%" y="-100%" width="300%" height="300%" fill="#ffffff"/>'


def main() -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.add_script_tag(path=MERMAID)
        for source in sorted((FOLDER / "images").glob("*.mmd")):
            svg = page.evaluate(DRAW, [source.read_text(), SETTINGS])
            start = svg.index(">") + 1
            source.with_suffix(".svg").write_text(f"{svg[:start]}{WHITE}{svg[start:]}\n")
        browser.close()


if __name__ == "__main__":
    main()
