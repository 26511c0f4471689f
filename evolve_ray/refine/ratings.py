"""Ratings in the words of a judge: the question, how a reply is read, and the mean of several."""

import math
import re

RATING = """Rate the response to the question on a scale from {low} to {high}, where {high} is best.

Question:
{prompt}

Response:
{response}

Explain in a few words, then end with: Rating: <number>"""
RATED = re.compile(r"Rating:\s*\**\s*(-?\d+(?:\.\d+)?)", re.IGNORECASE)


def read_rating(reply: str, low: float, high: float) -> float:
    """The last rating in a reply; NaN if there is none, or it is not on the scale."""
    ratings = RATED.findall(reply)
    rating = float(ratings[-1]) if ratings else math.nan
    return rating if low <= rating <= high else math.nan


def mean(values: list[float]) -> float:
    """The mean of the values that are numbers; NaN if none is."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan
