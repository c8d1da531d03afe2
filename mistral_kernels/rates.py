"""How fast a prompt was read and its answer written, as numbers and as a line."""

from __future__ import annotations

from typing import Any


def timings(prompt_tokens: int, new_tokens: int, times: list[float]) -> dict[str, Any]:
    """Times of the prompt, which yields the first token, and of the tokens after it.

    Args:
        prompt_tokens, new_tokens: how many were fed before the first new one, and how many came.
        times: seconds at the start, at the arrival of each new token, and at the end.
    """
    prompt_s = times[1] - times[0]
    decode_s = times[new_tokens] - times[1]
    decoded = max(new_tokens - 1, 0)
    return {
        "prompt_tokens": prompt_tokens,
        "prompt_ms": prompt_s * 1e3,
        "prompt_tokens_per_s": prompt_tokens / prompt_s,
        "decode_tokens": decoded,
        "decode_ms": decode_s * 1e3 if decoded else 0.0,
        "decode_tokens_per_s": decoded / decode_s if decoded else None,
    }


def rates_line(timings: dict[str, Any]) -> str:
    """What `timings` returned, in words."""
    parts = []
    for phase in ("prompt", "decode"):
        rate = timings[f"{phase}_tokens_per_s"]
        parts.append(
            f"{phase}: {timings[f'{phase}_tokens']} tokens in {timings[f'{phase}_ms']:.1f} ms"
            + (f" ({rate:.1f} tokens/s)" if rate else "")
        )
    return "; ".join(parts)
