"""The page at `/`: one file that loads nothing, and shows refinement while it happens."""

import base64
import hashlib
import html
import json
import re
from pathlib import Path

from evolve_ray.refine.strategies import STRATEGIES
from evolve_ray.serve.settings import Settings

SOURCE = Path(__file__).parent / "page.html"


def page(settings: Settings) -> str:
    """The page with what it needs to know of the endpoint."""
    config, rules = settings.config, settings.rules
    facts = {
        "model": settings.name,
        "rounds": config.strategy.rounds,
        "max_rounds": config.serve.max_rounds,
        "max_samples": config.serve.max_samples,
        "strategy": config.strategy.name,
        "strategies": [name for name in dict.fromkeys([*STRATEGIES, config.strategy.name]) if rules.can_use(name)],
        "scorer": settings.has_scorer,
        "keys": bool(settings.key_hashes),
    }
    text = SOURCE.read_text(encoding="utf-8")
    return text.replace("{{title}}", html.escape(settings.name)).replace("{{facts}}", html.escape(json.dumps(facts)))


def policy() -> str:
    """A Content-Security-Policy that allows the page's own script and style, by their hashes, and requests to its own origin."""
    text = SOURCE.read_text(encoding="utf-8")

    def source(tag: str) -> str:
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {source('script')}; style-src {source('style')}; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )


HEADERS = {
    "Content-Security-Policy": policy(),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
