"""The HTML parts of a page: escaped text, tables that scroll in their own box, figures with their numbers, one style sheet."""

import base64
import hashlib
import html
import re
from typing import Any

# Control characters become their Unicode pictures: the page shows what a model wrote and never acts on it.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
NUMBER = re.compile(r"[+\-\N{MINUS SIGN}]?\d[\d,]*(\.\d+)?(e-?\d+)?( %| \[.*\])?")


def cell(figures: dict[str, Any] | None, scale: float = 1.0, digits: int = 1) -> str:
    """`mean [low, high]`, each times `scale`; empty without figures."""
    if figures is None:
        return ""
    mean, low, high = (figures[name] * scale for name in ("mean", "low", "high"))
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def clean(value: Any) -> str:
    """Any value as text that every encoder and parser accepts."""
    return str(value).translate(PICTURES).encode("utf-8", "replace").decode()


def escape(value: Any) -> str:
    """Any value as HTML text, for an element or a quoted attribute."""
    return html.escape(clean(value), quote=True)


def table(header: list[str], lines: list[list[Any]]) -> str:
    """A table whose first column names the row; numbers are aligned to the right."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    body = []
    for line in lines:
        cells = [f'<td class="n">{escape(v)}</td>' if NUMBER.fullmatch(str(v)) else f"<td>{escape(v)}</td>" for v in line[1:]]
        body.append(f'<tr><th scope="row">{escape(line[0])}</th>{"".join(cells)}</tr>')
    rows = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="wide" tabindex="0" role="region" aria-label="{escape(header[0])} table"><table>{rows}</table></div>'


def details(summary: str, inside: str) -> str:
    """A part of the page that unfolds; `inside` is HTML, `summary` is text."""
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def figure(title: str, svg: str, header: list[str], lines: list[list[Any]]) -> str:
    """A drawing with its title above and a folded table of its numbers below."""
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}{details('Numbers', table(header, lines))}</figure>"


def section(anchor: str, title: str, text: str, *parts: str) -> str:
    """A section with its title, an explanation and its parts; empty if the parts are empty."""
    inside = "".join(parts)
    explanation = f"<p>{escape(text)}</p>" if text else ""
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{explanation}{inside}</section>' if inside else ""


def panels(parts: list[str]) -> str:
    return f'<div class="panels">{"".join(parts)}</div>' if parts else ""


def document(title: str, body: str, more_style: str = "") -> str:
    """A whole page. Its policy lets it load, send and run nothing; the one style sheet is allowed by its hash."""
    style = STYLE + more_style
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<meta name="referrer" content="no-referrer"><title>{escape(title)} - evolve-ray</title><style>{style}</style></head>'
        f"<body>{body}</body></html>\n"
    )


# Colours of the figures, light and dark scheme. Categories use Okabe and Ito's colours, darkened or lightened to a contrast of
# 3:1 with the page. Iterations use one hue whose contrast grows with their number, so that their order shows without colour.
COLORS = {
    "grid": ("#d9dce1", "#3a3f47"),
    "base": ("#767676", "#9a9a9a"),
    "activation": ("#b35900", "#f0a04b"),
    "wrong": ("#c2410c", "#ff8a4c"),
    "right": ("#0b6fb0", "#58b4f0"),
    "a": ("#0072b2", "#56b4e9"),
    "b": ("#c44e00", "#ff9248"),
    "c": ("#00805f", "#2fc79f"),
    "d": ("#a8508a", "#e394c4"),
    "e": ("#8a6d00", "#f0e442"),
    "f": ("#444444", "#cfcfcf"),
    "i0": ("#4a96c4", "#4a83ad"),
    "i1": ("#3a83b4", "#6097c0"),
    "i2": ("#2b71a3", "#77abd2"),
    "i3": ("#1f5f90", "#90bfe2"),
    "i4": ("#154c7b", "#aad2f0"),
    "i5": ("#0c3a66", "#c6e4fb"),
    "i6": ("#062a50", "#e3f3ff"),
}


def color_variables(scheme: int) -> str:
    return "".join(f"--{name}:{pair[scheme]};" for name, pair in COLORS.items())


STYLE = (
    f":root{{{color_variables(0)}--page:#fff;--card:#f6f7f9;--text:#1b1f24;--soft:#565d66;--line:#d0d4da;--link:#0b5cad}}"
    f"@media(prefers-color-scheme:dark){{:root{{{color_variables(1)}--page:#14171b;--card:#1d2126;--text:#e6e8eb;--soft:#a4abb4;"
    "--line:#3a3f47;--link:#7cbcff}}"
    """
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:76rem;padding:1rem;color:var(--text);background:var(--page);
 overflow-wrap:anywhere}
h1{margin:.5rem 0 0;line-height:1.2}
h2{margin:2.5rem 0 .3rem;line-height:1.25}
h3{margin:1rem 0 .3rem;font-size:1.05rem}
p{margin:.3rem 0 .8rem;max-width:52rem}
p,figcaption,dt,.key{color:var(--soft)}
a{color:var(--link)}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.8rem 0}
dl{display:grid;grid-template-columns:minmax(5.5rem,max-content) 1fr;gap:.25rem 1rem;margin:.5rem 0}
dd{margin:0}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1rem;align-items:start}
figure,.card{margin:0;padding:.7rem;background:var(--card);border-radius:.5rem;min-width:0}
figure:has(details[open]){grid-column:1/-1}
figcaption{font-weight:600}
svg{display:block;width:100%;height:auto;max-width:27rem;fill:currentColor;font-family:system-ui,sans-serif;
 stroke-linejoin:round}
.key{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;margin:.4rem 0 .6rem;font-size:.9rem}
.key span{white-space:nowrap}
.key svg{display:inline-block;width:1.9rem;height:.8rem;vertical-align:middle;margin-right:.3rem}
.card strong{display:block;font-size:1.55rem;line-height:1.25;font-variant-numeric:tabular-nums}
.card dl{grid-template-columns:1fr max-content;font-size:.95rem}
.card dd{text-align:right;font-variant-numeric:tabular-nums}
.card h3{margin-top:0}
.wide{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
td,th{border-bottom:1px solid var(--line);padding:.2rem .6rem .2rem 0;text-align:left;white-space:nowrap;font-weight:400}
thead th{color:var(--soft);font-weight:600}
td.n{text-align:right}
details{margin:.4rem 0}
summary{cursor:pointer}
fieldset{border:0;padding:0;margin:.3rem 0;display:flex;flex-wrap:wrap;gap:.1rem 1rem}
legend{float:left;margin-right:1rem;color:var(--soft);padding:0}
.chain{border:1px solid var(--line);border-radius:.5rem;padding:.5rem .8rem;margin:.4rem 0}
.chain summary b{font-variant-numeric:tabular-nums}
.tag{font-size:.8rem;border:1px solid var(--line);border-radius:1rem;padding:0 .5rem;margin-right:.3rem;white-space:nowrap}
.label{color:var(--soft);margin:.6rem 0 .1rem;font-size:.9rem}
pre{margin:0;padding:.5rem .7rem;background:var(--card);border-radius:.35rem;white-space:pre-wrap;overflow-wrap:anywhere;
 font:.9rem/1.45 ui-monospace,monospace;unicode-bidi:plaintext;max-height:24rem;overflow-y:auto}
.more{color:var(--soft);font-style:italic}
"""
)
