"""Lines on the terminal."""


def say(line: str) -> None:
    print(line, flush=True)


def tell_stages(line: str) -> None:
    """Without --verbose: lines below a stage's own, which are indented by four, are not printed. All is in events.jsonl."""
    if not line.startswith("    "):
        say(line)
