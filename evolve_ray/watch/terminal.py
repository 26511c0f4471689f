"""Prints lines on the terminal."""


def say(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


def print_stages(line: str) -> None:
    """Prints a line, except details of a stage, which are indented by four spaces; used without --verbose."""
    if not line.startswith("    "):
        say(line)
